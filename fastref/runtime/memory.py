"""The shared memory of one worker: what it makes, what it hands to a peer, what it takes from one."""

from __future__ import annotations

import os
import struct

from fastref._core import Holder, failpoint, table_sizes
from fastref.carriers.arena import Arena
from fastref.carriers.warm import keep_warm
from fastref.channels.channel import BELL_BYTES
from fastref.channels.shm import RING_SIZE, ring_bytes
from fastref.channels.slots import slot_bytes
from fastref.errors import ProtocolError
from fastref.options import RpcBackendOptions
from fastref.rendezvous import Link
from fastref.runtime.files import LARGEST_SPAN, OwnFiles, PeerFiles
from fastref.segments import (
    InstanceLock,
    allocate,
    cannot_shrink,
    create_control,
    create_memfd,
    map_fd,
    seal,
)
from fastref.segments.budget import available_bytes
from fastref.segments.mapping import Mapping

__all__ = ["LAYOUT", "SLOTS", "OwnMemory", "PeerMemory"]

LAYOUT = 6  # of everything below and in the C headers; peers of another layout are refused

# The control segment: a header that peers check, the bell, the response slots.
MAGIC = b"fastref\0"
HEADER = struct.Struct("=8sIIIIQ")  # magic, layout, response slots, table capacity, table bits, bytes of the arena
BELL_OFFSET = 4096
SLOTS_OFFSET = 8192
SLOTS = 64
CONTROL_BYTES = SLOTS_OFFSET + slot_bytes(SLOTS)
LARGEST_DEFAULT = 256 << 30  # bytes of an arena
TABLE_STEP = 4096  # entries whose memory is made sure of at once
LEAST_WARM, MOST_WARM = 16 << 20, 512 << 20  # bytes of freed memory that may wait for their next use

assert BELL_OFFSET + BELL_BYTES <= SLOTS_OFFSET


def arena_limit(options: RpcBackendOptions) -> int:
    """Return how many bytes of shared memory a worker with these options may use for payloads, whole pages.

    Several workers share a host, and each may use half of what is available: what is really there is looked at whenever
    an arena grows. A bound all the same, since each worker reserves addresses for all arenas of its peers.
    """
    limit = options.arena_limit
    if limit is None:
        limit = min(max(available_bytes() // 2, 1 << 20), LARGEST_DEFAULT)
    return max(limit // 4096, 1) * 4096


class OwnMemory:
    """Control segment, table and arena of this worker, and the rings that its peers write.

    Parameters
    ----------
    lock : InstanceLock
        Whose name the control segment bears while it has one.
    options : RpcBackendOptions
    """

    def __init__(self, lock: InstanceLock, options: RpcBackendOptions) -> None:
        self._fds: dict[str, tuple[int, int]] = {}
        self._rings: dict[int, Mapping] = {}
        self.capacity = options.table_capacity
        self.usable = 0
        keep_warm(min(max(available_bytes() // 32, LEAST_WARM), MOST_WARM))
        self.files = OwnFiles(arena_limit(options))
        self._fds["arena"] = self.files.first
        try:
            control = create_control(CONTROL_BYTES, lock.identity)
            self._fds["control"] = (control.fd, CONTROL_BYTES)
            self.control = map_fd(control.fd, CONTROL_BYTES, writable=True)
            header = HEADER.pack(
                MAGIC, LAYOUT, SLOTS, self.capacity, options.table_bits, self.files.span_bytes
            )  # fmt: skip
            memoryview(self.control)[: len(header)] = header
            hold_bytes, descriptor_bytes = table_sizes(self.capacity)
            self.hold = self._create("hold", hold_bytes)
            self.descriptors = self._create("descriptors", descriptor_bytes)
            # Peers can never map it writable; this process's own mapping is older than the seal.
            seal(self._fds["descriptors"][0], future_write=True)
            self.extend_table()
        except BaseException:
            self.close()
            raise

    def _create(self, label: str, size_bytes: int) -> Mapping:
        fd = create_memfd(label, size_bytes)
        self._fds[label] = (fd, size_bytes)
        return map_fd(fd, size_bytes, writable=True)

    @property
    def bell(self) -> memoryview:
        return memoryview(self.control)[BELL_OFFSET : BELL_OFFSET + BELL_BYTES]

    @property
    def slots(self) -> memoryview:
        return memoryview(self.control)[SLOTS_OFFSET:CONTROL_BYTES]

    def extend_table(self) -> int:
        """Make sure of the memory of more entries; returns how many are usable now. Several threads may do so at once.

        Raises
        ------
        ResourceError
            When the table is full or the system has no memory.
        """
        usable = self.usable  # read once: another thread may change it while this one is in the system
        wanted = min(usable + TABLE_STEP, self.capacity)
        if usable == wanted:
            return usable
        # The hint and the dirty bits of all entries are small; the rest grows with the table.
        hold_bytes, descriptor_bytes = table_sizes(self.capacity)
        hold_fd, descriptor_fd = self._fds["hold"][0], self._fds["descriptors"][0]
        if not usable:
            words = hold_bytes - self.capacity // 8
            allocate(hold_fd, words, self.capacity // 8)
        entry = descriptor_bytes // self.capacity
        allocate(hold_fd, usable * 8, (wanted - usable) * 8 + 64)
        allocate(descriptor_fd, usable * entry, (wanted - usable) * entry)
        self.usable = max(self.usable, wanted)
        return wanted

    def make_arena(self, holder: Holder) -> Arena:
        """Return the arena over the files; ``holder``: what this process holds of its own table."""
        return Arena(self.files.shared, self.files, holder, self.files.limit_bytes, self.files.first_bytes)

    def create_ring(self, rank: int) -> tuple[int, Mapping]:
        """Make a ring for a peer to write: its descriptor, which the caller closes, and the mapping.

        The ring of a later peer of that rank takes the place of the first one's: threads may still look there.
        """
        size_bytes = ring_bytes(RING_SIZE)
        fd = create_memfd("ring", size_bytes)
        try:
            allocate(fd, 0, size_bytes)
            if rank in self._rings:
                self._rings[rank].replace(fd)
            else:
                self._rings[rank] = map_fd(fd, size_bytes, writable=True)
            return fd, self._rings[rank]
        except BaseException:
            os.close(fd)
            raise

    def for_peer(self, ring_fd: int) -> dict[str, tuple[int, int]]:
        """What a peer is handed: label -> (descriptor, size in bytes). The descriptors stay ours."""
        return {**self._fds, "ring": (ring_fd, ring_bytes(RING_SIZE))}

    def close(self) -> None:
        """Close the descriptors; what is mapped stays until its last user is gone. Idempotent."""
        self._fds.pop("arena", None)
        self.files.close()
        while self._fds:
            os.close(self._fds.popitem()[1][0])


class PeerMemory:
    """What a peer handed over, mapped: its bell and slots, its table, its arena, the ring in which we write to it.

    Raises
    ------
    ProtocolError
        A segment is missing, is none, has not the size that the layout says, or could shrink; the layout is another.
        Names the worker.
    """

    def __init__(self, link: Link) -> None:
        self.control = self._map(link, "control", True, SLOTS_OFFSET)
        header = bytes(memoryview(self.control)[: HEADER.size])  # read once; the peer can write here
        magic, layout, self.slot_count, self.capacity, self.bits, span_bytes = HEADER.unpack(header)
        if magic != MAGIC or layout != LAYOUT:
            raise ProtocolError(f"the control segment of worker {link.record} has layout {layout}, not {LAYOUT}")
        if not 1 <= self.slot_count <= 64 or SLOTS_OFFSET + slot_bytes(self.slot_count) > len(self.control):
            raise ProtocolError(f"the control segment of worker {link.record} claims {self.slot_count} response slots")
        if not 0 <= self.bits <= 61 or self.capacity % 64 or not 64 <= self.capacity <= 1 << 24:
            raise ProtocolError(f"worker {link.record} claims a table of {self.capacity} entries, {self.bits} bits")
        if span_bytes % 4096 or not 0 < span_bytes <= LARGEST_SPAN:
            raise ProtocolError(f"worker {link.record} claims an arena of {span_bytes} bytes")
        hold_bytes, descriptor_bytes = table_sizes(self.capacity)
        self.hold = self._map(link, "hold", True, hold_bytes)
        self.descriptors = self._map(link, "descriptors", False, descriptor_bytes)
        self.files = PeerFiles(span_bytes, link)
        self.ring = self._map(link, "ring", True, ring_bytes(RING_SIZE))
        failpoint("segment.mapped")

    def _map(self, link: Link, label: str, writable: bool, least_bytes: int) -> Mapping:
        fd, size_bytes = link.take(label)
        try:
            if size_bytes < least_bytes:
                raise ProtocolError(f"it has {size_bytes} bytes, {least_bytes} are needed")
            # The control segment had a name, and what has one cannot be sealed.
            if label != "control" and not cannot_shrink(fd):
                raise ProtocolError("it is no memory file that keeps its size")
            return map_fd(fd, size_bytes, writable=writable)
        except (ProtocolError, OSError) as error:
            raise ProtocolError(f"the segment {label!r} of worker {link.record} is damaged: {error}") from error
        finally:
            os.close(fd)

    @property
    def bell(self) -> memoryview:
        return memoryview(self.control)[BELL_OFFSET : BELL_OFFSET + BELL_BYTES]

    @property
    def slots(self) -> memoryview:
        return memoryview(self.control)[SLOTS_OFFSET : SLOTS_OFFSET + slot_bytes(self.slot_count)]
