"""Several runtimes in one process, with delivery under the test's hand.

The runtimes are the real ones but for their surroundings: no threads, no sockets, memory of this process, and channels
that keep every frame back until the test lets it arrive. So a test can choose any order of events, and any moment for a
death.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fastref._core import Holder, IdGenerator, ReferenceTable, table_sizes
from fastref.carriers.arena import Arena, PeerArena
from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.slots import PeerSlots, ResponseSlots, slot_bytes
from fastref.errors import ResourceError, UsageError
from fastref.futures import Future
from fastref.options import WorkerInfo
from fastref.rref import RRef
from fastref.runtime.peer import Peer
from fastref.runtime.rules import RuleKeeper
from fastref.wire import Kind
from fastref.wire.frame import describe

__all__ = ["Network", "Node"]

SLOTS = 8
ARENA_BYTES = 1 << 22


class Node(RuleKeeper):
    """One worker of a ``Network``.

    Its calls are those of ``fastref.rpc`` that do not wait: ``rpc_async``, ``remote``, ``new``. What waits is run by
    ``Network.run``.
    """

    def __init__(self, rank: int, capacity: int, bits: int) -> None:
        self.bits = bits
        self.main_digest = ""
        self.capacity = capacity
        self.regions = tuple(bytearray(size) for size in table_sizes(capacity))
        self.bell, self.slot_memory, self.arena_memory = (
            bytearray(BELL_BYTES), bytearray(slot_bytes(SLOTS)), bytearray(ARENA_BYTES)
        )  # fmt: skip
        table = ReferenceTable(*self.regions, capacity)
        arena = Arena(self.arena_memory, lambda offset, size_bytes: None)
        super().__init__(
            rank, WorkerInfo(f"worker{rank}", rank), [], Inbox(self.bell), ResponseSlots(self.slot_memory, SLOTS), arena,
            table, IdGenerator(rank), 60.0,
        )  # fmt: skip
        self.alive = True

    def rpc_async(self, to: str | int, func: Callable, args: tuple = (), kwargs: dict | None = None) -> Future:
        """As ``fastref.rpc.rpc_async``."""
        return self.rpc(HOW_ASYNC, to, func, args, kwargs, -1.0)

    def remote(self, to: str | int, func: Callable, args: tuple = (), kwargs: dict | None = None) -> RRef:
        """As ``fastref.rpc.remote``. When no entry is open for it, it waits for one: call it in ``Network.run``."""
        return self.rpc(HOW_REMOTE, to, func, args, kwargs, -1.0)

    def new(self, value: Any) -> RRef:
        """Return a reference to a value of this worker, as ``RRef(value)`` does."""
        rref = RRef.__new__(RRef)
        self.new_local(rref, value, None)
        return rref

    def more_entries(self) -> None:
        raise ResourceError(f"all {self.capacity} entries are in use")

    def cut(self, rank: int, reason: str) -> None:
        self.on_death(rank, reason)


HOW_ASYNC, HOW_REMOTE = 1, 2


class Network:
    """A job of ``count`` nodes in this process.

    Parameters
    ----------
    count : int
        Nodes, named worker0, worker1, ...
    bits : int
        How many of them have a bit in each table; the others go by messages.
    capacity : int
        Entries of each table.
    """

    def __init__(self, count: int, bits: int = 61, capacity: int = 256) -> None:
        self.nodes = [Node(rank, capacity, bits) for rank in range(count)]
        self._channels: dict[tuple[int, int], InprocChannel] = {}
        for node in self.nodes:
            for other in self.nodes:
                mine = node.rank == other.rank
                channel = InprocChannel(other.inbox, node.rank, hold=not mine)
                self._channels[node.rank, other.rank] = channel
                bit = node.rank if node.rank < bits else None
                holder = node.table.holder if mine else Holder(*other.regions, other.capacity, bit)
                peer = Peer(
                    other.rank, other.info, 0, channel, PeerSlots(other.slot_memory, SLOTS), holder,
                    PeerArena(other.arena_memory), bits,
                )  # fmt: skip
                peer.shares_main = True
                node.meet(peer)

    def __getitem__(self, rank: int) -> Node:
        return self.nodes[rank]

    def under_way(self, source: int, target: int) -> list[Kind]:
        """Kinds of the frames between two nodes that have not arrived: the oldest, if any."""
        oldest = self._channels[source, target].peek()
        return [] if oldest is None else [describe(oldest)["kind"]]

    def deliver(self, source: int, target: int, count: int = 1) -> int:
        """Let frames arrive, oldest first, and let the target act on them; returns how many there were."""
        delivered = self._channels[source, target].deliver(count)
        if delivered and self.nodes[target].alive:
            self.nodes[target].step()
        return delivered

    def settle(self) -> None:
        """Deliver everything, in both directions, until nothing is left to deliver or do."""
        moved = True
        while moved:
            moved = False
            for source, target in self._channels:
                if source != target and self.deliver(source, target, 1 << 30):
                    moved = True
            for node in self.nodes:
                if node.alive:
                    node.on_tick(time.monotonic())
                    moved |= node.step()

    def run(self, action: Callable[[], Any]) -> Any:
        """Run something that waits (``to_here``, ``remote`` without credit) while everything is delivered."""
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
            thread.join(0.001)
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    def kill(self, rank: int, lose: bool = False) -> None:
        """End a node as SIGKILL would: what it holds stays in the tables until the others take it out.

        Parameters
        ----------
        lose : bool
            Frames of it that have not arrived never do. By default they are in their rings and can still be delivered.
        """
        node = self.nodes[rank]
        if not node.alive:
            raise UsageError(f"worker{rank} is dead already")
        node.alive = False
        node.abandon_handles()
        for (source, _), channel in self._channels.items():
            if source == rank:
                if lose:
                    channel.drop_all()
                else:
                    channel.deliver(1 << 30)
        for other in self.nodes:
            if other.alive:
                other.on_death(rank, "it was killed")

    def used(self, rank: int) -> dict[int, int]:
        """Entries in a node's table that hold a value, or will: index -> holder word. Credits are not among them."""
        node = self.nodes[rank]
        entries = node.table.snapshot()["entries"]
        return {index: entry["word"] for index, entry in entries.items() if index not in node.credit_of}
