"""A worker that cannot start tells the others why, so that none of them waits for it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastref.errors import RendezvousError
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, connect
from fastref.rendezvous.coordinator import LINGER_S, Coordinator
from fastref.rendezvous.links import JOIN_FAILED, LINK_FAILED, MAGIC, Listener
from fastref.rendezvous.meeting import Meeting, open_meeting
from fastref.rendezvous.methods import claimed_numbers, job_name
from fastref.rendezvous.records import MAX_WORLD_SIZE, WorkerRecord

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["tell_coordinator", "tell_members", "tell_neighbours"]

# How long a worker that cannot start looks for the coordinator, and how long it waits until it has been heard.
_LOOK_S, _PAUSE_S = LINGER_S, 0.02
_HEARD_S = 1.0
_MAX_CAUSE_CHARACTERS = 2000


def tell_coordinator(
    record: WorkerRecord,
    listener: Listener,
    init_method: str,
    rank: Any,
    world_size: Any,
    cause: str,
    store: Store | None = None,
    count: int = 0,
) -> None:
    """Say that a worker cannot even ask for its seat: the coordinator tells everybody, and the job ends.

    Rank 0 coordinates until all others have been told. Takes some seconds at most, and no time at all for a
    worker that is alone.

    Parameters
    ----------
    record : WorkerRecord
        The worker; rank and world size are replaced, and its name may be one that no worker may have.
    listener : Listener
        Where it is reached.
    init_method, rank, world_size, store, count
        As passed to ``join``, right or wrong.
    cause : str
        Why it cannot start.

    Raises
    ------
    RendezvousError
        No coordinator was found to tell.
    """
    claimed_rank, claimed_size = claimed_numbers(init_method, rank, world_size)
    if claimed_size == 1:
        return
    job = job_name(init_method)
    record = dataclasses.replace(
        record,
        name=_presentable(record.name),
        rank=claimed_rank or 0,
        world_size=min(claimed_size or MAX_WORLD_SIZE, MAX_WORLD_SIZE),
    )
    cause = cause[:_MAX_CAUSE_CHARACTERS]
    # A store is hosted by rank 0; whoever does not know its rank is not the one.
    rank_at_store = 1 if claimed_rank is None else claimed_rank
    deadline = time.monotonic() + _LOOK_S
    meeting, _store = open_meeting(
        listener.directory, init_method, rank_at_store, record.world_size, _LOOK_S, store, count
    )
    if claimed_rank == 0:
        sentence = sentences.could_not_start(job, record, record, cause)
        Coordinator(record, job, listener, meeting, _LOOK_S, deadline).turn_away(sentence)
        return
    body = _failure(record.name, -1 if claimed_rank is None else claimed_rank, job, cause)
    while not _tell_open_coordinators(meeting, body):
        if time.monotonic() >= deadline:
            raise RendezvousError(f"no coordinator of job {job!r} within {_LOOK_S:g} s")
        time.sleep(_PAUSE_S)


def tell_neighbours(record: WorkerRecord, listener: Listener, job: str, cause: str) -> None:
    """Say to whoever coordinates a job of this name on this host that rank 0 got no store to coordinate by.

    Another rank 0 may host the store in its place. It is not asked for there: what listens at a port that is
    taken may be anything, and the client of a store waits for its answer for ever.
    """
    body = _failure(_presentable(record.name), record.rank, job, cause[:_MAX_CAUSE_CHARACTERS])
    told = []
    for path in listener.directory.glob("*.sock"):
        if path != listener.path and (connection := _tell(str(path), JOIN_FAILED, body)) is not None:
            told.append(connection)
    _wait_until_heard(told, _HEARD_S)


def tell_members(
    record: WorkerRecord, members: Sequence[WorkerRecord], sentence: str, heard_s: float = _HEARD_S
) -> None:
    """Say to every other member at its socket that a member gives up before all are linked, and why.

    Parameters
    ----------
    record : WorkerRecord
        The worker that gives up.
    members : sequence of WorkerRecord
        All of them.
    sentence : str
        What they are told.
    heard_s : float
        How long to wait until all have read it, in seconds: nobody hears a process that has ended.
    """
    body = {"magic": MAGIC, "record": record.to_fields(), "sentence": sentence[:_MAX_CAUSE_CHARACTERS]}
    told = [_tell(member.address, LINK_FAILED, body) for member in members if member.rank != record.rank]
    _wait_until_heard([connection for connection in told if connection is not None], heard_s)


def _tell_open_coordinators(meeting: Meeting, body: dict[str, Any]) -> bool:
    records = [announcement.record for announcement in meeting.look() if announcement.is_open]
    told = [connection for record in records if (connection := _tell(record.address, JOIN_FAILED, body)) is not None]
    _wait_until_heard(told, _HEARD_S)
    return bool(told)


def _failure(name: str, rank: int, job: str, cause: str) -> dict[str, Any]:
    return {"magic": MAGIC, "job": job, "name": name, "rank": rank, "cause": cause}


def _tell(address: str, kind: str, body: dict[str, Any]) -> Connection | None:
    """Return the connection over which a worker was told, None when it has died or left and waits for nobody."""
    try:
        connection = connect(address)
    except ConnectionError:
        return None
    try:
        connection.send_message(kind, body)
    except ConnectionError:
        connection.close()
        return None
    return connection


def _wait_until_heard(told: Sequence[Connection], heard_s: float) -> None:
    """Wait until the others have hung up, or answered."""
    deadline = time.monotonic() + heard_s
    for connection in told:
        # Who is stopped, or busy with an end of its own, reads it later or never.
        with contextlib.suppress(TimeoutError, ConnectionError):
            message = connection.wait_message(deadline)
            if message is not None:
                message.close()
        connection.close()


def _presentable(name: object) -> str:
    """Return a name that a worker may have, for one that has another."""
    return re.sub(r"[^A-Za-z0-9-_:]", "_", str(name))[:127] or "_"
