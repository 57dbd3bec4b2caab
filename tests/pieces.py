"""What goes over a connection between two hosts, piece by piece, and what may be done with a piece on its way.

A piece is a message of the handshake, a JSON message behind its length, or a frame; where TLS hides all of that, it is
what came at once. A script gets each piece before it
goes on and returns steps; the functions at the end of this file return the usual ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastref.channels.sending import checksum

__all__ = [
    "ASKER",
    "DIRECTIONS",
    "FRAME_MAGIC",
    "HEAD",
    "LISTENER",
    "Cut",
    "Flow",
    "Gather",
    "HalfClose",
    "Piece",
    "Reader",
    "Script",
    "SUMMED",
    "Stall",
    "Step",
    "Write",
    "as_it_is",
    "corrupted",
    "cut_after",
    "frame",
    "half_closed_after",
    "head",
    "one_by_one",
    "stalled_after",
]

Direction = Literal["asker", "listener"]
# Directions are named by who speaks.
ASKER: Direction = "asker"
LISTENER: Direction = "listener"
DIRECTIONS = (ASKER, LISTENER)

# Size with the magic in its top byte, number, highest number received, highest whose references were taken, bytes of
# the record (what is left of the size is its bulk), signal, checksum of the record, checksum of the head before it.
HEAD = struct.Struct("<QQQQIIII")
FRAME_MAGIC = 0xFA
SUMMED = 2  # a signal: behind the bulk comes its checksum
_SUM = struct.Struct("<I")
_SIZE_BITS = 56
_LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 64 << 10
_MOST_AT_ONCE = 64 << 10
# What the listener says last before both sides go over to frames.
FRAMES_AFTER = ("link-welcome", "session-resumed")


def head(word: int, number: int, received: int, acquired: int, length: int, signal: int, record: bytes = b"") -> bytes:
    """Return a head of a frame that says this, with the checksums that make it an intact one."""
    said = HEAD.pack(word, number, received, acquired, length, signal, checksum(record), 0)[: -_SUM.size]
    return said + _SUM.pack(checksum(said))


def frame(
    number: int, record: bytes = b"", bulk: bytes = b"", received: int = 0, acquired: int = 0, signal: int = 0
) -> bytes:
    """Return a frame. With the signal ``SUMMED`` the bulk's checksum follows it."""
    behind = bulk + (_SUM.pack(checksum(bulk)) if signal & SUMMED else b"")
    word = FRAME_MAGIC << _SIZE_BITS | len(record) + len(behind)
    return head(word, number, received, acquired, len(record), signal, record) + record + behind


@dataclasses.dataclass
class Flow:
    """One connection through the proxy, as far as it has gone.

    Parameters
    ----------
    index : int
        How many connections came before it.
    messages : list of dict
        The JSON messages of both sides, in the order in which they came.
    framed : bool
        Whether the time of frames has begun.
    """

    index: int
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    framed: bool = False

    @property
    def resumes(self) -> bool:
        """Whether it goes on with a session that an earlier one began."""
        return any(message.get("kind") == "session-resumed" for message in self.messages)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece.

    Parameters
    ----------
    kind : str
        "handshake", "message", "frame", "secret": of TLS, or "rest": less than a piece, at the end of a connection.
    direction : str
        Who sent it.
    flow : Flow
    position : int
        How many pieces of the same kind came before it in this direction of this connection.
    data : bytes
        All of it; of a frame the head too.
    message : dict, optional
        What a message says.
    """

    kind: str
    direction: Direction
    flow: Flow
    position: int
    data: bytes
    message: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of a frame: bytes of its record and its bulk."""
        return len(self.data) - HEAD.size

    @property
    def number(self) -> int:
        """Of a frame; 0: it has no record."""
        return HEAD.unpack_from(self.data)[1] if self.kind == "frame" else 0

    @property
    def signal(self) -> int:
        """Of a frame: what it says beside its record."""
        return HEAD.unpack_from(self.data)[5] if self.kind == "frame" else 0

    @property
    def received(self) -> int:
        """Of a frame: the highest number that its sender has received."""
        return HEAD.unpack_from(self.data)[2] if self.kind == "frame" else 0


class Reader:
    """Find where the pieces of one direction end.

    Parameters
    ----------
    stream : asyncio.StreamReader
    direction : str
    flow : Flow
        Shared by the directions of a connection: the listener's welcome begins the time of frames for both.
    handshake : sequence of int, optional
        Sizes in bytes of what this side says in the handshake; None: it speaks TLS.
    """

    def __init__(
        self, stream: asyncio.StreamReader, direction: Direction, flow: Flow, handshake: Sequence[int] | None
    ) -> None:
        self._stream, self._direction, self._flow = stream, direction, flow
        self._is_secret = handshake is None
        self._handshake = list(handshake or ())
        self._counts = {"handshake": 0, "message": 0, "frame": 0, "secret": 0, "rest": 0}
        self._parts: list[bytes] = []
        self._reading: asyncio.Future[Piece | None] | None = None

    async def next(self) -> Piece | None:
        """Return the next piece; None at the end. When cancelled, nothing is lost: the next call returns it.

        Raises
        ------
        ValueError
            It is none.
        """
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read_or_end())
        await asyncio.wait([self._reading])
        read, self._reading = self._reading, None
        return read.result()

    async def _read_or_end(self) -> Piece | None:
        self._parts = []
        try:
            return await self._read()
        except asyncio.IncompleteReadError as error:
            data = b"".join([*self._parts, error.partial])
            return self._piece("rest", data) if data else None

    async def _read(self) -> Piece:
        if self._is_secret:
            if data := await self._stream.read(_MOST_AT_ONCE):
                return self._piece("secret", data)
            raise asyncio.IncompleteReadError(b"", 1)
        if self._handshake:
            data = await self._take(self._handshake[0])
            del self._handshake[0]
            return self._piece("handshake", data)
        # An asker waits for the welcome; only when its next byte is here is it known what that begins.
        await self._take(1)
        if self._flow.framed:
            await self._take(HEAD.size - 1)
            size = HEAD.unpack(b"".join(self._parts))[0]
            if size >> _SIZE_BITS != FRAME_MAGIC:
                raise ValueError(f"{self._direction}: a frame whose size is {size:#018x}")
            await self._take(size & (1 << _SIZE_BITS) - 1)
            return self._piece("frame", b"".join(self._parts))
        await self._take(_LENGTH_BYTES - 1)
        length = int.from_bytes(b"".join(self._parts), "big")
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"{self._direction}: a message of {length} bytes")
        message = json.loads(await self._take(length))
        self._flow.messages.append(message)
        if self._direction == LISTENER and message.get("kind") in FRAMES_AFTER:
            self._flow.framed = True
        return self._piece("message", b"".join(self._parts), message)

    async def _take(self, count: int) -> bytes:
        data = await self._stream.readexactly(count)
        self._parts.append(data)
        return data

    def _piece(self, kind: str, data: bytes, message: dict[str, Any] | None = None) -> Piece:
        position = self._counts[kind]
        self._counts[kind] += 1
        return Piece(kind, self._direction, self._flow, position, data, message or {})


# ---- steps: what is done in place of handing a piece on as it is


@dataclasses.dataclass(frozen=True)
class Write:
    """Send bytes on; ``singly``: each by a write of its own."""

    data: bytes
    singly: bool = False


@dataclasses.dataclass(frozen=True)
class Cut:
    """End the connection towards one side or both; a side that is not told finds silence from then on.

    With ``reset`` they see a connection reset, otherwise an end.
    """

    towards: tuple[Direction, ...] = DIRECTIONS
    reset: bool = False


@dataclasses.dataclass(frozen=True)
class Stall:
    """Let nothing on in this direction, for a while or until the proxy is told to ``go_on``."""

    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class HalfClose:
    """Tell the receiver that nothing more comes; what still comes is dropped, the other direction goes on."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Keep this piece until there are ``count``, or for ``seconds``; send them by one write, arranged anew."""

    count: int
    seconds: float = 1.0
    arranged: Callable[[list[Piece]], Sequence[Piece]] = list


Step = Write | Cut | Stall | HalfClose | Gather
Script = Callable[[Piece], Sequence[Step]]


def as_it_is(piece: Piece) -> list[Step]:
    """Hand it on."""
    return [Write(piece.data)]


def cut_after(piece: Piece, count: int, towards: tuple[Direction, ...] = DIRECTIONS, reset: bool = False) -> list[Step]:
    """Hand ``count`` bytes of it on and end the connection."""
    return [Write(piece.data[:count]), Cut(towards, reset)]


def stalled_after(piece: Piece, count: int, seconds: float | None = None) -> list[Step]:
    """Hand ``count`` bytes of it on, and the rest after a while."""
    return [Write(piece.data[:count]), Stall(seconds), Write(piece.data[count:])]


def half_closed_after(piece: Piece, count: int) -> list[Step]:
    """Hand ``count`` bytes of it on and say that this was all."""
    return [Write(piece.data[:count]), HalfClose()]


def corrupted(piece: Piece, at: int, mask: int = 0xFF) -> list[Step]:
    """Hand it on with some bits of the byte ``at`` flipped; a frame's record begins at ``HEAD.size``."""
    data = bytearray(piece.data)
    data[at] ^= mask
    return [Write(bytes(data))]


def one_by_one(piece: Piece) -> list[Step]:
    """Hand it on in writes of one byte."""
    return [Write(piece.data, singly=True)]
