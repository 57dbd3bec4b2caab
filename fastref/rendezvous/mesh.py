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
from fastref.rendezvous.connection import Connection, Message, connect
from fastref.rendezvous.fields import read_object, read_text
from fastref.rendezvous.links import (
    CLOSED,
    LINK_FAILED,
    MAGIC,
    Link,
    Listener,
    Segments,
    check_same_build,
    read_link_hello,
    refusal_of,
    refuse,
)
from fastref.rendezvous.records import WorkerRecord

__all__ = ["link_all"]

_LONGEST_WAIT_S = 3600.0
# Who gives up tells all members why before it closes anything; but the end of one who was told may be seen first.
_REASON_GRACE_S = 0.5


def link_all(
    record: WorkerRecord,
    members: Sequence[WorkerRecord],
    listener: Listener,
    segments_for: Callable[[WorkerRecord], Segments],
    deadline: float,
) -> dict[int, Link]:
    """Make a link to every other member: ask all lower ranks, be asked by all higher ones.

    Parameters
    ----------
    record : WorkerRecord
        The calling worker.
    members : sequence of WorkerRecord
        All workers; the index is the rank.
    listener : Listener
        Where this worker is reached.
    segments_for : callable
        Called once for each peer: what to hand over to it, label -> (descriptor, size in bytes).
        The descriptors stay the caller's.
    deadline : float
        On the clock of ``time.monotonic``; may be infinite.

    Returns
    -------
    dict
        Rank -> link, for every rank but the caller's own. The caller closes them.

    Raises
    ------
    WorkerDied
        A member ended before all links were made.
    RendezvousError
        A member refused, could not start, or did not come before the deadline.
    """
    with selectors.DefaultSelector() as selector:
        mesh = _Mesh(record, members, listener, segments_for, selector)
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
    ) -> None:
        self._record = record
        self._members = members
        self._listener = listener
        self._segments_for = segments_for
        self._selector = selector
        self._links: dict[int, Link] = {}
        self._asked: dict[int, Link] = {}
        self._visitors: set[Connection] = set()
        self._pidfds: list[int] = []
        self._failure: str | None = None
        self._loss: WorkerDied | None = None
        self._loss_deadline = math.inf
        self._on(listener.fileno(), self._greet_visitors)

    def watch_members(self) -> None:
        """Watch the processes themselves: one that dies before it asked for a link has no socket to close."""
        for member in self._others():
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
            try:
                link = Link(connect(member.address), member)
            except ConnectionError as error:
                self._lose(WorkerDied(member.name, member.rank, member.pid, str(error)))
                continue
            self._asked[member.rank] = link
            try:
                link.send_hello(self._record, self._segments_for(member))
            except WorkerDied as error:
                self._lose(error)
                continue
            failpoint("segment.announced")
            self._on(link.fileno(), functools.partial(self._read_welcome, link))

    def run(self, deadline: float) -> dict[int, Link]:
        """Wait until every link is there."""
        while self._loss is not None or len(self._links) < len(self._members) - 1:
            now = time.monotonic()
            if self._loss is not None and now >= self._loss_deadline:
                raise self._loss
            left_s = min(deadline, self._loss_deadline) - now
            if left_s <= 0:
                missing = ", ".join(str(m) for m in self._others() if m.rank not in self._links)
                raise RendezvousError(f"worker {self._record} got no link in time to: {missing}")
            for key, _ in self._selector.select(min(left_s, _LONGEST_WAIT_S)):
                # An earlier event of this batch may have closed it, and its number may be that of another by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if self._failure is not None:
                raise RendezvousError(self._failure)
        return self._links

    def close_links(self) -> None:
        """Give up: the peers see the end of their links."""
        for link in [*self._links.values(), *self._asked.values()]:
            link.close()

    def close_rest(self) -> None:
        """Close what served only to make the links."""
        for visitor in self._visitors:
            refuse(visitor, CLOSED)
        for pidfd in self._pidfds:
            os.close(pidfd)

    def _greet_visitors(self) -> None:
        while (visitor := self._listener.accept()) is not None:
            self._visitors.add(visitor)
            self._on(visitor.fileno(), functools.partial(self._read_hello, visitor))

    def _read_hello(self, visitor: Connection) -> None:
        message = None
        self._selector.unregister(visitor.fileno())
        self._visitors.discard(visitor)
        try:
            message = visitor.receive_message()
            if message is None:
                visitor.close()
                return
            if message.kind == LINK_FAILED:
                self._failure = self._read_failure(visitor, message)
                visitor.close()
                return
            link = self._admit(visitor, message)
        except (ProtocolError, RendezvousError) as error:
            # A stranger or a latecomer: it is told, and the members do not wait for it.
            if message is not None:
                message.close()
            refuse(visitor, CLOSED if message is not None and message.kind == "join-hello" else str(error))
            return
        self._links[link.record.rank] = link
        try:
            link.send_welcome(self._record, self._segments_for(link.record))
        except WorkerDied as error:
            self._lose(error)
        failpoint("segment.announced")

    def _read_failure(self, visitor: Connection, message: Message) -> str:
        """Return why a member gives up; a stranger cannot end a job by saying that he does."""
        message.close()
        if read_text(message.body, "magic") != MAGIC:
            raise ProtocolError("field 'magic' is wrong")
        record = WorkerRecord.from_fields(read_object(message.body, "record"))
        if record not in self._members or record.pid != visitor.pid:
            raise ProtocolError(f"worker {record} is no member of the job of worker {self._record}")
        return read_text(message.body, "sentence")

    def _admit(self, visitor: Connection, message: Message) -> Link:
        if message.kind == "link-hello":
            check_same_build(message.body, self._record)
        link = read_link_hello(visitor, message, self._listener)
        rank = link.record.rank
        if rank >= len(self._members) or self._members[rank] != link.record:
            raise RendezvousError(f"worker {link.record} is no member of the job of worker {self._record}")
        if rank <= self._record.rank or rank in self._links:
            raise RendezvousError(f"worker {link.record} asked for a link it has or has to wait for")
        return link

    def _read_welcome(self, link: Link) -> None:
        message = link.receive_message()
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
