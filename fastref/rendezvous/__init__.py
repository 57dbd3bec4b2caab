"""How the workers of one host find, check and link each other over unix sockets."""

from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.failure import tell_coordinator, tell_members
from fastref.rendezvous.group import (
    answer_ask,
    ask_members,
    check_no_group,
    check_no_job,
    check_rank,
    group_name,
    link_members,
    read_ask,
    register,
    take_turn,
    unregister,
)
from fastref.rendezvous.join import Membership, join
from fastref.rendezvous.links import (
    CLOSED,
    GROUP_ASK,
    LEAVING,
    LINK_FAILED,
    MEMBER_SUFFIX,
    Link,
    Listener,
    Segments,
    check_same_build,
    read_link_hello,
    refuse,
)
from fastref.rendezvous.mesh import link_all
from fastref.rendezvous.methods import check_numbers, is_open, job_name, resolve_member_rank, resolve_rank
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.sentences import could_not_start

__all__ = [
    "CLOSED",
    "GROUP_ASK",
    "LEAVING",
    "LINK_FAILED",
    "MEMBER_SUFFIX",
    "Connection",
    "Link",
    "Listener",
    "Membership",
    "Message",
    "Segments",
    "WorkerRecord",
    "answer_ask",
    "ask_members",
    "check_no_group",
    "check_no_job",
    "check_numbers",
    "check_rank",
    "check_same_build",
    "could_not_start",
    "group_name",
    "is_open",
    "job_name",
    "join",
    "link_all",
    "link_members",
    "read_ask",
    "read_link_hello",
    "refuse",
    "register",
    "resolve_member_rank",
    "resolve_rank",
    "take_turn",
    "tell_coordinator",
    "tell_members",
    "unregister",
]
