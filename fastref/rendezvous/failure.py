"""A worker that cannot start tells the others why, so that none of them waits for it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import selectors
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastref.errors import RendezvousError
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, connect
from fastref.rendezvous.coordinator import LINGER_S, Coordinator
from fastref.rendezvous.door import Door
from fastref.rendezvous.hellos import HEARD, JOIN_FAILED, LINK_FAILED, MAGIC, refusal_of
from fastref.rendezvous.launchers import node_rank, restart_count
from fastref.rendezvous.listening import Listener
from fastref.rendezvous.meeting import Meeting, open_meeting
from fastref.rendezvous.methods import LOCAL, claimed_numbers, job_name, scheme_of
from fastref.rendezvous.proving import Provings, dial
from fastref.rendezvous.records import MAX_WORLD_SIZE, WorkerRecord, describe

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["tell_coordinator", "tell_members", "tell_neighbours"]

# How long a worker that cannot start looks for the coordinator, and how long it waits until it has been heard.
_LOOK_S, _PAUSE_S = LINGER_S, 0.05
_HEARD_S, _ANSWER_S = 1.0, 0.25
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
    door: Door | None = None,
    has_looked: bool = True,
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
    init_method, rank, world_size, store, count, door
        As passed to ``join``, right or wrong. With a door the coordinator may be on another host: then it is told by
        way of the store.
    has_looked : bool
        It knows whether it needs a door. One that does not may have others on other hosts, too.
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
        endpoint=door.endpoint if door else "",
        epoch=restart_count(),
        node=node_rank(),
    )
    cause = cause[:_MAX_CAUSE_CHARACTERS]
    if claimed_rank == 0:
        meeting, _store = open_meeting(listener.directory, init_method, 0, record.world_size, _LOOK_S, store, count)
        sentence = sentences.could_not_start(job, record, record, cause)
        if not has_looked:  # nobody of another host can ask
            meeting.complain(record, sentence, 0)
        Coordinator(record, job, listener, meeting, _LOOK_S, time.monotonic() + _LOOK_S, door).turn_away(sentence)
        return
    deadline = time.monotonic() + _LOOK_S
    rank = -1 if claimed_rank is None else claimed_rank
    elsewhere: Meeting | None = None
    if (door is not None or not has_looked) and scheme_of(init_method) != LOCAL:
        size = record.world_size
        elsewhere, _store = open_meeting(listener.directory, init_method, max(rank, 1), size, _LOOK_S, store, count)
    while not tell_neighbours(record.name, rank, listener, job, cause):
        if elsewhere is not None and _complain(elsewhere, record, rank, job, cause):
            return
        if time.monotonic() >= deadline:
            raise RendezvousError(f"no coordinator of job {job!r} within {_LOOK_S:g} s")
        time.sleep(_PAUSE_S)


def _complain(meeting: Meeting, record: WorkerRecord, rank: int, job: str, cause: str) -> bool:
    """Leave word for a coordinator on another host; whether one is there."""
    fields = {"name": record.name, "rank": "unknown" if rank < 0 else rank, "pid": record.pid}
    for announcement in meeting.look():
        coordinator = announcement.record
        if announcement.is_open and coordinator.host != record.host:
            meeting.complain(coordinator, sentences.could_not_start(job, describe(fields), coordinator, cause), rank)
            return True
    return False


def tell_neighbours(name: str, rank: int, listener: Listener, job: str, cause: str) -> bool:
    """Say to all who wait for a job of this name on this host that a worker cannot start; whether one coordinates it.

    They are found in the directory where all listen, by whatever method they meet: a store may not be there, and
    what listens at its port may be anything, for whose answer the client of a store would wait for ever.
    """
    body = {
        "magic": MAGIC,
        "job": job,
        "epoch": restart_count(),
        "node": node_rank(),
        "name": name,
        "rank": rank,
        "cause": cause[:_MAX_CAUSE_CHARACTERS],
    }
    told = [_tell(str(path), JOIN_FAILED, body) for path in listener.directory.glob("*.sock") if path != listener.path]
    answers = _wait_until_heard([connection for connection in told if connection is not None], _ANSWER_S)
    return HEARD in answers


def tell_members(
    record: WorkerRecord,
    members: Sequence[WorkerRecord],
    sentence: str,
    heard_s: float = _HEARD_S,
    door: Door | None = None,
) -> None:
    """Say to every other member, where it listens, that a member gives up before all are linked, and why.

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
    door : Door, optional
        With whose credentials those of other hosts are told.
    """
    body = {"magic": MAGIC, "record": record.to_fields(), "sentence": sentence[:_MAX_CAUSE_CHARACTERS]}
    others = [member for member in members if member.rank != record.rank]
    told = [_tell(member.address, LINK_FAILED, body) for member in others if member.host == record.host]
    reached = [connection for connection in told if connection is not None]
    if door is not None:
        far = [member.endpoint for member in others if member.host != record.host and member.endpoint]
        reached += _tell_far(far, door, LINK_FAILED, body)
    _wait_until_heard(reached, heard_s)


def _tell_far(endpoints: Sequence[str], door: Door, kind: str, body: dict[str, Any]) -> list[Connection]:
    """Tell those who are reached over TCP, all at once; who has not taken part by then is not waited for."""
    reached: list[Connection] = []
    deadline = time.monotonic() + _HEARD_S
    with selectors.DefaultSelector() as selector:
        provings = Provings(selector)
        for endpoint in endpoints:
            with contextlib.suppress(ConnectionError):
                provings.start(dial(endpoint, door.credentials, deadline), reached.append)
        while selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                if selector.get_map().get(key.fd) is key:
                    key.data()
        provings.close()
    for connection in list(reached):
        try:
            connection.send_message(kind, body)
        except (ConnectionError, TimeoutError):
            connection.close()
            reached.remove(connection)
    return reached


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


def _wait_until_heard(told: Sequence[Connection], heard_s: float) -> list[str]:
    """Wait until the others have hung up or answered, and return the answers."""
    deadline = time.monotonic() + heard_s
    answers = []
    for connection in told:
        # Who is stopped, waits for another itself, or is busy with an end of its own reads it later or never.
        with contextlib.suppress(TimeoutError, ConnectionError):
            message = connection.wait_message(deadline)
            if message is not None:
                message.close()
                if message.kind == "refused":
                    answers.append(refusal_of(message))
        connection.close()
    return answers


def _presentable(name: object) -> str:
    """Return a name that a worker may have, for one that has another."""
    return re.sub(r"[^A-Za-z0-9-_:]", "_", str(name))[:127] or "_"
