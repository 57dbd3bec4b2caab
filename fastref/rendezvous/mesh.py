"""Linking every worker of a job with every other, once all of them know each other."""

from __future__ import annotations

import functools
import os
import selectors
import time
from collections.abc import Callable, Sequence

from fastref._core import failpoint
from fastref.errors import ProtocolError, RendezvousError, WorkerDied
from fastref.rendezvous.connection import Connection, Message, connect
from fastref.rendezvous.links import CLOSED, Link, Listener, Segments, check_same_build, read_link_hello, refuse
from fastref.rendezvous.records import WorkerRecord

__all__ = ["link_all"]

_LONGEST_WAIT_S = 3600.0


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
        A member refused, or did not come before the deadline.
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
        self._on(listener.fileno(), self._greet_visitors)

    def watch_members(self) -> None:
        """Watch the processes themselves: one that dies before it asked for a link has no socket to close."""
        for member in self._others():
            try:
                pidfd = os.pidfd_open(member.pid)
            except ProcessLookupError:
                raise _died(member) from None
            self._pidfds.append(pidfd)
            self._on(pidfd, functools.partial(_raise, _died(member)))

    def ask_lower_ranks(self) -> None:
        """Connect and say hello to all of them before waiting for any."""
        for member in self._members[: self._record.rank]:
            try:
                link = Link(connect(member.address), member)
            except ConnectionError as error:
                raise WorkerDied(member.name, member.rank, member.pid, str(error)) from error
            self._asked[member.rank] = link
            link.send_hello(self._record, self._segments_for(member))
            failpoint("segment.announced")
            self._on(link.fileno(), functools.partial(self._read_welcome, link))

    def run(self, deadline: float) -> dict[int, Link]:
        """Wait until every link is there."""
        while len(self._links) < len(self._members) - 1:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = ", ".join(str(m) for m in self._others() if m.rank not in self._links)
                raise RendezvousError(f"worker {self._record} got no link in time to: {missing}")
            for key, _ in self._selector.select(min(left_s, _LONGEST_WAIT_S)):
                # An earlier event of this batch may have closed it, and its number may be that of another by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
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
            link = self._admit(visitor, message)
        except (ProtocolError, RendezvousError) as error:
            # A stranger or a latecomer: it is told, and the members do not wait for it.
            if message is not None:
                message.close()
            refuse(visitor, CLOSED if message is not None and message.kind == "join-hello" else str(error))
            return
        self._links[link.record.rank] = link
        link.send_welcome(self._record, self._segments_for(link.record))
        failpoint("segment.announced")

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
        if message is None:
            raise _died(link.record)
        try:
            link.read_welcome(message, self._record)
        except BaseException:
            message.close()
            raise
        self._selector.unregister(link.fileno())
        self._links[link.record.rank] = self._asked.pop(link.record.rank)

    def _others(self) -> list[WorkerRecord]:
        return [member for member in self._members if member.rank != self._record.rank]

    def _on(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)


def _died(member: WorkerRecord) -> WorkerDied:
    return WorkerDied(member.name, member.rank, member.pid, "while the workers were being linked")


def _raise(error: Exception) -> None:
    raise error
