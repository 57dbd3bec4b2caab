"""A group that workers join and leave while others work: a newcomer's way in, what members do about it, the way out."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from fastref import _core
from fastref.channels.channel import MAX_PEERS
from fastref.channels.shm import RING_SIZE
from fastref.errors import CallTimeout, FastrefError, PeerError, RendezvousError
from fastref.protocol import membership
from fastref.rendezvous import (
    CLOSED,
    Connection,
    Link,
    Listener,
    Message,
    WorkerRecord,
    answer_ask,
    read_ask,
    refuse,
    register,
    unregister,
)
from fastref.runtime.holdings import Holdings
from fastref.runtime.memory import OwnMemory
from fastref.runtime.monitor import Monitor
from fastref.runtime.peer import Peer
from fastref.wire.kinds import Kind

__all__ = ["GroupKeeper"]

logger = logging.getLogger("fastref")

ARRIVAL = 0xFFFE  # no frame: what the reading thread is asked to do for a newcomer that asks for its link


class GroupKeeper(Holdings):
    """A runtime's part in a group without a fixed size. In a job of fixed size nothing here happens."""

    record: WorkerRecord
    _links: dict[int, Link]
    _closing: threading.Lock  # guards links and visitors against being closed while they are used
    _listener: Listener | None
    _memory: OwnMemory | None
    _monitor: Monitor | None

    _group: membership.GroupMembers | None = None

    def begin_group(self, used: dict[int, int]) -> None:
        """Be a member, as all who are linked; ``used``: rank -> how many workers have had it."""
        present = [self.record, *(link.record for link in self._links.values())]
        self._group = membership.GroupMembers(
            used, [membership.Met(record.name, record.rank, record.incarnation) for record in present]
        )
        self._visitors: dict[int, Connection] = {}
        self._visits = 0
        self._early: list[tuple[Connection, WorkerRecord]] = []  # whose answer depends on an end not reported yet
        self._arriving: set[Link] = set()
        self._departing = False
        self._farewells: set[int] = set()
        self._farewell_heard = threading.Condition()
        self._acts |= {Kind.LEAVING: self._leaving, Kind.FAREWELL: self._farewell}

    @property
    def is_static(self) -> bool:
        """Whether nobody joins or leaves."""
        return self._group is None

    # ---- others join

    def on_ask(self, visitor: Connection, message: Message) -> None:
        """Somebody asks whether it may join. On the monitor's thread, as all that is about visitors."""
        message.close()
        if self._departing or self.closed:
            refuse(visitor, CLOSED)
            return
        try:
            self._consider(visitor, read_ask(visitor, message, self.record))
        except FastrefError as error:
            refuse(visitor, str(error))

    def _consider(self, visitor: Connection, record: WorkerRecord) -> None:
        for peer in self.known_peers():
            clashes = peer.rank == record.rank or peer.name == record.name
            if clashes and not peer.is_dead and self._has_ended(peer.rank):
                self._early.append((visitor, record))  # its end will be reported in a moment
                return
        self._visits += 1
        with self._closing:
            self._visitors[self._visits] = visitor
        self._answer(membership.Asks(self._visits, record.name, record.rank))

    def _has_ended(self, rank: int) -> bool:
        with self._closing:
            link = self._links.get(rank)
            return link is not None and link.is_gone()

    def _answer(self, event: membership.Event) -> None:
        assert self._group is not None
        with self._rules:
            commands = self._group.handle(event)
        with self._closing:
            for command in commands:
                visitor = self._visitors.pop(command.visitor, None)
                if visitor is None:
                    continue  # it has given up
                if isinstance(command, membership.Admit):
                    answer_ask(visitor, command.used)
                else:
                    refuse(visitor, command.sentence)

    def on_link(self, link: Link) -> None:
        """A newcomer that all members have let in asks for its link."""
        self._arriving.add(link)
        # The thread that reads the rings adds one: nobody else knows that none is being looked at.
        self.do_at_rest(ARRIVAL, link)

    def handle_control(self, peer: Peer, kind: int, call: int, payload: bytes, references: list | None) -> None:
        if kind != ARRIVAL:
            super().handle_control(peer, kind, call, payload, references)
            return
        assert references is not None
        link = references[0]
        self._arriving.discard(link)
        try:
            self._admit(link)
        except (FastrefError, OSError) as error:
            logger.warning("worker %s could not join: %s", link.record, error)
            refuse(link, str(error))

    def _admit(self, link: Link) -> None:
        record = link.record
        if self._departing or self.closed:
            refuse(link, CLOSED)
            return
        assert self._group is not None and self._memory is not None and self._monitor is not None
        with self._rules:
            free = self._group.is_free(record.rank)
        if record.world_size or not free or record.rank >= MAX_PEERS:
            raise RendezvousError(f"worker {record} has not been let in by {self.info}")
        _core.failpoint("group.admitting")
        peer = self.peer_over(link)
        ring_fd, ring = self._memory.create_ring(record.rank)
        try:
            with self._rules:
                self._group.handle(membership.Met(record.name, record.rank, record.incarnation))
            self._replace(record.rank)
            self.inbox.add_ring(record.rank, ring, RING_SIZE)
            self.meet(peer, introduce=False)
            with self._closing:
                self._links[record.rank] = link
            try:
                link.send_welcome(self.record, self._memory.for_peer(ring_fd))
                self.introduce_memory(record.rank, link)
            except PeerError as error:
                logger.debug("a newcomer has gone already: %s", error)  # the monitor will see that
        finally:
            os.close(ring_fd)
        self._monitor.watch(record.rank, link)
        _core.failpoint("group.admitted")

    def _replace(self, rank: int) -> None:
        """Forget who had a rank before; references to its values say who it was."""
        old = self.peers[rank] if rank < len(self.peers) else None
        if old is None:
            return
        # No exception: raised, it would refer to handles that keep the holder.
        old.holder.epitaph = (old.name, rank, old.pid, old.death or "", old.left)
        old.free(self.arena)
        for peer in self.known_peers():
            # A receiver that had replaced it before we did has not taken the reference, and does not say so.
            for fork, child in list(peer.children.items()):
                if child[0] is old.holder and peer.children.pop(fork, None) is not None:
                    self.unhold(*child)
        self.dismiss(old)
        self.slots.collect_abandoned()
        with self._rules:
            self._removal.forget(old.uid)
            self._user_forks.owner_replaced(rank)

    def peer_over(self, link: Link) -> Peer:
        raise NotImplementedError

    def introduce_memory(self, rank: int, link: Link) -> None:
        raise NotImplementedError

    def _greeting(self, peer: Peer, call: int, value: Any) -> None:
        super()._greeting(peer, call, value)
        if not self.is_static and self.ranks[peer.rank] is not peer:
            # A newcomer: all members have linked it. It takes our greeting for the word that we know it.
            self.introduce(peer)
            self.tell(peer, Kind.GREETING, self.main_digest)

    # ---- others leave

    def on_death(self, rank: int, reason: str) -> None:
        if self._group is None:
            super().on_death(rank, reason)
            return
        with self._rules:
            self._group.handle(membership.Gone(rank))
        peer = self.peers[rank]
        with self._closing:
            link = self._links.pop(rank, None)
            if link is not None:
                link.close()
        self.dismiss(peer)
        super().on_death(rank, reason)
        with self._farewell_heard:
            self._farewells.discard(peer.uid)
            self._farewell_heard.notify_all()
        early, self._early = self._early, []
        for visitor, record in early:
            self._consider(visitor, record)

    def _clear(self, peer: Peer) -> None:
        super()._clear(peer)
        if not self.is_static:
            self.inbox.remove(peer.rank)
            self._answer(membership.Removed(peer.rank))

    def _leaving(self, peer: Peer, call: int, value: Any) -> None:
        peer.refuse_calls()
        self.dismiss(peer)
        self.tell(peer, Kind.FAREWELL, None)

    # ---- the way out

    def leave_group(self, deadline: float) -> None:
        """Finish what this worker has begun and what others have asked of it, and be asked for nothing more.

        Raises
        ------
        CallTimeout
            It is not done at the deadline.
        """
        self.wait_for_own_calls(deadline)
        self._announce_leaving()
        with self._farewell_heard:
            while not self._farewell_heard.wait_for(lambda: not self._farewells, timeout=0.1):
                if time.monotonic() > deadline:
                    names = [peer.name for peer in self.known_peers() if peer.uid in self._farewells]
                    raise CallTimeout(f"shutdown: workers {names} have not taken note that {self.info} leaves")
        self._wait_until(lambda: self._has_no_calls() and not self.is_busy() and self.flush_all(), deadline)

    def _announce_leaving(self) -> None:
        assert self._listener is not None
        unregister(self._listener)
        self._departing = True
        _core.failpoint("group.unregistered")
        others = [peer for peer in self.known_peers() if peer.rank != self.rank and not peer.is_dead]
        with self._farewell_heard:
            self._farewells = {peer.uid for peer in others}
        for peer in others:
            self.tell(peer, Kind.LEAVING, None)
            _core.failpoint("group.half_told")
            if peer.is_dead:
                self._farewells.discard(peer.uid)

    def _farewell(self, peer: Peer, call: int, value: Any) -> None:
        with self._farewell_heard:
            self._farewells.discard(peer.uid)
            self._farewell_heard.notify_all()

    def wait_for_own_calls(self, deadline: float) -> None:
        """Wait until no call of this worker is without an answer.

        Raises
        ------
        CallTimeout
            One is at the deadline.
        """
        self._wait_until(self._has_no_calls, deadline)

    def _has_no_calls(self) -> bool:
        return not self.calls_pending and self.slots.is_idle()

    def _wait_until(self, done: Callable[[], bool], deadline: float) -> None:
        pause_s = 0.0002
        while not done():
            if time.monotonic() > deadline:
                raise CallTimeout(
                    f"shutdown: {self.calls_pending} calls of {self.info} have no answer and {self.running} run here"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.01)

    def end_group(self) -> None:
        """Let everything go that this worker holds of others, for good: its rank may be another's in a moment."""
        if self._group is None or self._listener is None:
            return  # it has not come that far
        unregister(self._listener)
        self._departing = True
        self.delete_user_references()
        for peer in self.known_peers():
            if peer.rank != self.rank:
                peer.holder.retire()

    def send_visitors_away(self) -> None:
        """Nobody is let in any more."""
        if self.is_static:
            return
        with self._closing:
            waiting = [*self._visitors.values(), *(visitor for visitor, _ in self._early), *self._arriving]
            self._visitors, self._early, self._arriving = {}, [], set()
            for visitor in waiting:
                refuse(visitor, CLOSED)

    def enter_group(self) -> None:
        """Let newcomers know of this worker."""
        assert self._listener is not None
        register(self._listener, self.record)
        _core.failpoint("group.registered")

    def on_tick(self, now_s: float) -> None:
        super().on_tick(now_s)
        if self._group is None or not self._visitors:
            return
        with self._closing:  # they have given up, or died, while they waited
            gone = [number for number, visitor in self._visitors.items() if visitor.is_gone()]
            for number in gone:
                self._visitors.pop(number).close()
        with self._rules:
            for number in gone:
                self._group.withdraw(number)
