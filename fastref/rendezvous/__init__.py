"""How workers find, check and link each other: over unix sockets within a host, over TCP between hosts."""

from fastref.rendezvous.addresses import leaves_host
from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.door import Door, open_door
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
from fastref.rendezvous.hellos import (
    CLOSED,
    GROUP_ASK,
    LEAVING,
    LINK_FAILED,
    SESSION_CALL,
    SESSION_RESUME,
    Segments,
    check_same_build,
    refuse,
)
from fastref.rendezvous.join import Membership, join
from fastref.rendezvous.links import Link, TcpLink, read_link_hello, read_stream_hello
from fastref.rendezvous.listening import MEMBER_SUFFIX, Listener, TcpListener
from fastref.rendezvous.mesh import link_all
from fastref.rendezvous.methods import check_numbers, is_open, job_name, plain_number, resolve_member_rank, resolve_rank
from fastref.rendezvous.proving import Credentials, Proving, Provings, dial, visit
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.sentences import could_not_start
from fastref.rendezvous.stream import StreamConnection
from fastref.rendezvous.ways import Way, place_of, way_to

__all__ = [
    "CLOSED",
    "GROUP_ASK",
    "LEAVING",
    "LINK_FAILED",
    "MEMBER_SUFFIX",
    "SESSION_CALL",
    "SESSION_RESUME",
    "Connection",
    "Credentials",
    "Door",
    "Link",
    "Listener",
    "Membership",
    "Message",
    "Proving",
    "Provings",
    "Segments",
    "StreamConnection",
    "TcpLink",
    "TcpListener",
    "Way",
    "WorkerRecord",
    "answer_ask",
    "ask_members",
    "check_no_group",
    "check_no_job",
    "check_numbers",
    "check_rank",
    "check_same_build",
    "could_not_start",
    "dial",
    "group_name",
    "is_open",
    "job_name",
    "join",
    "leaves_host",
    "link_all",
    "link_members",
    "open_door",
    "place_of",
    "plain_number",
    "read_ask",
    "read_link_hello",
    "read_stream_hello",
    "refuse",
    "register",
    "resolve_member_rank",
    "resolve_rank",
    "take_turn",
    "tell_coordinator",
    "tell_members",
    "unregister",
    "visit",
    "way_to",
]
