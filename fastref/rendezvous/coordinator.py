"""Rank 0 of a job that is starting: it seats the others, or tells everybody what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import selectors
import time
from collections.abc import Callable

from fastref.errors import ProtocolError, RendezvousError
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.door import Door
from fastref.rendezvous.fields import read_integer, read_object, read_text
from fastref.rendezvous.hellos import CLOSED, HEARD, JOIN_FAILED, MAGIC, check_pid, check_same_build, refuse
from fastref.rendezvous.listening import Listener
from fastref.rendezvous.meeting import Meeting
from fastref.rendezvous.proving import Provings
from fastref.rendezvous.records import WorkerRecord, describe
from fastref.rendezvous.rivals import Rivals
from fastref.rendezvous.ways import check_reach

__all__ = ["LINGER_S", "RECORDS_PER_MESSAGE", "RETURN_GRACE_S", "Coordinator"]

RECORDS_PER_MESSAGE = 64
"""A record may take some hundred bytes, and a message has a bound."""

# After a mistake, how long workers that are still on their way are awaited, to tell them too.
LINGER_S = 3.0
# How long the place of a worker that died or left while it waited is kept for another. What remains of the time
# in which everybody is to be told is then for those who are still on their way.
RETURN_GRACE_S = 2.5
_LAST_CALL_S = 1.0
_LONGEST_WAIT_S = 0.2
# How long the list of members may wait for room at one of them, who is on another host.
_ROOM_S = 1.0


class Coordinator:
    """Seats the workers of one job.

    Rule 1: everybody who said hello is told the same: the members, or one sentence.
    Rule 2: the rank and name of a worker that dies or leaves while it waits are free again, for a while.
    Rule 3: a worker that cannot start says why, and everybody is told.
    Rule 4: nonsense from a visitor is answered to that visitor and disturbs nobody else.
    Rule 5: whether he came over the unix socket or through the TCP door makes no difference to him.
    Rule 6: who is left of the start of his node before this one gets no seat, and loses it when another comes.
    """

    def __init__(
        self,
        record: WorkerRecord,
        job: str,
        listener: Listener,
        meeting: Meeting,
        timeout_s: float,
        deadline: float,
        door: Door | None = None,
    ) -> None:
        self._record = record
        self._job = job
        self._listener = listener
        self._door = door
        self._meeting = meeting
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._selector = selectors.DefaultSelector()
        self._seats: dict[int, tuple[WorkerRecord, Connection]] = {}
        self._deserters: dict[int, tuple[WorkerRecord, float]] = {}
        self._visitors: set[Connection] = set()
        self._provings = Provings(self._selector)
        self._rivals = Rivals(record, job, meeting, self._selector, self._provings, door, self._fail)
        self._sentence: str | None = None
        self._told_ranks = {record.rank}
        self._linger_s = LINGER_S
        self._world_size = record.world_size

    def run(self) -> tuple[WorkerRecord, ...]:
        """Return the members, index = rank, when all are there and have been told.

        Raises
        ------
        RendezvousError
            Something is wrong, or the deadline has passed; everybody who came has been told why.
        """
        try:
            self._open()
            while len(self._seats) + 1 < self._record.world_size or self._rivals:
                self._wait(self._deadline)
                if self._sentence is None:
                    self._look_around()
                if self._sentence is not None:
                    self._linger()
                    raise RendezvousError(self._sentence)
            self._meeting.close_door(self._record)
            return self._tell_members()
        except BaseException as error:
            if self._sentence is None:
                self._fail(f"coordinator {self._record} of job {self._job!r} gave up: {type(error).__name__}: {error}")
            self._meeting.withdraw(self._record)
            raise
        finally:
            self._close()

    def turn_away(self, sentence: str) -> None:
        """Tell everybody who comes that there will be no job and why, as long as somebody may be on the way."""
        self._sentence = sentence
        try:
            self._open()
            self._linger()
        finally:
            self._meeting.withdraw(self._record)
            self._close()

    def _open(self) -> None:
        self._on(self._listener.fileno(), functools.partial(self._greet_visitors, self._listener))
        if self._door is not None:
            self._on(self._door.fileno(), functools.partial(self._greet_visitors, self._door))
        self._meeting.announce(self._record)
        self._rivals.begin()

    def _wait(self, deadline: float) -> None:
        left_s = max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(min(left_s, self._rivals.patience_s, _LONGEST_WAIT_S)):
            # An earlier event of this batch may have closed it, and its number may be that of another by now.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        self._provings.expire()
        if self._door is not None:
            self._greet_visitors(self._door)  # it wants to be asked also when nothing happens

    def _look_around(self) -> None:
        now = time.monotonic()
        complaint = self._meeting.complaint(self._record)
        if complaint is not None:
            self._told_ranks.add(complaint[1])
            self._fail(complaint[0])
        elif now >= self._deadline or self._rivals.is_over(now):
            # Everybody had time to come and is told; to wait for more would be too long.
            self._linger_s = 0.0
            self._fail(self._roll_call())
        elif not self._rivals.call_again(now):
            self._look_for_deserters(now)

    def _look_for_deserters(self, now: float) -> None:
        for gone, left_at in self._deserters.values():
            if now >= left_at + RETURN_GRACE_S:
                self._linger_s = _LAST_CALL_S
                self._told_ranks.add(gone.rank)
                self._fail(sentences.deserted(self._job, gone, self._record, RETURN_GRACE_S))
                return

    # Seats

    def _greet_visitors(self, place: Listener | Door) -> None:
        while (visitor := place.accept()) is not None:
            self._visitors.add(visitor)
            self._on(visitor.fileno(), functools.partial(self._read_visitor, visitor))

    def _read_visitor(self, visitor: Connection) -> None:
        try:
            message = visitor.receive_message()
        except BlockingIOError:
            return  # not all of it has come
        except ProtocolError as error:
            self._drop(visitor, str(error))
            return
        if message is None:
            self._drop(visitor)
            return
        message.close()
        try:
            if message.kind == JOIN_FAILED:
                self._hear_failure(visitor, message)
                return
            record = self._examine(visitor, message)
        except ProtocolError as error:
            self._drop(visitor, str(error))
        except RendezvousError as error:
            self._fail(str(error))
            self._tell_late(visitor, message)
        else:
            if self._sentence is not None:
                self._tell_late(visitor, message)
            else:
                self._seat(visitor, record)

    def _hear_failure(self, visitor: Connection, message: Message) -> None:
        if read_text(message.body, "magic") != MAGIC or read_text(message.body, "job") != self._job:
            raise ProtocolError("a worker of another job cannot start")
        epoch, node = read_integer(message.body, "epoch"), read_integer(message.body, "node")
        self._check_start(dataclasses.replace(self._record, epoch=epoch, node=node))  # it is of this host
        rank = read_integer(message.body, "rank", least=-1)
        fields = {"name": read_text(message.body, "name"), "rank": "unknown" if rank < 0 else rank, "pid": visitor.pid}
        cause = read_text(message.body, "cause")
        self._fail(sentences.could_not_start(self._job, describe(fields), self._record, cause))
        self._told_ranks.add(rank)
        self._drop(visitor, HEARD)

    def _seat(self, visitor: Connection, record: WorkerRecord) -> None:
        self._forget(visitor)
        self._deserters.pop(record.rank, None)
        self._seats[record.rank] = (record, visitor)
        self._on(visitor.fileno(), functools.partial(self._read_seated, record))
        if visitor.pidfd >= 0:
            self._on(visitor.pidfd, functools.partial(self._desert, record.rank))

    def _examine(self, visitor: Connection, message: Message) -> WorkerRecord:
        """Return the record of a worker that may have the seat it wants.

        Raises RendezvousError for what is wrong with the job, ProtocolError for what is wrong with the visitor.
        """
        if message.kind != "join-hello":
            raise ProtocolError(f"expected a join-hello, got {message.kind!r}")
        check_same_build(message.body, self._record)
        record = WorkerRecord.from_fields(read_object(message.body, "record"))
        job = read_text(message.body, "job")
        if job != self._job:
            raise ProtocolError(f"worker {record} wants job {job!r}, this is job {self._job!r}")
        self._check_start(record)
        if record.host != self._record.host and visitor.pidfd >= 0:
            raise RendezvousError(sentences.other_host(record, self._record))
        check_pid(visitor, record)
        if self._sentence is None:
            for rank, (seated, _) in list(self._seats.items()):
                if seated.is_outlived_by(record):
                    self._vacate(rank, sentences.other_life(self._job, seated, record))
            self._world_size = max(self._world_size, record.world_size)
            self._check_seat(record)
        return record

    def _check_start(self, record: WorkerRecord) -> None:
        if self._record.is_outlived_by(record):  # it waits for the coordinator of its own start
            raise ProtocolError(CLOSED)
        for other in self._present():
            if record.is_outlived_by(other):
                raise ProtocolError(sentences.other_life(self._job, record, other))

    def _check_seat(self, record: WorkerRecord) -> None:
        mine = self._record
        if record.world_size != mine.world_size:
            raise RendezvousError(sentences.world_sizes_differ(self._job, record, mine))
        if record.strict != mine.strict:
            raise RendezvousError(sentences.strictness_differs(record, mine))
        if record.rank >= mine.world_size:
            raise RendezvousError(sentences.out_of_range(self._job, record, mine))
        for rank, (seated, connection) in list(self._seats.items()):
            if record.rank == rank or record.name == seated.name:
                # The end of a worker and its successor may arrive in one batch of events, in any order.
                if connection.is_gone():
                    self._desert(rank)
                    continue
                raise RendezvousError(sentences.duplicate(self._job, record, seated))
        if record.rank == mine.rank or record.name == mine.name:
            raise RendezvousError(sentences.duplicate(self._job, record, mine))
        self._check_ways(record)

    def _check_ways(self, record: WorkerRecord) -> None:
        """Check that whoever will have to be asked for a link from another host listens for it: the lower rank."""
        for seated in self._present():
            lower, higher = sorted((seated, record), key=lambda one: one.rank)
            if lower.host != higher.host and not lower.endpoint:
                raise RendezvousError(sentences.other_host(record, seated))
            check_reach(higher, lower)

    def _read_seated(self, record: WorkerRecord) -> None:
        connection = self._seats[record.rank][1]
        try:
            message = connection.receive_message()
        except BlockingIOError:
            return  # not all of it has come
        except ProtocolError as error:
            self._desert(record.rank, str(error))
            return
        if message is None:
            self._desert(record.rank)
        elif message.kind == "join-leave":
            self._desert(record.rank, self._roll_call())
        else:
            message.close()
            self._desert(record.rank, f"expected a join-leave, got {message.kind!r}")

    def _desert(self, rank: int, sentence: str | None = None) -> None:
        """Free the seat of a worker that gave it up, and remember who had it until another has."""
        self._deserters[rank] = (self._seats[rank][0], time.monotonic())
        self._vacate(rank, sentence)

    def _vacate(self, rank: int, sentence: str | None = None) -> None:
        _, connection = self._seats.pop(rank)
        if connection.pidfd >= 0:
            self._selector.unregister(connection.pidfd)
        self._drop(connection, sentence)

    def _tell_members(self) -> tuple[WorkerRecord, ...]:
        members = (self._record, *(self._seats[rank][0] for rank in range(1, self._record.world_size)))
        for _, connection in self._seats.values():
            for first in range(0, len(members), RECORDS_PER_MESSAGE):
                part = [member.to_fields() for member in members[first : first + RECORDS_PER_MESSAGE]]
                body = {"total": len(members), "first": first, "records": part}
                try:
                    connection.send_message("members", body, timeout_s=_ROOM_S if connection.pidfd < 0 else 0.0)
                except (ConnectionError, TimeoutError):
                    break  # it died this moment: whoever links the members finds out and names it
        return members

    # Mistakes

    def _fail(self, sentence: str) -> None:
        """Tell everybody who has a seat. The first sentence stays, so that all are told the same."""
        if self._sentence is None:
            self._sentence = sentence
        self._told_ranks.update(self._seats)
        for rank in list(self._seats):
            self._vacate(rank, self._sentence)

    def _tell_late(self, visitor: Connection, message: Message) -> None:
        rank = message.body.get("record", {}).get("rank")
        if isinstance(rank, int):
            self._told_ranks.add(rank)
        self._drop(visitor, self._sentence)

    def _linger(self) -> None:
        """Wait for workers that are still on their way, so that they learn the reason and not just time out."""
        linger_deadline = time.monotonic() + self._linger_s
        while time.monotonic() < linger_deadline and len(self._told_ranks) < self._world_size:
            self._wait(linger_deadline)

    def _roll_call(self) -> str:
        for rival in self._rivals:
            return sentences.already_running(self._job, self._record, rival)
        return sentences.roll_call(self._job, self._record.world_size, self._present(), self._timeout_s)

    def _present(self) -> list[WorkerRecord]:
        return [self._record, *(seated for seated, _ in self._seats.values())]

    # Sockets

    def _on(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _forget(self, connection: Connection) -> None:
        self._visitors.discard(connection)
        self._selector.unregister(connection.fileno())

    def _drop(self, connection: Connection, sentence: str | None = None) -> None:
        self._forget(connection)
        if sentence is None:
            connection.close()
        else:
            refuse(connection, sentence)

    def _close(self) -> None:
        for visitor in list(self._visitors):
            self._drop(visitor, self._sentence or CLOSED)
        for _, connection in self._seats.values():
            connection.close()
        self._rivals.close()
        self._provings.close()
        self._selector.close()
