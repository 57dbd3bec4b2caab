"""The decoders of what comes over a network: who is there, what he wants, and frames.

What they take is compared with what is known by other means, so that a fuzzer also finds what gets in and should not.
Almost every change of a frame is found by its checksums, so that half of the frames get right ones after they were
changed: what is intact and makes no sense is looked for too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import socket
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

from fastref.channels.channel import BELL_BYTES, Inbox
from fastref.channels.sending import checksum
from fastref.channels.tcp import LARGEST_RECORD, TcpChannel, TcpLoop
from fastref.errors import IdentityError, ProtocolError
from fastref.identity.handshake import PREFIX, Handshake
from fastref.identity.token import Token
from fastref.protocol import session
from fastref.rendezvous import SESSION_RESUME, Door, Message, StreamConnection, WorkerRecord
from fastref.runtime import sessions
from fastref.runtime.sessions import Sessions
from tests.fuzz.fuzzer import Target
from tests.pieces import FRAME_MAGIC, HEAD, SUMMED, frame, head

__all__ = ["TARGETS"]

# ---- the handshake: nobody gets in by any other bytes than those that the token makes


def _handshake(asks: bool) -> Handshake:
    nonce = bytes([asks]) * 32  # always the same, so that there is something that gets in
    with mock.patch("fastref.identity.handshake.secrets.token_bytes", return_value=nonce):
        return Handshake(Token(b"known to both of them"), asks=asks, job="job", epoch=3, version="tcp 1")


def _converse() -> dict[bool, bytes]:
    """Return what the end that asks hears, and what the other one does."""
    ends = {True: _handshake(True), False: _handshake(False)}
    heard = {True: b"", False: b""}
    while not all(end.done for end in ends.values()):
        for asks, end in ends.items():
            said = end.to_send()
            heard[not asks] += said
            while said:
                wants = ends[not asks].wants
                ends[not asks].feed(said[:wants])
                said = said[wants:]
    return heard


_ENDS = {True: _handshake(True), False: _handshake(False)}
_HEARD = _converse()


def _read_handshake(data: bytes) -> None:
    heard = False
    for asks, fresh in _ENDS.items():
        end, rest = copy.copy(fresh), data
        try:
            while end.wants and len(rest) >= end.wants:
                assert end.wants <= 64, "more is asked for than a message has"
                piece, rest = rest[: end.wants], rest[end.wants :]
                end.feed(piece)
                end.to_send()
        except IdentityError as error:
            assert str(error).isprintable(), "a refusal that would spoil a log"
            assert not end.wants and not end.done, "something goes on after a refusal"
        else:
            heard |= len(data) - len(rest) >= PREFIX.size
        if end.wants:
            with contextlib.suppress(IdentityError):
                end.end(rest)
        assert end.done == data.startswith(_HEARD[asks]), "the wrong one is let in, or the right one is not"
    if not heard:
        raise ProtocolError("neither of the two goes on")


# ---- messages behind their lengths


def _connected(data: bytes) -> tuple[StreamConnection, socket.socket]:
    """Return a connection on which ``data`` has come and nothing else will, and the other end."""
    here, there = socket.socketpair()
    here.setblocking(False)
    there.sendall(data)
    there.shutdown(socket.SHUT_WR)
    return StreamConnection(here), there


def _cut_messages(data: bytes) -> list[bytes]:
    """Cut behind each message; of the rest nothing can be said."""
    pieces = []
    while len(data) >= 4:
        size = 4 + int.from_bytes(data[:4], "big")
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def _receive_all(connection: StreamConnection) -> list[Message]:
    messages = []
    while (message := connection.receive_message()) is not None:
        messages.append(message)
    return messages


def _read_messages(data: bytes) -> None:
    connection, other = _connected(data)
    with contextlib.closing(connection), other:
        messages = _receive_all(connection)
    # None of them was refused: what came is what any other reader finds.
    whole = [piece for piece in _cut_messages(data) if len(piece) >= 4 and len(piece) == 4 + int.from_bytes(piece[:4])]
    found = [json.loads(piece[4:]) for piece in whole]
    assert [(message.kind, message.body) for message in messages] == [(one["kind"], one["body"]) for one in found]
    assert not any(message.descriptors for message in messages), "descriptors over TCP"
    if not messages:
        raise ProtocolError("none is whole")


def _message(kind: str, body: dict[str, Any]) -> bytes:
    text = json.dumps({"kind": kind, "body": body, "descriptors": []}, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "big") + text


# ---- sessions: what one says who has the token, and comes because a connection broke


def _record(rank: int) -> WorkerRecord:
    return WorkerRecord(
        name=f"w{rank}",
        rank=rank,
        pid=100 + rank,
        instance=f"{rank:016x}",
        address=f"/run/w{rank}",
        world_size=3,
        version="1",
        layout=1,
        bits=61,
        host="here",
        endpoint=f"127.0.0.1:{5000 + rank}",
    )


_HERE, _LOWER, _HIGHER = _record(1), _record(0), _record(2)


class _Door:
    """A door at which the fuzzer knocks, and by which one goes out to it."""

    def __init__(self) -> None:
        self.visitors: list[StreamConnection] = []
        self.dialed: list[Callable[[StreamConnection], None]] = []
        self.watched: dict[StreamConnection, Callable[[], None]] = {}

    def accept(self) -> StreamConnection | None:
        return self.visitors.pop() if self.visitors else None

    def dial(
        self, endpoint: str, proved: Callable[[StreamConnection], None], failed: Callable[[Exception], None]
    ) -> Callable[[], None]:
        self.dialed.append(proved)
        return lambda: None

    def watch(self, connection: StreamConnection, callback: Callable[[], None]) -> None:
        self.watched[connection] = callback

    def unwatch(self, connection: StreamConnection) -> None:
        del self.watched[connection]


def _converse_with(data: bytes, away: int, visits: bool) -> None:
    """Miss a worker, and hear ``data`` from one who comes, or in answer."""
    door, gone, failed = _Door(), [], []
    loop = TcpLoop(Inbox(bytearray(BELL_BYTES)), lambda source, reason: None)
    worker = Sessions(
        _HERE,
        cast(Door, door),
        math.inf,
        lambda rank, reason, left: gone.append((rank, reason, left)),
        lambda rank, body: failed.append(rank),
        lambda: None,
    )
    for record in (_LOWER, _HIGHER):
        worker.add(record, TcpChannel(loop, record.rank))
    worker.post(away, session.Broke("the fuzzer says so", 0.0))
    worker.step()
    connection, other = _connected(data)
    if visits:
        door.visitors.append(connection)
        worker.step()
    else:
        door.dialed[0](connection)
    while connection in door.watched:
        door.watched[connection]()
    worker.step()
    worker.close()
    loop.close()
    connection.close()
    with other:
        other.setblocking(False)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := other.recv(1 << 16):
                said += piece
    answers = [json.loads(piece[4:])["kind"] for piece in _cut_messages(said) if len(piece) > 4]
    heard = failed or sessions.HEARD in answers or (not visits and not worker._sessions[away]._trouble)
    if gone or "refused" in answers or (worker.states()[away] == "away" and not heard):
        raise ProtocolError("it is not gone on with")


def _read_visitor(data: bytes) -> None:
    _converse_with(data, _HIGHER.rank, visits=True)


def _read_answer(data: bytes) -> None:
    # The one that asks first: it hears other answers than the one that calls.
    with contextlib.suppress(ProtocolError):
        _converse_with(data, _LOWER.rank, visits=False)
        return
    _converse_with(data, _HIGHER.rank, visits=False)


def _request(kind: str, **changes: Any) -> bytes:
    body = {"record": _HIGHER.to_fields(), "to_instance": _HERE.instance, "attempt": 1, "received": 0}
    return _message(kind, {**body, **changes})


# ---- frames

_SENT = 3  # records that this end has sent, and that can be confirmed
# In front of the frames: how many records of 4 KiB come before, and whether checksums are made right; how many bytes
# come at a time, 0: all; behind how many bytes the connection breaks, and is made again.
_PLAN_BYTES = 4
_LEAD, _MOST_LEAD = bytes(4096), 70  # more than is read at once
_REPAIRED = 0x80
_SUM_BYTES = 4


def _cut_frames(data: bytes) -> list[bytes]:
    pieces, data = [data[:_PLAN_BYTES]], data[_PLAN_BYTES:]
    while len(data) >= HEAD.size:
        size = HEAD.size + (HEAD.unpack_from(data)[0] & ((1 << 56) - 1))
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def _repair(stream: bytes) -> bytes:
    """Return the frames with the checksums that they should have."""
    data, at = bytearray(stream), 0
    while len(data) - at >= HEAD.size:
        word, number, received, acquired, length, signal, _, _ = HEAD.unpack_from(data, at)
        end = at + HEAD.size + (word & ((1 << 56) - 1))
        record = bytes(data[at + HEAD.size : at + HEAD.size + length])
        data[at : at + HEAD.size] = head(word, number, received, acquired, length, signal, record)
        bulk_end = end - _SUM_BYTES
        if signal & SUMMED and at + HEAD.size + length < bulk_end <= len(data) - _SUM_BYTES:
            data[bulk_end:end] = _sum(bytes(data[at + HEAD.size + length : bulk_end]))
        at = end
    return bytes(data)


def _sum(data: bytes) -> bytes:
    return checksum(data).to_bytes(_SUM_BYTES, "little")


class _Expected:
    """What a stream of frames says, read as simply as it can be."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes, bytes | None]] = []
        self.confirmed = 0

    def read(self, stream: bytes) -> str:
        """Go through what comes over one connection; returns "fine", "damaged" or "nonsense"."""
        at = 0
        while len(stream) - at >= HEAD.size:
            word, number, received, acquired, length, signal, record_sum, sum_ = HEAD.unpack_from(stream, at)
            if checksum(stream[at : at + HEAD.size - _SUM_BYTES]) != sum_:
                return "damaged"
            size, behind = word & ((1 << 56) - 1), _SUM_BYTES if signal & SUMMED else 0
            at += HEAD.size
            if word >> 56 != FRAME_MAGIC or length > min(size, LARGEST_RECORD) or signal > 3 or (size and not number):
                return "nonsense"
            if behind and size - length <= behind:
                return "nonsense"
            if len(stream) - at < length:
                return "fine"
            if checksum(stream[at : at + length]) != record_sum:
                return "damaged"
            if number > len(self.records) + 1 or received > _SENT or acquired > received:
                return "nonsense"
            self.confirmed = max(self.confirmed, received)
            if len(stream) - at < size:
                return "fine"
            bulk = stream[at + length : at + size - behind]
            if behind and _sum(bulk) != stream[at + size - behind : at + size]:
                return "damaged"
            if number > len(self.records):
                self.records.append((stream[at : at + length], bulk or None))
            at += size
        return "fine"


class _Receiver:
    """A channel that hears frames over one connection after another."""

    def __init__(self) -> None:
        self.inbox = Inbox(bytearray(BELL_BYTES))
        self.reasons: list[str] = []
        self.loop = TcpLoop(self.inbox, lambda source, reason: self.reasons.append(reason))
        self.channel = TcpChannel(self.loop, 0)
        self.records: list[tuple[bytes, bytes | None]] = []
        for _ in range(_SENT):
            self.channel.send(b"sent")

    def hear(self, data: bytes, at_once: int, confirmed: int) -> None:
        here, there = socket.socketpair()
        here.setblocking(False)
        self.channel.attach(here.detach(), confirmed)
        with there:
            for start in range(0, len(data), at_once):
                with contextlib.suppress(BrokenPipeError):
                    there.sendall(data[start : start + at_once])
                self.step()
            there.shutdown(socket.SHUT_WR)
            self.step()

    def step(self) -> None:
        self.loop.step()
        while (record := self.inbox.receive_whole()) is not None:
            self.records.append(record[1:])


def _read_frames(data: bytes) -> None:
    plan, stream = data[:_PLAN_BYTES].ljust(_PLAN_BYTES, b"\0"), data[_PLAN_BYTES:]
    lead = b"".join(frame(number + 1, _LEAD) for number in range(min(plan[0] & ~_REPAIRED, _MOST_LEAD)))
    breaks_after = int.from_bytes(plan[2:], "little")
    parts = [stream[:breaks_after], stream[breaks_after:]]
    if plan[0] & _REPAIRED:
        parts = [_repair(part) for part in parts]
    at_once = max(plan[1], 8) if plan[1] else 1 << 16
    receiver, expected = _Receiver(), _Expected()
    try:
        for part in (lead + parts[0], parts[1]):
            receiver.hear(part, at_once if len(part) <= len(data) else 1 << 16, expected.confirmed)
            what = expected.read(part)
            assert receiver.channel.is_broken, "the end of the connection went unnoticed"
            assert receiver.records == expected.records, "other records than were sent"
            spoilt = receiver.channel.spoilt
            # A claim of more memory than there is may be refused, or waited for in vain.
            known = "memory" in receiver.reasons[-1]
            assert spoilt == (what == "nonsense") or known, "nonsense was taken, or sense was not"
            assert ("damaged" in receiver.reasons[-1]) == (what == "damaged") or known, (
                "damage went unseen, or was none"
            )
            if what != "fine" or spoilt:
                raise ProtocolError(receiver.reasons[-1])
        if not receiver.records:
            raise ProtocolError("none is whole")
    finally:
        receiver.loop.close()


def _plan(lead: int, at_once: int, breaks_after: int) -> bytes:
    return bytes([lead, at_once]) + breaks_after.to_bytes(2, "little")


_CONVERSATION = [
    frame(1, b"record"),
    frame(2, b"with bytes", b"behind it" * 9, received=1, acquired=1),
    frame(0, received=2, acquired=1),
    frame(3, b"x" * 300, b"summed" * 3, received=3, acquired=2, signal=SUMMED),
    frame(4, b"the last", b"bulk", received=3, acquired=3),
    frame(0, received=3, acquired=3, signal=1),
]
_STREAM = b"".join(_CONVERSATION)
_AGAIN = b"".join(itertools.chain(_CONVERSATION[:2], [_CONVERSATION[1]], _CONVERSATION[2:]))

TARGETS = {
    "handshake": Target(
        _read_handshake,
        [*_HEARD.values(), _HEARD[True][: PREFIX.size], _HEARD[False][: PREFIX.size + 64]],
    ),
    "messages": Target(
        _read_messages,
        [_message("hello", {"name": "w0", "deep": [[{"é": [1, 2.5, None, True]}]]}), _message("a", {}) * 3],
        _cut_messages,
    ),
    "visitor": Target(
        _read_visitor,
        [
            _request(SESSION_RESUME),
            _request(SESSION_RESUME, attempt=2**62),
            _message("link-failed", {"record": _HIGHER.to_fields(), "sentence": "it has no memory"}),
        ],
        _cut_messages,
    ),
    "answer": Target(
        _read_answer,
        [_message(sessions.RESUMED, {"received": 0}), _message(sessions.HEARD, {})],
        _cut_messages,
    ),
    "frames": Target(
        _read_frames,
        [
            _plan(0, 0, 0xFFFF) + _STREAM,
            _plan(0, 0, 0xFFFF) + _AGAIN,
            _plan(0, 9, 0xFFFF) + _STREAM,
            _plan(_REPAIRED, 0, 0xFFFF) + _STREAM,
            _plan(_REPAIRED, 0, 70) + _STREAM[:70] + _STREAM,
            _plan(0, 0, 70) + _STREAM[:70] + _STREAM,
            _plan(63, 0, 0xFFFF) + frame(64, b"record", b"bulk" * 99) + frame(65, b"the last"),
        ],
        _cut_frames,
    ),
}
