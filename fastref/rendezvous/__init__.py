"""How the workers of one host find, check and link each other over unix sockets."""

from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.join import Membership, join
from fastref.rendezvous.links import CLOSED, Link, Listener, check_same_build, read_link_hello, refuse
from fastref.rendezvous.mesh import link_all
from fastref.rendezvous.methods import check_numbers, job_name, resolve_rank
from fastref.rendezvous.records import WorkerRecord

__all__ = [
    "CLOSED",
    "Connection",
    "Link",
    "Listener",
    "Membership",
    "Message",
    "WorkerRecord",
    "check_numbers",
    "check_same_build",
    "job_name",
    "join",
    "link_all",
    "read_link_hello",
    "refuse",
    "resolve_rank",
]
