"""An inbox, the channels into it, and ways to damage a ring."""

from __future__ import annotations

import struct

from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.shm import ShmChannel, ring_bytes

__all__ = ["DATA", "HEADER", "RING", "Ends", "damage"]

RING = 2048
HEADER = 16  # bytes before each record in a ring
DATA = 192  # where records begin


class Ends:
    """An inbox and the channels into it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.bell = bytearray(BELL_BYTES)
        self.inbox = Inbox(self.bell)
        self.rings: dict[int, bytearray] = {}

    def channel(self, source: int = 0):
        if self.kind == "inproc":
            return InprocChannel(self.inbox, source, room=40, largest=RING // 2 - HEADER)
        self.rings[source] = bytearray(ring_bytes(RING))
        self.inbox.add_ring(source, self.rings[source], RING)
        return ShmChannel(self.rings[source], RING, self.bell, source)

    def receive_all(self) -> list:
        return list(iter(self.inbox.receive, None))


def damage(ring: bytearray, how: str) -> None:
    if how == "check":
        ring[DATA + 4] ^= 1
    elif how == "size":
        ring[DATA : DATA + 8] = struct.pack("=II", RING, RING ^ 0xFFFFFFFF)
    elif how == "padding":
        ring[DATA : DATA + 8] = struct.pack("=II", 0x80000020, 0x80000020 ^ 0xFFFFFFFF)
    elif how == "tail beyond the ring":
        ring[0:8] = struct.pack("=Q", RING + 16)
    elif how == "tail between records":
        ring[0:8] = struct.pack("=Q", 33)
    elif how == "tail behind":
        ring[0:8] = struct.pack("=Q", 2**64 - 16)
