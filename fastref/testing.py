"""Several runtimes in one process, with delivery under the test's hand.

The runtimes are the real ones but for their surroundings: no threads, no sockets, memory of this process, and channels
that keep every frame back until the test lets it arrive. So a test can choose any order of events, and any moment for a
death::

    network = Network(2)
    alice, bob = network
    future = alice.rpc_async("worker1", pow, (2, 10))
    network.deliver(0, 1)                               # the name of the function
    network.deliver(0, 1)                               # the call
    network.deliver(1, 0)                               # the answer
    assert future.value() == 1024

What it does not do: functions run on the thread that delivers, so one that waits for another worker waits for ever; no
runtime is the current one while they run, so ``RRef(value)`` inside them is refused; and there are no real rings,
threads, signals or processes to go wrong. Tests of those need workers.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fastref._core import Holder, IdGenerator, ReferenceTable, table_sizes
from fastref.carriers.arena import Arena
from fastref.carriers.borrow import PeerArena
from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.slots import PeerSlots, ResponseSlots, slot_bytes
from fastref.errors import ResourceError, UsageError
from fastref.futures import Future
from fastref.options import WorkerInfo
from fastref.rref import RRef
from fastref.runtime.abroad import mirror_of
from fastref.runtime.peer import Peer
from fastref.runtime.rules import RuleKeeper
from fastref.segments import create_memfd, map_fd, map_private
from fastref.wire import Kind
from fastref.wire.frame import describe

__all__ = ["Network", "Node"]

SLOTS = 8
ARENA_BYTES = 1 << 22
EVERYTHING = 1 << 30
HOW_ASYNC, HOW_REMOTE = 1, 2


class Network:
    """A job of ``count`` nodes in this process.

    Parameters
    ----------
    count : int
        Nodes, named worker0, worker1, ...; ``network[rank]`` is one, and iterating gives all.
    bits : int
        How many of them have a bit in each table, the lowest ranks; the others go by messages.
    capacity : int
        Entries of each table, a multiple of 64.
    room : int
        Frames that may be under way from one node to another; a sender that finds no room waits for it.
    window : int
        Entries that a node opens ahead, at first, for the ``remote()`` calls of each other.
    hosts : sequence of str, optional
        Where each node runs: no memory is shared between nodes with different ones. All on one by default.
    """

    def __init__(
        self, count: int, bits: int = 61, capacity: int = 256, room: int = 1024, window: int = 32,
        hosts: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        places = [""] * count if hosts is None else [sys.intern(host) for host in hosts]
        self.nodes = [Node(rank, capacity, bits, places[rank]) for rank in range(count)]
        self._channels: dict[tuple[int, int], InprocChannel] = {}
        self._unseen: set[tuple[int, int]] = set()  # (observer, dead)
        for node in self.nodes:
            for other in self.nodes:
                self._introduce(node, other, room, window)
        for node in self.nodes:
            os.close(node.arena_fd)

    def __getitem__(self, rank: int) -> Node:
        return self.nodes[rank]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def pairs_under_way(self) -> list[tuple[int, int]]:
        """(source, target) of every pair with frames that have not arrived."""
        return [pair for pair, channel in self._channels.items() if channel.under_way]

    def channel(self, source: int, target: int) -> InprocChannel:
        """What carries frames from one node to another, for frames that no node would send."""
        return self._channels[source, target]

    def under_way(self, source: int, target: int) -> int:
        """How many frames from one node to another have not arrived."""
        return self._channels[source, target].under_way

    def oldest(self, source: int, target: int) -> Kind | None:
        """Kind of the frame that arrives next; None when there is none."""
        frame = self._channels[source, target].peek()
        return None if frame is None else describe(frame)["kind"]

    def deliver(self, source: int, target: int, count: int = 1) -> int:
        """Let frames arrive, oldest first, and let the target act on them.

        Returns
        -------
        int
            How many arrived: fewer than ``count`` when fewer were under way.
        """
        delivered = self._channels[source, target].deliver(count)
        if delivered and self.nodes[target].alive:
            self.nodes[target].step()
        return delivered

    def tick(self, rank: int) -> bool:
        """Let a node do what it does every 100 ms at the latest; True if there was something."""
        node = self.nodes[rank]
        if not node.alive:
            return False
        node.on_tick(time.monotonic())
        return node.step()

    def settle(self) -> None:
        """Deliver everything and let every death be noticed, until nothing is left to deliver or do."""
        for observer, dead in sorted(self._unseen):
            self.notice(observer, dead)
        quiet = 0
        while quiet < 2:  # what a node lets go of in one round is told to others in the next
            moved = False
            for source, target in self.pairs_under_way():
                moved |= self.deliver(source, target, EVERYTHING) > 0
            for node in self.nodes:
                moved |= node.alive and (node.table.is_flagged() or node.is_busy())
                moved |= self.tick(node.rank)
            quiet = 0 if moved or self.pairs_under_way() else quiet + 1

    def run(self, action: Callable[[], Any]) -> Any:
        """Run something that waits (``to_here``, a synchronous call, ``remote``) while everything is delivered.

        Returns
        -------
        object
            What ``action`` returned, or its exception is raised.
        """
        outcome: dict[str, Any] = {}

        def act() -> None:
            try:
                outcome["value"] = action()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=act, name="network-run", daemon=True)
        thread.start()
        while thread.is_alive():
            self.settle()
            thread.join(0.0005)
        error = outcome.pop("error", None)
        if error is None:
            return outcome["value"]
        try:
            raise error
        finally:
            del error  # it holds this frame, and the frame of ``action``

    def kill(self, rank: int, lose: bool = False, seen_by: Iterable[int] | None = None) -> None:
        """End a node as SIGKILL would: what it holds stays in the tables until the others take it out.

        Parameters
        ----------
        lose : bool
            Frames of it that have not arrived never do: it died before it had published them. By default they lie in
            the rings of their receivers, who read them when they act next.
        seen_by : iterable of int
            Who notices at once; the others when ``notice`` or ``settle`` says so. By default everybody.
        """
        node = self.nodes[rank]
        if not node.alive:
            raise UsageError(f"worker{rank} is dead already")
        node.alive = False
        node.abandon_handles()
        for (source, _), channel in self._channels.items():
            if source == rank and lose:
                channel.drop_all()
            elif source == rank:
                channel.deliver(EVERYTHING)
        self._unseen = {(observer, dead) for observer, dead in self._unseen if observer != rank}
        living = [other.rank for other in self.nodes if other.alive]
        self._unseen |= {(observer, rank) for observer in living}
        for observer in living if seen_by is None else seen_by:
            self.notice(observer, rank)

    def notice(self, observer: int, dead: int) -> None:
        """Let a node see that another has died, once.

        Raises
        ------
        UsageError
            When it has seen that already, or has nothing to see.
        """
        if (observer, dead) not in self._unseen:
            raise UsageError(f"worker{observer} has no death of worker{dead} to notice")
        self._unseen.discard((observer, dead))
        self.nodes[observer].on_death(dead, "it was killed")

    def unseen(self) -> list[tuple[int, int]]:
        """(observer, dead) of every death that somebody has not noticed yet."""
        return sorted(self._unseen)

    def used(self, rank: int) -> dict[int, int]:
        """Entries in a node's table that hold a value, or will: index -> holder word. Credits are not among them."""
        return self.nodes[rank].used()

    def _introduce(self, node: Node, other: Node, room: int, window: int) -> None:
        channel = InprocChannel(other.inbox, node.rank, hold=node is not other, room=room)
        self._channels[node.rank, other.rank] = channel
        if node.host is not other.host:
            peer = Peer(
                other.rank, other.info, 0, channel, None, mirror_of(other.capacity), None, node.bits, host=other.host
            )  # fmt: skip
        else:
            peer = self._neighbour(node, other, channel)
        peer.shares_main = True
        peer.credit_window = window
        node.meet(peer)

    def _neighbour(self, node: Node, other: Node, channel: InprocChannel) -> Peer:
        """Return what one node knows of another, or of itself, with which it shares memory."""
        mine = node is other
        bit = node.rank if node.rank < node.bits else None
        hold, descriptors = other.regions
        peers_view = memoryview(descriptors).toreadonly()  # as another process maps them
        holder = node.table.holder if mine else Holder(hold, peers_view, other.capacity, bit)
        arena = PeerArena(memoryview(other.arena_memory).toreadonly(), map_private(other.arena_fd, ARENA_BYTES), holder)
        return Peer(
            other.rank, other.info, 0, channel, PeerSlots(other.slot_memory, SLOTS), holder, arena, node.bits,
            host=other.host,
        )  # fmt: skip


class Node(RuleKeeper):
    """One worker of a ``Network``. Its calls are those of ``fastref.rpc`` that do not wait."""

    def __init__(self, rank: int, capacity: int, bits: int, host: str = "") -> None:
        self.bits, self.host = bits, host
        self.main_digest = ""
        self.capacity = capacity
        # Mappings, as in a real worker: pages come when they are touched, and a use after the end is seen at once.
        hold_bytes, descriptor_bytes = table_sizes(capacity)
        self.regions = mmap.mmap(-1, hold_bytes), mmap.mmap(-1, descriptor_bytes)
        self.slot_memory = mmap.mmap(-1, slot_bytes(SLOTS))
        self.arena_fd = create_memfd("arena", ARENA_BYTES)
        self.arena_memory = map_fd(self.arena_fd, ARENA_BYTES, writable=True)
        table = ReferenceTable(*self.regions, capacity)
        super().__init__(
            rank, WorkerInfo(f"worker{rank}", rank), [], Inbox(bytearray(BELL_BYTES)),
            ResponseSlots(self.slot_memory, SLOTS),
            Arena(self.arena_memory, holder=table.holder), table, IdGenerator(rank), 60.0,
        )  # fmt: skip
        self.alive = True

    def new(self, value: Any) -> RRef:
        """Return a reference to a value of this node, as ``RRef(value)`` does."""
        rref = RRef.__new__(RRef)
        self.new_local(rref, value, None)
        return rref

    def rpc_async(
        self, to: str | int, func: Callable, args: tuple = (), kwargs: dict | None = None, timeout: float = -1.0
    ) -> Future:
        """As ``fastref.rpc.rpc_async``."""
        future: Future = self.rpc(HOW_ASYNC, to, func, args, kwargs, timeout)
        return future

    def remote(
        self, to: str | int, func: Callable, args: tuple = (), kwargs: dict | None = None, timeout: float = -1.0
    ) -> RRef:
        """As ``fastref.rpc.remote``. When no entry is open for it, it waits for one: call it in ``Network.run``."""
        rref: RRef = self.rpc(HOW_REMOTE, to, func, args, kwargs, timeout)
        return rref

    def credits(self, to: int) -> int:
        """How many ``remote()`` calls to a node need not wait for an entry."""
        count: int = self.peers[to].snapshot()["credits"]
        return count

    def used(self) -> dict[int, int]:
        """As ``Network.used``."""
        entries = self.table.snapshot()["entries"]
        return {index: entry["word"] for index, entry in entries.items() if index not in self.credit_of}

    def holdings(self) -> dict[str, int]:
        """What this node holds of others and keeps for others, by kind, where it is not nothing.

        After everything was let go and has settled it is ``{}``. Entries opened ahead for ``remote()`` calls, and forks
        that stand for them, do not count.
        """
        peers = [peer.snapshot() for peer in self.peers]
        ahead = sum(not self.holds_by_bit(self.peers[rank]) for rank in self.credit_of.values())
        figures = {
            "entries in use": len(self.used()),
            "entries held": sum(peer["entries_held"] for peer in peers),
            "pins": sum(peer["pins"] for peer in peers),
            "children": sum(peer["children"] for peer in peers),
            "forks": self._owner_forks.total() - ahead,
            "forks asked for": self._user_forks.waiting(),
            "blocks on loan": sum(peer["loans"] for peer in peers),
            "bytes lent": self.arena.bytes_lent,
            "calls pending": self.calls_pending,
            "dead not removed": len(self._removal.open_cases()),
        }
        return {kind: figure for kind, figure in figures.items() if figure}

    def more_entries(self) -> None:
        raise ResourceError(f"all {self.capacity} entries are in use")

    def cut(self, rank: int, reason: str) -> None:
        self.on_death(rank, reason)
