"""Linking every worker of a job with every other, once all of them know each other."""

from __future__ import annotations

import functools
import math
import os
import selectors
import time
from collections.abc import Callable, Sequence

from fastref._core import failpoint
from fastref.errors import ProtocolError, RendezvousError, WorkerDied
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, Message, connect
from fastref.rendezvous.door import Door
from fastref.rendezvous.fields import read_object, read_text
from fastref.rendezvous.hellos import (
    CLOSED,
    LINK_FAILED,
    MAGIC,
    SESSION_CALL,
    SESSION_RESUME,
    Segments,
    check_pid,
    check_same_build,
    refusal_of,
    refuse,
)
from fastref.rendezvous.links import Link, TcpLink, read_link_hello, read_stream_hello
from fastref.rendezvous.listening import Listener
from fastref.rendezvous.proving import Provings, dial
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.stream import StreamConnection
from fastref.rendezvous.ways import Way, way_taken, way_to
from fastref.segments import process_lives

__all__ = ["link_all"]

_LONGEST_WAIT_S = 3600.0
# Who gives up tells all members why before it closes anything; but the end of one who was told may be seen first.
_REASON_GRACE_S = 0.5
# With a door: how often it is asked whether strangers have had their time, and those of whom nothing shows that they
# live whether they still listen.
_ROUND_S = 1.0
# What is no nonsense, but nothing for one that is still being linked: a member that has all its links may miss one.
_FOR_LATER = ("join-hello", SESSION_RESUME, SESSION_CALL)
# How long a member that turns this one away is tried again, and how often.
_TRY_S, _PAUSE_S = 5.0, 0.05


def link_all(
    record: WorkerRecord,
    members: Sequence[WorkerRecord],
    listener: Listener,
    segments_for: Callable[[WorkerRecord], Segments],
    deadline: float,
    door: Door | None = None,
) -> dict[int, Link | TcpLink]:
    """Make a link to every other member: ask all lower ranks, be asked by all higher ones.

    Whoever asks chooses the way (see ``way_to``): memory is shared within a host, others are linked over TCP.

    Parameters
    ----------
    record : WorkerRecord
        The calling worker.
    members : sequence of WorkerRecord
        All workers; the index is the rank.
    listener : Listener
        Where this worker is reached.
    segments_for : callable
        Called once for each peer with which memory is shared: what to hand over to it, label -> (descriptor, size in
        bytes). The descriptors stay the caller's.
    deadline : float
        On the clock of ``time.monotonic``; may be infinite.
    door : Door, optional
        As for ``join``.

    Returns
    -------
    dict
        Rank -> link, for every rank but the caller's own. The caller closes them. Over a ``TcpLink`` nothing has been
        handed over; its socket is free for a channel.

    Raises
    ------
    WorkerDied
        A member ended before all links were made.
    RendezvousError
        A member refused, could not start, or did not come before the deadline.
    """
    with selectors.DefaultSelector() as selector:
        mesh = _Mesh(record, members, listener, segments_for, selector, door)
        try:
            mesh.watch_members()
            mesh.ask_lower_ranks()
            return mesh.run(deadline)
        except BaseException:
            mesh.close_links()
            raise
        finally:
            mesh.close_rest()


class _Mesh:
    """The links that are there and those that are awaited. One thread; everything happens in ``run``."""

    def __init__(
        self,
        record: WorkerRecord,
        members: Sequence[WorkerRecord],
        listener: Listener,
        segments_for: Callable[[WorkerRecord], Segments],
        selector: selectors.BaseSelector,
        door: Door | None,
    ) -> None:
        self._record = record
        self._members = members
        self._listener = listener
        self._segments_for = segments_for
        self._selector = selector
        self._door = door
        self._provings = Provings(selector)
        self._links: dict[int, Link | TcpLink] = {}
        self._asked: dict[int, Link | TcpLink] = {}
        self._visitors: set[Connection] = set()
        self._pidfds: list[int] = []
        self._failure: str | None = None
        self._loss: WorkerDied | None = None
        self._loss_deadline = math.inf
        self._first_tries: dict[int, float] = {}
        self._later: list[Callable[[], None]] = []
        self._next_try = 0.0
        self._next_round = time.monotonic() + _ROUND_S
        self._on(listener.fileno(), functools.partial(self._greet_visitors, listener))
        if door is not None:
            self._on(door.fileno(), functools.partial(self._greet_visitors, door))

    def watch_members(self) -> None:
        """Watch the processes themselves: one that dies before it asked for a link has no socket to close."""
        for member in self._others():
            if member.host != self._record.host:
                continue
            try:
                pidfd = os.pidfd_open(member.pid)
            except ProcessLookupError:
                self._lose(_died(member))
                continue
            self._pidfds.append(pidfd)
            self._on(pidfd, functools.partial(self._see_end, pidfd, member))

    def ask_lower_ranks(self) -> None:
        """Connect and say hello to all of them before waiting for any."""
        for member in self._members[: self._record.rank]:
            way = way_to(self._record, member)
            if way.kind == "tcp":
                self._dial(member, way)
                continue
            try:
                connection = connect(member.address)
            except (ConnectionError, PermissionError, ProtocolError) as error:
                if member.endpoint and self._door is not None and process_lives(member.pid):
                    self._dial(member, Way("tcp", "its unix socket cannot be reached"))
                else:
                    self._miss(member, error)
                continue
            self._ask(Link(connection, member, way), self._segments_for(member))

    def _dial(self, member: WorkerRecord, way: Way) -> None:
        if self._door is None or not member.endpoint:
            raise RendezvousError(sentences.not_listening(self._record, member))

        def proved(connection: StreamConnection) -> None:
            self._ask(TcpLink(connection, member, way), {})

        def failed(error: Exception) -> None:
            # It has proved itself before, to the coordinator: many come to it at once, and it turns some away.
            now = time.monotonic()
            if (
                isinstance(error, ConnectionRefusedError)
                or now >= self._first_tries.setdefault(member.rank, now) + _TRY_S
            ):
                self._miss(member, error)
            else:
                self._later.append(functools.partial(self._dial, member, way))

        try:
            proving = dial(member.endpoint, self._door.credentials, math.inf)
        except ConnectionError as error:
            failed(error)
        else:
            self._provings.start(proving, proved, failed)

    def _ask(self, link: Link | TcpLink, segments: Segments) -> None:
        self._asked[link.record.rank] = link
        try:
            link.send_hello(self._record, segments)
        except WorkerDied as error:
            self._lose(error)
            return
        failpoint("segment.announced")
        self._on(link.fileno(), functools.partial(self._read_welcome, link))

    def _miss(self, member: WorkerRecord, error: Exception) -> None:
        self._lose(WorkerDied(member.name, member.rank, member.pid, str(error)))

    def run(self, deadline: float) -> dict[int, Link | TcpLink]:
        """Wait until every link is there."""
        if self._door is not None:
            self._greet_visitors(self._door)  # who proved himself before shows at no descriptor
        while self._loss is not None or len(self._links) < len(self._members) - 1:
            left_s = min(deadline, self._loss_deadline) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, min(left_s, self._patience_s()))):
                # An earlier event of this batch may have closed it, and its number may be that of another by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if self._door is not None:
                self._go_round(self._door)
            if self._failure is not None:
                raise RendezvousError(self._failure)
            # Not before a last look: this process may have been held up until now, and what it waits for have come.
            if left_s <= 0 and (self._loss is not None or len(self._links) < len(self._members) - 1):
                raise self._loss or self._not_in_time()
        return self._links

    def _not_in_time(self) -> RendezvousError:
        missing = ", ".join(str(member) for member in self._others() if member.rank not in self._links)
        return RendezvousError(f"worker {self._record} got no link in time to: {missing}")

    def close_links(self) -> None:
        """Give up: the peers see the end of their links."""
        for link in [*self._links.values(), *self._asked.values()]:
            link.close()

    def close_rest(self) -> None:
        """Close what served only to make the links."""
        for visitor in self._visitors:
            refuse(visitor, CLOSED)
        self._provings.close()
        for pidfd in self._pidfds:
            os.close(pidfd)

    def _patience_s(self) -> float:
        if self._door is None:
            return _LONGEST_WAIT_S
        return _PAUSE_S if self._later else _ROUND_S

    def _go_round(self, door: Door) -> None:
        """Do what is due without an event: see whether strangers have had their time, and who is absent listens."""
        self._provings.expire()
        self._greet_visitors(door)
        now = time.monotonic()
        if self._later and now >= self._next_try:
            self._next_try = now + _PAUSE_S
            later, self._later = self._later, []
            for dial_again in later:
                dial_again()
        if now < self._next_round:
            return
        self._next_round = now + _ROUND_S
        for member in self._members[self._record.rank + 1 :]:
            if member.host == self._record.host or not member.endpoint or member.rank in self._links:
                continue
            try:
                proving = dial(member.endpoint, door.credentials, math.inf)
            except ConnectionError as error:
                self._miss(member, error)
            else:
                self._provings.start(proving, StreamConnection.close, functools.partial(self._miss_if_refused, member))

    def _miss_if_refused(self, member: WorkerRecord, error: Exception) -> None:
        if isinstance(error, ConnectionRefusedError) and member.rank not in self._links:
            self._miss(member, error)

    def _greet_visitors(self, place: Listener | Door) -> None:
        while (visitor := place.accept()) is not None:
            self._visitors.add(visitor)
            self._on(visitor.fileno(), functools.partial(self._read_hello, visitor))

    def _read_hello(self, visitor: Connection) -> None:
        message: Message | None = None
        refusal: Exception | None = None
        try:
            message = visitor.receive_message()
        except BlockingIOError:
            return  # not all of it has come
        except ProtocolError as error:
            refusal = error
        self._selector.unregister(visitor.fileno())
        self._visitors.discard(visitor)
        if refusal is not None:
            refuse(visitor, str(refusal))
        elif message is None:
            visitor.close()
        else:
            self._hear(visitor, message)

    def _hear(self, visitor: Connection, message: Message) -> None:
        try:
            if message.kind == LINK_FAILED:
                self._failure = self._read_failure(visitor, message)
                visitor.close()
                return
            link = self._admit(visitor, message)
        except (ProtocolError, RendezvousError) as error:
            # A stranger or a latecomer: it is told, and the members do not wait for it.
            message.close()
            refuse(visitor, CLOSED if message.kind in _FOR_LATER else str(error))
            return
        self._links[link.record.rank] = link
        try:
            link.send_welcome(self._record, self._segments_for(link.record) if isinstance(link, Link) else {})
        except WorkerDied as error:
            self._lose(error)
        failpoint("segment.announced")

    def _read_failure(self, visitor: Connection, message: Message) -> str:
        """Return why a member gives up; a stranger cannot end a job by saying that he does."""
        message.close()
        if read_text(message.body, "magic") != MAGIC:
            raise ProtocolError("field 'magic' is wrong")
        record = WorkerRecord.from_fields(read_object(message.body, "record"))
        if record not in self._members:
            raise ProtocolError(f"worker {record} is no member of the job of worker {self._record}")
        check_pid(visitor, record)
        return read_text(message.body, "sentence")

    def _admit(self, visitor: Connection, message: Message) -> Link | TcpLink:
        if message.kind == "link-hello":
            check_same_build(message.body, self._record)
        link = (
            read_stream_hello(visitor, message, self._listener)
            if isinstance(visitor, StreamConnection)
            else read_link_hello(visitor, message, self._listener)
        )
        rank = link.record.rank
        if rank >= len(self._members) or self._members[rank] != link.record:
            raise RendezvousError(f"worker {link.record} is no member of the job of worker {self._record}")
        if rank <= self._record.rank or rank in self._links:
            raise RendezvousError(f"worker {link.record} asked for a link it has or has to wait for")
        link.way = way_taken(self._record, link.record, link.way.kind)
        return link

    def _read_welcome(self, link: Link | TcpLink) -> None:
        try:
            message = link.receive_message()
        except BlockingIOError:
            return  # not all of it has come
        if message is None or (message.kind == "refused" and refusal_of(message) == CLOSED):
            self._selector.unregister(link.fileno())
            self._lose(_died(link.record))
            return
        try:
            link.read_welcome(message, self._record)
        except BaseException:
            message.close()
            raise
        self._selector.unregister(link.fileno())
        self._links[link.record.rank] = self._asked.pop(link.record.rank)

    def _see_end(self, pidfd: int, member: WorkerRecord) -> None:
        self._selector.unregister(pidfd)
        self._lose(_died(member))

    def _lose(self, loss: WorkerDied) -> None:
        """Give up, but look first whether a member has said why: its own end, or another's, is not the reason then."""
        if self._loss is None:
            self._loss, self._loss_deadline = loss, time.monotonic() + _REASON_GRACE_S

    def _others(self) -> list[WorkerRecord]:
        return [member for member in self._members if member.rank != self._record.rank]

    def _on(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)


def _died(member: WorkerRecord) -> WorkerDied:
    return WorkerDied(member.name, member.rank, member.pid, "while the workers were being linked")
