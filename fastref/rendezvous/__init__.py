"""How the workers of one host find, check and link each other over unix sockets."""

from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.failure import tell_coordinator, tell_members
from fastref.rendezvous.join import Membership, join
from fastref.rendezvous.links import CLOSED, LINK_FAILED, Link, Listener, check_same_build, read_link_hello, refuse
from fastref.rendezvous.mesh import link_all
from fastref.rendezvous.methods import check_numbers, job_name, resolve_rank
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.sentences import could_not_start

__all__ = [
    "CLOSED",
    "LINK_FAILED",
    "Connection",
    "Link",
    "Listener",
    "Membership",
    "Message",
    "WorkerRecord",
    "check_numbers",
    "check_same_build",
    "could_not_start",
    "job_name",
    "join",
    "link_all",
    "read_link_hello",
    "refuse",
    "resolve_rank",
    "tell_coordinator",
    "tell_members",
]
