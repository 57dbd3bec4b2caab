"""The shared carrier: a block in the sender's arena, read by the receiver through its own mapping."""

from __future__ import annotations

import struct

from fastref.carriers.arena import Arena, PeerArena
from fastref.carriers.contract import Carrier
from fastref.errors import ProtocolError, UsageError

__all__ = ["SharedCarrier"]

_DESCRIPTOR = struct.Struct("=QQ")  # offset, size in bytes: the block of a frame


class SharedCarrier(Carrier):
    """Carry buffers through an arena.

    Parameters
    ----------
    arena : Arena
        The sender's.
    peer : PeerArena
        The receiver's mapping of it.
    """

    def __init__(self, arena: Arena, peer: PeerArena) -> None:
        self._arena, self._peer = arena, peer

    def lend(self, data: bytes | bytearray | memoryview) -> bytes:
        size_bytes = memoryview(data).nbytes
        offset = self._arena.lend(size_bytes)
        self._arena.fill(offset, data)
        return _DESCRIPTOR.pack(offset, size_bytes)

    def borrow(self, descriptor: bytes) -> memoryview:
        if len(descriptor) != _DESCRIPTOR.size:
            raise ProtocolError(f"a descriptor of {len(descriptor)} bytes, not {_DESCRIPTOR.size}")
        return self._peer.view(*_DESCRIPTOR.unpack(descriptor))

    def give_back(self, descriptor: bytes) -> None:
        if len(descriptor) != _DESCRIPTOR.size:
            raise UsageError(f"a descriptor of {len(descriptor)} bytes, not {_DESCRIPTOR.size}")
        self._arena.give_back(_DESCRIPTOR.unpack(descriptor)[0])

    @property
    def bytes_lent(self) -> int:
        return self._arena.bytes_lent
