"""The shared carrier: a block in the sender's arena, leased by the receiver through its own mapping."""

from __future__ import annotations

import struct

from fastref._core import ReferenceTable
from fastref.carriers.arena import Arena
from fastref.carriers.borrow import PeerArena
from fastref.carriers.contract import Carrier
from fastref.errors import ProtocolError, UsageError

__all__ = ["SharedCarrier"]

_DESCRIPTOR = struct.Struct("=QQII")  # offset, size in bytes, entry and its generation: the block of a frame
_NO_ENTRY = 0xFFFFFFFF


class SharedCarrier(Carrier):
    """Carry buffers through an arena. Without a free table entry, what is borrowed is copied.

    Parameters
    ----------
    table : ReferenceTable
        The sender's; each block has an entry in it.
    arena : Arena
        The sender's.
    peer : PeerArena
        The receiver's mapping of it.
    """

    def __init__(self, table: ReferenceTable, arena: Arena, peer: PeerArena) -> None:
        self._table, self._arena, self._peer = table, arena, peer

    def lend(self, data: bytes | bytearray | memoryview) -> bytes:
        self._reclaim()
        size_bytes = memoryview(data).nbytes
        offset = self._arena.lend(size_bytes)
        self._arena.fill(offset, data)
        entry = self._table.open()
        if entry is None:
            return _DESCRIPTOR.pack(offset, size_bytes, _NO_ENTRY, 0)
        self._arena.pin(offset, entry[0])
        return _DESCRIPTOR.pack(offset, size_bytes, *entry)

    def borrow(self, descriptor: bytes) -> memoryview:
        if len(descriptor) != _DESCRIPTOR.size:
            raise ProtocolError(f"a descriptor of {len(descriptor)} bytes, not {_DESCRIPTOR.size}")
        offset, size_bytes, index, generation = _DESCRIPTOR.unpack(descriptor)
        lease = self._peer.lease(offset, size_bytes, index, generation)
        return memoryview(bytearray(self._peer.view(offset, size_bytes)) if lease is None else lease)

    def give_back(self, descriptor: bytes) -> None:
        if len(descriptor) != _DESCRIPTOR.size:
            raise UsageError(f"a descriptor of {len(descriptor)} bytes, not {_DESCRIPTOR.size}")
        self._arena.give_back(_DESCRIPTOR.unpack(descriptor)[0])

    def _reclaim(self) -> None:
        for index in self._table.sweep():
            self._arena.closed(index)
            self._table.free(index)

    @property
    def bytes_lent(self) -> int:
        self._reclaim()
        return self._arena.bytes_lent
