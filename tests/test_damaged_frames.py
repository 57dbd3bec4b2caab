"""No damaged frame reaches a program: flipped, cut, repeated and exchanged ones, a million of them as a gate."""

from __future__ import annotations

import random
import socket
from collections import Counter

import pytest

from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.tcp import TcpChannel, TcpLoop
from tests import pieces

Record = tuple[bytes, bytes | None]


class Hearer:
    """A channel that hears frames over one connection after another."""

    def __init__(self) -> None:
        self.inbox = Inbox(bytearray(BELL_BYTES))
        self.reasons: list[str] = []
        self.loop = TcpLoop(self.inbox, lambda source, reason: self.reasons.append(reason))
        self.channel = TcpChannel(self.loop, 0)

    def hear(self, data: bytes) -> list[Record]:
        """Return the records of what comes over a connection that then ends."""
        here, there = socket.socketpair()
        here.setblocking(False)
        self.channel.attach(here.detach())
        with there:
            there.sendall(data)
            there.shutdown(socket.SHUT_WR)
            while not self.channel.is_broken:
                self.loop.step(10)
        records = []
        while (record := self.inbox.receive_whole()) is not None:
            records.append(record[1:])
        return records


def some_frame(choose: random.Random, number: int) -> tuple[bytes, Record]:
    record = choose.randbytes(choose.choice([0, 1, 7, 40, 200]))
    bulk = choose.randbytes(choose.choice([0, 0, 1, 64, 1000]))
    return pieces.frame(number, record, bulk, signal=pieces.SUMMED if bulk else 0), (record, bulk or None)


def damaged(choose: random.Random, frame: bytes, before: bytes, after: bytes) -> tuple[str, bytes]:
    """Return what was done to a frame, and what comes in its place and that of the one behind it."""
    how = choose.choice(["flipped", "flipped", "flipped", "spoilt", "cut", "shortened", "repeated", "exchanged"])
    data = bytearray(frame)
    at = choose.randrange(len(data))
    match how:
        case "flipped":
            for _ in range(choose.choice([1, 1, 1, 2, 3])):
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        case "spoilt":
            data[at : at + 8] = bytes(byte ^ choose.randrange(1, 256) for byte in data[at : at + 8])
        case "cut":
            return how, frame[:at]
        case "shortened":
            del data[at : at + choose.randrange(1, 9)]
        case "repeated":
            return how, before + frame[:at]
        case "exchanged":
            return how, after + frame
    return how, bytes(data) + after


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.gates)])
def test_no_damaged_frame_is_delivered_and_none_that_is_whole_is_lost(count: int) -> None:
    choose = random.Random(count)
    hearer, number = Hearer(), 1
    seen: Counter[str] = Counter()
    for _ in range(count):
        frames, records = zip(*(some_frame(choose, number + ahead) for ahead in range(3)), strict=True)
        how, instead = damaged(choose, frames[1], frames[0], frames[2])
        if instead.startswith(frames[1]):  # two flips of one bit
            continue
        got = hearer.hear(frames[0] + instead)
        assert got == [records[0]], how
        seen[how, hearer.reasons[-1]] += 1
        number += 1
        if hearer.channel.spoilt:  # whole, and out of its turn
            assert how == "exchanged"
            hearer.loop.close()
            hearer, number = Hearer(), 1
    hearer.loop.close()
    assert sum(seen.values()) > 0.99 * count
    assert all(seen[how, "what it sent was damaged on its way"] for how in ("flipped", "spoilt", "shortened"))
    assert seen["exchanged", "it left out records"] and seen["repeated", "the connection was closed"]
    print(dict(seen))
