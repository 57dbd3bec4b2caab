"""Joining a job: every worker calls it, and gets to know all others or the reason why not."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fastref.errors import IdentityError, ProtocolError, RendezvousError, UsageError
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, Message, connect
from fastref.rendezvous.coordinator import RECORDS_PER_MESSAGE, RETURN_GRACE_S, Coordinator
from fastref.rendezvous.door import Door
from fastref.rendezvous.failure import tell_neighbours
from fastref.rendezvous.fields import read_integer, read_list
from fastref.rendezvous.hellos import CLOSED, join_hello, refusal_of
from fastref.rendezvous.launchers import node_rank, restart_count
from fastref.rendezvous.listening import Listener
from fastref.rendezvous.meeting import Announcement, Meeting, open_meeting
from fastref.rendezvous.methods import job_name, resolve_rank
from fastref.rendezvous.proving import visit
from fastref.rendezvous.records import MAX_WORLD_SIZE, WorkerRecord
from fastref.rendezvous.ways import way_to
from fastref.segments import process_lives

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Membership", "join"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.02
# A worker whose time is up asks the coordinator who is missing, and does not wait long for that.
_LAST_WORD_S = 0.5
# A worker with an impossible rank tries to tell the coordinator; see join.
_TELL_S = 3.0
# How long a job that has all its workers is given to end before it counts as one that goes on, and how often
# its coordinator is asked whether it lives.
_FULL_GRACE_S = 3.0
_FULL_RETRY_S = 0.25
# How long a coordinator on another host may take to answer, and how long one that does not prove itself, or to whom
# there is no way, is tried again before everybody is told.
_REACH_S = 3.0
_MISSED_GRACE_S = 1.5


class Membership:
    """A job that this worker has joined.

    Attributes
    ----------
    record : WorkerRecord
        This worker, rank and world size filled in.
    members : tuple of WorkerRecord
        All workers; the index is the rank.
    """

    def __init__(
        self, record: WorkerRecord, members: tuple[WorkerRecord, ...], meeting: Meeting, store: Store | None
    ) -> None:
        self.record = record
        self.members = members
        self._meeting: Meeting | None = meeting
        # Rank 0 may host the store, and others may still be reading from it.
        self._store = store
        self._pid = os.getpid()

    def close(self) -> None:
        """Take back what announces this job, so that the next of its name can start; idempotent.

        In a forked child it does nothing to what its parent announced.
        """
        meeting, self._meeting, self._store = self._meeting, None, None
        if meeting is not None and self.record.rank == 0 and os.getpid() == self._pid:
            meeting.withdraw(self.record)


def join(
    record: WorkerRecord,
    listener: Listener,
    init_method: str,
    rank: int = -1,
    world_size: int | None = None,
    timeout_s: float = 60.0,
    store: Store | None = None,
    count: int = 0,
    door: Door | None = None,
) -> Membership:
    """Meet the other workers of a job and agree on who is who. Rank 0 coordinates.

    Parameters
    ----------
    record : WorkerRecord
        The calling worker; its rank, world size, endpoint, epoch and node are replaced by what the arguments, the door
        and the environment come to.
    listener : Listener
        Where it is reached. For ``local://`` it lies in the job directory that all workers share:
        ``job_directory(run_root(), job_name(init_method))``.
    init_method : str
        ``local://NAME``, or a method of torch.distributed: ``env://``, ``tcp://``, ``file://``.
    rank : int
        -1: from where the init method has it (see ``resolve_rank``).
    world_size : int, optional
        How many workers the job has.
    timeout_s : float
        Seconds to wait for the others; 0 waits for ever.
    store : torch.distributed.Store, optional
        To be used instead of the one that ``init_method`` leads to.
    count : int
        How many joins this process made before; equal on all workers, it keeps the keys apart.
    door : Door, optional
        Where workers of other hosts reach it, and what it proves itself to them with; see ``open_door``.

    Returns
    -------
    Membership
        Of the same workers, in the same order, in every process.

    Raises
    ------
    UsageError
        Rank or world size are missing or impossible.
    RendezvousError
        Any other reason, in a sentence that all workers are told and that names both sides.
    """
    started = time.monotonic()
    deadline = started + timeout_s if timeout_s > 0 else math.inf
    rank, world_size = resolve_rank(init_method, rank, world_size)
    if world_size > MAX_WORLD_SIZE:
        raise UsageError(f"a job has at most {MAX_WORLD_SIZE} workers, not {world_size}")
    job = job_name(init_method)
    given = store

    def open_again(seconds: float) -> Meeting:
        nonlocal store
        meeting, store = open_meeting(listener.directory, init_method, rank, world_size, seconds, given, count)
        return meeting

    try:
        meeting = open_again(timeout_s or math.inf)
    except RendezvousError as error:
        if rank == 0:
            # Another rank 0 may host one at this very port, and those who meet there would wait for one more.
            tell_neighbours(record.name, 0, listener, job, f"RendezvousError: {error}")
        raise
    record = dataclasses.replace(
        record,
        rank=rank,
        world_size=world_size,
        endpoint=door.endpoint if door else "",
        epoch=restart_count(),
        node=node_rank(),
    )

    if rank == 0:
        members = Coordinator(record, job, listener, meeting, timeout_s, deadline, door).run()
    elif rank < world_size:
        again = open_again if given is None else None
        members = _Applicant(record, job, meeting, timeout_s, deadline, door, again).run()
    else:
        # It can never get a seat. But the others wait for somebody, and only the coordinator can tell them why.
        try:
            _Applicant(record, job, meeting, timeout_s, min(deadline, started + _TELL_S), door).run()
        except RendezvousError as error:
            raise UsageError(f"rank {rank} of worker {record} is out of range: world_size is {world_size}") from error
        raise ProtocolError(f"the coordinator of job {job!r} gave worker {record} a seat that does not exist")
    return Membership(record, members, meeting, store)


class _Applicant:
    """A worker other than rank 0 that wants its seat."""

    def __init__(
        self,
        record: WorkerRecord,
        job: str,
        meeting: Meeting,
        timeout_s: float,
        deadline: float,
        door: Door | None,
        open_again: Callable[[float], Meeting] | None = None,
    ) -> None:
        self._record = record
        self._job = job
        self._meeting = meeting
        self._door = door
        self._open_again = open_again
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._last_seen = "rank 0, which coordinates, is missing"
        self._lost: WorkerRecord | None = None
        self._lost_at = math.inf
        self._full_since: dict[str, float] = {}
        self._full_retry = 0.0
        self._missed: dict[str, float] = {}  # instances of other hosts that were not reached, and since when

    def run(self) -> tuple[WorkerRecord, ...]:
        """Look for a coordinator that is alive and open until there is one or the time is up."""
        pause_s = _FIRST_PAUSE_S
        while time.monotonic() < self._deadline:
            for announcement in self._look():
                coordinator = announcement.record
                if not announcement.is_open:
                    self._last_seen = self._why_closed(coordinator)
                    self._check_full(coordinator)
                    continue
                members = self._ask(coordinator)
                if members is not None:
                    return members
                if coordinator.host != self._record.host and not self._takes_tcp(coordinator):
                    self._complain(coordinator, sentences.other_host(self._record, coordinator))
                pause_s = _FIRST_PAUSE_S
            if self._lost is not None and time.monotonic() >= self._lost_at + RETURN_GRACE_S:
                raise RendezvousError(sentences.deserted(self._job, self._lost, self._record, RETURN_GRACE_S))
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        raise RendezvousError(self._out_of_time())

    def _out_of_time(self) -> str:
        return (
            f"worker {self._record} waited {self._timeout_s:g} s for the {self._record.world_size} workers of job "
            f"{self._job!r}: {self._last_seen}"
        )

    def _why_closed(self, coordinator: WorkerRecord) -> str:
        """Say why a coordinator takes nobody: it has all, or is that of a start of the job before this one."""
        if coordinator.is_outlived_by(self._record):
            return (
                f"coordinator {coordinator} is of start {coordinator.epoch} of the job, "
                f"this worker of start {self._record.epoch}"
            )
        return f"coordinator {coordinator} has all its workers already"

    def _look(self) -> list[Announcement]:
        """Return who coordinates, or raise what somebody who could not reach the coordinator has left."""
        try:
            announcements = self._meeting.look()
            complaints = [self._meeting.complaint(announcement.record) for announcement in announcements]
        except RendezvousError as error:
            if self._lost is None:
                return self._look_elsewhere(error)
            # The coordinator may have hosted the store, and the store's own words do not say that it died.
            raise RendezvousError(sentences.orphaned(self._job, self._lost, self._record, error)) from error
        for complaint in complaints:
            if complaint is not None:
                raise RendezvousError(complaint[0])
        return announcements

    def _look_elsewhere(self, error: RendezvousError) -> list[Announcement]:
        """The store ended before anybody was found there: it may have been that of the job before, at the same port."""
        if self._open_again is None:
            raise error
        left_s = max(self._deadline - time.monotonic(), _LONGEST_PAUSE_S)
        try:
            self._meeting = self._open_again(min(left_s, RETURN_GRACE_S))
        except RendezvousError:
            raise error from None
        return []

    def _check_full(self, coordinator: WorkerRecord) -> None:
        """Refuse to wait for the end of a job that goes on: the program that is running is not this one."""
        now = time.monotonic()
        if now < self._full_retry:
            return
        self._full_retry = now + _FULL_RETRY_S
        try:
            self._visit(coordinator).close()
        except (OSError, IdentityError):
            self._full_since.pop(coordinator.instance, None)  # it ended, and its announcement outlived it
            return
        if now >= self._full_since.setdefault(coordinator.instance, now) + _FULL_GRACE_S:
            raise RendezvousError(sentences.full(self._job, self._record, coordinator))

    def _ask(self, coordinator: WorkerRecord) -> tuple[WorkerRecord, ...] | None:
        """Ask for the seat and wait for the answer; None when this coordinator is not or no longer there."""
        since = time.monotonic()
        try:
            connection = self._visit(coordinator)
        except ConnectionRefusedError:
            self._last_seen = f"coordinator {coordinator} is dead"
            return None
        except (OSError, IdentityError) as error:
            self._miss(coordinator, error, since)
            return None
        self._missed.pop(coordinator.instance, None)
        self._lost, self._lost_at = None, math.inf
        try:
            connection.send_message("join-hello", join_hello(self._record, self._job))
            return self._receive_members(connection, coordinator)
        except ConnectionError:
            # Another may come in its place, and soon: the job cannot wait for it as for one that never came.
            self._lost, self._lost_at = coordinator, time.monotonic()
            self._last_seen = f"coordinator {coordinator} died or left"
            return None
        except TimeoutError:
            raise RendezvousError(self._ask_who_is_missing(connection, coordinator)) from None
        finally:
            connection.close()

    def _takes_tcp(self, coordinator: WorkerRecord) -> bool:
        """Return whether the coordinator is visited over TCP: it is on another host, and both are made for that."""
        if coordinator.host == self._record.host:
            return False
        try:
            way_to(self._record, coordinator)
        except RendezvousError as error:
            self._complain(coordinator, str(error))
        return self._door is not None and bool(coordinator.endpoint)

    def _visit(self, coordinator: WorkerRecord) -> Connection:
        """Return a connection to the coordinator; as ``connect`` or ``visit``."""
        if not self._takes_tcp(coordinator) or self._door is None:
            try:
                return connect(coordinator.address)
            except (ConnectionError, PermissionError, ProtocolError):
                # Of another user, or in a container that sees other files; if not dead.
                if self._door is None or not coordinator.endpoint or not process_lives(coordinator.pid):
                    raise
        deadline = min(self._deadline, time.monotonic() + _REACH_S)
        return visit(coordinator.endpoint, self._door.credentials, deadline)

    def _miss(self, coordinator: WorkerRecord, error: Exception, since: float) -> None:
        """Try again for a while where a coordinator is announced that cannot be talked to; then tell it in writing."""
        self._last_seen = f"coordinator {coordinator} was not reached: {error}"
        if not self._takes_tcp(coordinator):
            return
        if isinstance(error, TimeoutError):  # it is there, and busy or stopped
            return
        if self._lost is not None and self._lost.instance == coordinator.instance:  # it was there, and has died
            return
        # It may end just now, or have turned this worker away because too many came at once.
        if time.monotonic() < self._missed.setdefault(coordinator.instance, since) + _MISSED_GRACE_S:
            time.sleep(_LONGEST_PAUSE_S)
            return
        if isinstance(error, IdentityError | ConnectionResetError):
            self._complain(coordinator, sentences.unproved(self._job, self._record, coordinator, error))
        self._complain(coordinator, sentences.unreachable(self._job, self._record, coordinator, error))

    def _complain(self, coordinator: WorkerRecord, sentence: str) -> NoReturn:
        """Leave word for a coordinator that was not reached, so not told, and cannot tell; and give up."""
        self._meeting.complain(coordinator, sentence, self._record.rank)
        raise RendezvousError(sentence)

    def _receive_members(self, connection: Connection, coordinator: WorkerRecord) -> tuple[WorkerRecord, ...] | None:
        members: list[WorkerRecord] = []
        while len(members) < self._record.world_size:
            message = connection.wait_message(self._deadline)
            if message is None:
                raise ConnectionResetError(f"coordinator {coordinator} hung up")
            message.close()
            if message.kind == "refused":
                sentence = refusal_of(message)
                if sentence == CLOSED:
                    self._last_seen = self._why_closed(coordinator)
                    return None
                raise RendezvousError(sentence)
            members += self._read_members(message, len(members), coordinator)
        mine = members[self._record.rank]
        if mine != self._record or members[0] != coordinator:
            raise ProtocolError(f"coordinator {coordinator} sent a list of members without {self._record}")
        return tuple(members)

    def _read_members(self, message: Message, have: int, coordinator: WorkerRecord) -> list[WorkerRecord]:
        if message.kind != "members":
            raise ProtocolError(f"coordinator {coordinator} answered a join-hello with {message.kind!r}")
        first, total = read_integer(message.body, "first"), read_integer(message.body, "total")
        if first != have or total != self._record.world_size:
            raise ProtocolError(
                f"coordinator {coordinator} sent members from {first} of {total}, "
                f"expected from {have} of {self._record.world_size}"
            )
        records: list[WorkerRecord] = []
        for fields in read_list(message.body, "records", most=min(RECORDS_PER_MESSAGE, total - have)):
            if not isinstance(fields, dict):
                raise ProtocolError("field 'records' must be a list of objects")
            record = WorkerRecord.from_fields(fields)
            if record.rank != have + len(records):
                raise ProtocolError(f"field 'rank' is {record.rank}, expected {have + len(records)}")
            records.append(record)
        if not records:
            raise ProtocolError("field 'records' is empty")
        return records

    def _ask_who_is_missing(self, connection: Connection, coordinator: WorkerRecord) -> str:
        try:
            connection.send_message("join-leave", {"reason": "timeout"})
            answer = connection.wait_message(time.monotonic() + _LAST_WORD_S)
            if answer is not None and answer.kind == "refused":
                sentence = refusal_of(answer)
                if sentence != CLOSED:
                    return sentence
                self._last_seen = self._why_closed(coordinator)  # the time ended just before it said so
                return self._out_of_time()
        except (ConnectionError, TimeoutError, ProtocolError):
            pass  # it is gone, stopped or talks nonsense: what we know ourselves has to do
        return (
            f"worker {self._record} waited {self._timeout_s:g} s for the {self._record.world_size} workers of job "
            f"{self._job!r}; coordinator {coordinator} did not say which ranks are missing"
        )
