"""Which way two workers take to each other: shared memory within a host, TCP between hosts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastref.errors import RendezvousError, UsageError
from fastref.rendezvous import sentences
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.stream import is_loopback
from fastref.segments import host_identity

__all__ = [
    "SHM",
    "TCP",
    "TRANSPORT_VARIABLE",
    "Way",
    "check_reach",
    "forced_transport",
    "place_of",
    "way_taken",
    "way_to",
]

TRANSPORT_VARIABLE = "FASTREF_TRANSPORT"
_KINDS = ("shm", "tcp")


@dataclass(frozen=True)
class Way:
    """How a worker is reached.

    Parameters
    ----------
    kind : str
        ``shm`` or ``tcp``.
    why : str
        In a few words; "" where it goes without saying.
    """

    kind: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


SHM, TCP = Way("shm"), Way("tcp")


def forced_transport(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return what ``FASTREF_TRANSPORT`` says, None when the workers choose for themselves.

    Raises
    ------
    UsageError
        It says something else than ``shm`` or ``tcp``.
    """
    forced = environ.get(TRANSPORT_VARIABLE, "")
    if forced and forced not in _KINDS:
        raise UsageError(f"{TRANSPORT_VARIABLE} is shm or tcp, or unset to let the workers choose; it is {forced!r}")
    return forced or None


def way_to(mine: WorkerRecord, theirs: WorkerRecord, environ: Mapping[str, str] = os.environ) -> Way:
    """Return the way from one worker to another.

    Parameters
    ----------
    mine, theirs : WorkerRecord
        Equal hosts can share pids and memory.
    environ : mapping
        Its ``FASTREF_TRANSPORT`` forces one way.

    Raises
    ------
    RendezvousError
        The two are on different hosts, and shared memory is forced, or one listens where the other does not reach it.
    UsageError
        As ``forced_transport``.
    """
    forced = forced_transport(environ)
    if forced == "tcp" and _place(mine) == _place(theirs):
        return Way("tcp", TRANSPORT_VARIABLE)
    if mine.host != theirs.host:
        if forced == "shm":
            raise RendezvousError(sentences.forced_apart(mine, theirs))
        check_reach(mine, theirs)
        return Way("tcp", "another host")
    return SHM if forced is None else Way("shm", TRANSPORT_VARIABLE)


def check_reach(mine: WorkerRecord, theirs: WorkerRecord) -> None:
    """Check that none of two workers listens on loopback if the other has another one.

    Raises
    ------
    RendezvousError
        One does.
    """
    for one, other in ((mine, theirs), (theirs, mine)):
        if one.network != other.network and one.endpoint and is_loopback(one.endpoint):
            raise RendezvousError(sentences.hidden(one, other))


def _place(record: WorkerRecord) -> str:
    """Where a worker is, whether it is an island or not."""
    return record.host.removesuffix(f":{record.instance}")


def place_of(instance: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a text that is equal for two workers only when memory is to be shared between them.

    Everybody in a job can tell so of any two others. ``FASTREF_TRANSPORT=tcp`` makes a worker an island. Who has a
    variable that makes no sense is somewhere, too: it says from there why it does not start.
    """
    place = f"{host_identity()}:{os.geteuid()}"
    return f"{place}:{instance}" if environ.get(TRANSPORT_VARIABLE) == "tcp" else place


def way_taken(mine: WorkerRecord, theirs: WorkerRecord, kind: str) -> Way:
    """Return the way that another worker has come: by his own choice, but mostly for the reason that is known here."""
    way = way_to(mine, theirs)
    return way if way.kind == kind else Way(kind, "the other end came that way")
