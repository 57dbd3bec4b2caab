"""Sessions with the workers of other hosts: what they decide is done here, over the door, on the monitor's thread."""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastref.channels.tcp import TcpChannel
from fastref.errors import FastrefError, ProtocolError, RendezvousError, UsageError
from fastref.protocol import session
from fastref.protocol.session import Session
from fastref.rendezvous import (
    CLOSED,
    LINK_FAILED,
    SESSION_CALL,
    SESSION_RESUME,
    Door,
    Message,
    StreamConnection,
    WorkerRecord,
    leaves_host,
    refuse,
)
from fastref.rendezvous.fields import read_integer, read_object, read_text
from fastref.rendezvous.hellos import refusal_of

__all__ = ["Sessions"]

logger = logging.getLogger("fastref")

# How long one who has proved himself may take to say what he wants, and one who was asked to answer.
_PATIENCE_S = 5.0
# So many may be at that at once; one more and the oldest has to go.
_MOST_VISITORS = 64

RESUMED, HEARD = "session-resumed", "session-heard"


@dataclass
class _Errand:
    """A connection to or from another worker's door, until it is known what becomes of it."""

    connection: StreamConnection
    deadline_s: float
    over: Callable[[str], None]  # with what went wrong
    rank: int = -1
    received: int = 0  # of our records, by the one who has come to go on


class Sessions:
    """All sessions of a worker.

    ``post`` may be called from any thread; all else happens on the thread that calls ``step``.

    Parameters
    ----------
    record : WorkerRecord
        This worker.
    door : Door
        Others come in by it, and this worker goes out with its credentials.
    patience_s : float
        How long another worker may be away.
    on_gone : callable
        ``on_gone(rank, reason, left)``: a session is over.
    on_failure : callable
        ``on_failure(rank, body)``: a worker with which there is a session cannot start.
    wake : callable
        Has ``step`` called soon, from any thread.
    """

    def __init__(
        self,
        record: WorkerRecord,
        door: Door,
        patience_s: float,
        on_gone: Callable[[int, str, bool], None],
        on_failure: Callable[[int, dict[str, Any]], None],
        wake: Callable[[], None],
    ) -> None:
        self._record, self._door, self._patience_s = record, door, patience_s
        self._on_gone, self._on_failure, self._wake = on_gone, on_failure, wake
        self._sessions: dict[int, Session] = {}
        self._channels: dict[int, TcpChannel] = {}
        self._records: dict[int, WorkerRecord] = {}
        self._events: deque[tuple[int, session.Event]] = deque()
        self._errands: dict[StreamConnection, _Errand] = {}  # the oldest first
        self._dials: dict[int, Callable[[], None]] = {}  # what gives each up
        self._arrived: dict[int, _Errand] = {}  # who has come and waits until the old connection is over

    def add(self, record: WorkerRecord, channel: TcpChannel) -> None:
        """Begin a session with a worker, over the first connection."""
        self._sessions[record.rank] = Session(self._record.rank > record.rank, self._patience_s)
        self._channels[record.rank], self._records[record.rank] = channel, record

    def fileno(self) -> int:
        """Return the descriptor to watch for reading: ready whenever ``step`` has something to do at once."""
        return self._door.fileno()

    def post(self, rank: int, event: session.Event) -> None:
        """Have an event dealt with, after those that were posted before."""
        self._events.append((rank, event))
        self._wake()

    def states(self) -> Mapping[int, str]:
        """Return in which state each session is."""
        return {rank: one.state for rank, one in self._sessions.items()}

    def step(self) -> None:
        """Deal with all that has happened; to be called ten times a second without an event, too."""
        self._deal_with_posted()
        while (visitor := self._door.accept()) is not None:
            self._greet(visitor)
        self._deal_with_posted()
        now = time.monotonic()
        for errand in [errand for errand in self._errands.values() if now >= errand.deadline_s]:
            self._end(errand, "it did not say in time what it wanted")
        for rank, one in self._sessions.items():
            if now >= one.due_s:
                self._handle(rank, session.Tick())

    def close(self) -> None:
        """Drop all that is under way; idempotent."""
        for give_up in self._dials.values():
            give_up()
        self._dials.clear()
        while self._arrived:
            self._arrived.popitem()[1].connection.close()
        while self._errands:
            self._errands.popitem()[0].close()

    def disown(self) -> None:
        """In a forked child: close its copies of the sockets. What watches them is the parent's still."""
        for errand in [*self._errands.values(), *self._arrived.values()]:
            errand.connection.close()

    def _deal_with_posted(self) -> None:
        while self._events:
            self._handle(*self._events.popleft())

    def _handle(self, rank: int, event: session.Event, visitor: StreamConnection | None = None) -> None:
        one = self._sessions[rank]
        before = one.state
        commands = one.handle(event, time.monotonic())
        if one.state not in (before, "over"):
            logger.info("worker %s is %s%s", self._records[rank], one.state, one.reason and f": {one.reason}")
        for command in commands:
            self._perform(rank, command, visitor)

    def _perform(self, rank: int, command: session.Command, visitor: StreamConnection | None) -> None:
        if isinstance(command, session.Dial):
            self._dial(rank, command.attempt)
        elif isinstance(command, session.HangUp):
            self._channels[rank].hang_up()
        elif isinstance(command, session.Accept):
            self._accept(rank)
        elif isinstance(command, session.GiveUp):
            self._drop_dial(rank)
            if rank in self._arrived:
                refuse(self._arrived.pop(rank).connection, self._given_up(rank, command.reason))
            self._on_gone(rank, command.reason, command.left)
        elif visitor is not None and isinstance(command, session.Deny):
            self._arrived.pop(rank, None)
            refuse(visitor, self._given_up(rank, command.reason))
        elif visitor is not None and isinstance(command, session.Answer):
            self._say(visitor, HEARD, {})
            visitor.close()

    def _given_up(self, rank: int, reason: str) -> str:
        return f"worker {self._record} has given up worker {self._records[rank]}: {reason}"

    # ---- out

    def _dial(self, rank: int, attempt: int) -> None:
        self._drop_dial(rank)

        def failed(error: Exception) -> None:
            self._dials.pop(rank, None)
            refused = isinstance(error, OSError) and error.errno == errno.ECONNREFUSED
            # Posted, not handled: it may be known while the command is performed.
            self.post(rank, session.Refused() if refused else session.Missed(str(error)))

        self._dials[rank] = self._door.dial(
            self._records[rank].endpoint, functools.partial(self._ask, rank, attempt), failed
        )

    def _drop_dial(self, rank: int) -> None:
        give_up = self._dials.pop(rank, None)
        if give_up is not None:
            give_up()

    def _ask(self, rank: int, attempt: int, connection: StreamConnection) -> None:
        """Both have proved themselves: say what for."""
        errand = _Errand(connection, time.monotonic() + _PATIENCE_S, functools.partial(self._got_nowhere, rank), rank)
        self._dials[rank] = functools.partial(self._forget, errand)
        body = {
            "record": self._record.to_fields(),
            "to_instance": self._records[rank].instance,
            "attempt": attempt,
            "received": self._channels[rank].received,
        }
        if self._say(connection, SESSION_RESUME if self._sessions[rank].asks else SESSION_CALL, body):
            self._watch(errand, functools.partial(self._hear_answer, errand))
        else:
            self._got_nowhere(rank, "it hung up")

    def _got_nowhere(self, rank: int, why: str) -> None:
        self._dials.pop(rank, None)
        self._handle(rank, session.Missed(why))

    def _hear_answer(self, errand: _Errand) -> None:
        rank = errand.rank
        message = self._read(errand)
        if message is None:
            return
        self._unwatch(errand)
        self._dials.pop(rank, None)
        try:
            if message.kind == RESUMED and self._sessions[rank].asks:
                self._go_on(rank, errand.connection, read_integer(message.body, "received"))
            elif message.kind == HEARD and not self._sessions[rank].asks:
                self._handle(rank, session.Heard())
            elif message.kind == "refused":
                sentence = refusal_of(message)
                still_starts = session.Missed("it is not linked with all others yet")
                self._handle(rank, still_starts if sentence == CLOSED else session.Denied(sentence))
            else:
                raise ProtocolError(f"it answered with {message.kind!r}")
        except ProtocolError as error:
            self._handle(rank, session.Spoilt(str(error)))
        errand.connection.close()

    # ---- in

    def _greet(self, visitor: StreamConnection) -> None:
        visitors = [errand for errand in self._errands.values() if errand.rank < 0]
        if len(visitors) >= _MOST_VISITORS:
            self._end(visitors[0], "others came after it")
        errand = _Errand(
            visitor, time.monotonic() + _PATIENCE_S, lambda why: logger.debug("a visitor was sent away: %s", why)
        )
        self._watch(errand, functools.partial(self._hear_visitor, errand))

    def _hear_visitor(self, errand: _Errand) -> None:
        message = self._read(errand)
        if message is None:
            return
        self._unwatch(errand)
        visitor = errand.connection
        try:
            if message.kind not in (SESSION_RESUME, SESSION_CALL, LINK_FAILED):
                refuse(visitor, CLOSED)  # it wants to join, or to link: all have
                return
            record = self._known(message)
            if message.kind == LINK_FAILED:
                self._on_failure(record.rank, message.body)
                visitor.close()
                return
            attempt = read_integer(message.body, "attempt")
            if message.kind == SESSION_CALL:
                self._handle(record.rank, session.Called(attempt), visitor)
                return
            errand.received, errand.rank = read_integer(message.body, "received"), record.rank
        except (RendezvousError, ProtocolError) as error:
            refuse(visitor, str(error))
            return
        earlier = self._arrived.pop(record.rank, None)
        if earlier is not None:
            earlier.connection.close()
        self._arrived[record.rank] = errand
        try:
            self._handle(record.rank, session.Came(attempt), visitor)
        except ProtocolError as error:
            del self._arrived[record.rank]
            refuse(visitor, str(error))

    def _known(self, message: Message) -> WorkerRecord:
        """Return the worker of a message, with which there is a session, if it is meant for this one."""
        record = WorkerRecord.from_fields(read_object(message.body, "record"))
        if self._records.get(record.rank) != record:
            raise RendezvousError(f"worker {record} is not one to which worker {self._record} is linked over TCP")
        if message.kind != LINK_FAILED:
            wanted = read_text(message.body, "to_instance", most=64)
            if wanted != self._record.instance:
                raise RendezvousError(
                    f"worker {record} wants instance {wanted}, this is worker {self._record}, instance "
                    f"{self._record.instance}"
                )
        return record

    def _accept(self, rank: int) -> None:
        """Answer the worker that has come, and go on over its connection."""
        errand = self._arrived.pop(rank)
        if self._say(errand.connection, RESUMED, {"received": self._channels[rank].received}):
            self._drop_dial(rank)
            self._go_on(rank, errand.connection, errand.received)
        else:
            self._handle(rank, session.Missed("it hung up"))
        errand.connection.close()

    # ---- both

    def _go_on(self, rank: int, connection: StreamConnection, received: int) -> None:
        channel = self._channels[rank]
        connection.tolerate(self._patience_s)
        taken = connection.take_socket()
        try:
            channel.attach(taken.fileno(), received, leaves_host(taken))
        except ProtocolError as error:
            taken.close()
            self._handle(rank, session.Spoilt(f"it claims what cannot be: {error}"))
        except (UsageError, FastrefError) as error:  # the channel was closed meanwhile; no descriptors
            taken.close()
            self._handle(rank, session.Missed(str(error)))
        else:
            taken.detach()
            self._handle(rank, session.Resumed())

    def _say(self, connection: StreamConnection, kind: str, body: Mapping[str, Any]) -> bool:
        try:
            connection.send_message(kind, body)
        except (ConnectionError, TimeoutError):
            connection.close()
            return False
        return True

    def _watch(self, errand: _Errand, callback: Callable[[], None]) -> None:
        self._errands[errand.connection] = errand
        self._door.watch(errand.connection, callback)

    def _unwatch(self, errand: _Errand) -> None:
        del self._errands[errand.connection]
        self._door.unwatch(errand.connection)

    def _forget(self, errand: _Errand) -> None:
        if errand.connection in self._errands:
            self._unwatch(errand)
        errand.connection.close()

    def _read(self, errand: _Errand) -> Message | None:
        """Return the message that has come, None when it is not whole yet, or the errand is over."""
        try:
            message = errand.connection.receive_message()
        except BlockingIOError:
            return None
        except ProtocolError as error:
            self._end(errand, str(error))
            return None
        if message is None:
            self._end(errand, "it hung up")
        return message

    def _end(self, errand: _Errand, why: str) -> None:
        self._forget(errand)
        errand.over(why)
