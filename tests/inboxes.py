"""An inbox, the channels into it, and ways to damage a ring."""

from __future__ import annotations

import socket
import struct
from typing import Any

from fastref.channels.channel import BELL_BYTES, Channel, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.shm import ShmChannel, ring_bytes
from fastref.channels.tcp import TcpChannel, TcpLoop

__all__ = ["DATA", "HEADER", "RING", "Ends", "damage"]

RING = 2048
HEADER = 16  # bytes before each record in a ring
DATA = 192  # where records begin


class Ends:
    """An inbox and the channels into it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.bell = bytearray(BELL_BYTES)
        self.inbox: Any = Inbox(self.bell)
        self.rings: dict[int, bytearray] = {}
        if kind == "tcp":
            self.inbox = _ReadByHand(self.inbox)

    def channel(self, source: int = 0) -> Channel:
        if self.kind == "inproc":
            return InprocChannel(self.inbox, source, room=40, largest=RING // 2 - HEADER)
        if self.kind == "tcp":
            return self.inbox.connect(source)
        self.rings[source] = bytearray(ring_bytes(RING))
        self.inbox.add_ring(source, self.rings[source], RING)
        return ShmChannel(self.rings[source], RING, self.bell, source)

    def close(self) -> None:
        if self.kind == "tcp":
            self.inbox.close()

    def receive_all(self) -> list:
        return list(iter(self.inbox.receive, None))


class _ReadByHand:
    """An inbox whose TCP channels are read when somebody receives."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.reasons: list[str] = []
        self._here = TcpLoop(inbox, lambda source, reason: self.reasons.append(reason))
        self._there = TcpLoop(Inbox(bytearray(BELL_BYTES)), lambda source, reason: None)

    def connect(self, source: int) -> TcpChannel:
        one, other = socket.socketpair()
        receiver, sender = TcpChannel(self._here, source), TcpChannel(self._there, source, room_bytes=4 * RING)
        for channel, end in ((receiver, one), (sender, other)):
            end.setblocking(False)
            channel.attach(end.detach())
        return sender

    def receive(self) -> tuple[int, bytes] | None:
        self._there.step()
        self._here.step()
        record = self._inbox.receive()
        self._here.step()  # confirms
        self._there.step()
        return record

    def close(self) -> None:
        self._here.close()
        self._there.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inbox, name)


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
