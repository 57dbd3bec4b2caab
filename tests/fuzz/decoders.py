"""The decoders of what a peer can write, with valid input to begin from and the one error that they may raise.

Those of what comes over a network are in ``network.py``. The ring is fed in C: ``tests/c/ring_garbage.c``. Pickles are
not here: a peer that may send one may run code anyway.
"""

from __future__ import annotations

import struct
from collections import OrderedDict

import torch

from fastref._core import ForkData, GloballyUniqueId
from fastref.codec import plain
from fastref.codec.failures import decode_plain_failure, encode_plain_failure
from fastref.codec.stream import decode, encode
from fastref.errors import ProtocolError, RemoteError, StrictModeError, WorkerDied
from fastref.options import WorkerInfo
from fastref.wire.frame import describe
from fastref.wire.kinds import Kind
from tests.fuzz import network
from tests.fuzz.fuzzer import Target

__all__ = ["TARGETS"]


def _fork(type_str: str = "PyObject", entry: tuple | None = (1, 2)) -> bytes:
    return ForkData(1, GloballyUniqueId(2, 3), GloballyUniqueId(4, 5), 6, type_str, entry).pack()


def _frame(kind: int, flags: int, forks: list[bytes], payload: bytes) -> bytes:
    packed = b"".join(forks)
    return (
        struct.pack("=HHHHQqIIII", kind, flags, len(forks), 0, 7, 0, 0, len(payload), len(packed), 0) + packed + payload
    )


def _read_stream(data: bytes) -> None:
    value = decode(data, ["one", "two"])
    again = encode(value)
    if again is not None:
        decode(again)


def _read_plain(data: bytes) -> None:
    value = plain.decode(data, ["one", "two"])
    try:
        again = plain.encode(value)
    except StrictModeError:  # text in the place of a reference, or an OrderedDict too deep for its attribute
        return
    plain.decode(again)


def _read_failure(data: bytes) -> None:
    error = decode_plain_failure(data)
    if type(error) is StrictModeError:
        raise ProtocolError("how it refuses what is none")
    if not isinstance(error, RemoteError):
        raise AssertionError("an exception that no call raises")


def _read_fork(data: bytes) -> None:
    fork = ForkData.unpack(data)
    if ForkData.unpack(fork.pack()) != fork:
        raise AssertionError("fork data that changes when it is packed again")


def _read_frame(data: bytes) -> None:
    if len(describe(data)["payload"]) > len(data):
        raise AssertionError("a payload longer than its frame")


_VALUES = [
    None,
    True,
    [1, 2.5, "text", b"bytes", (None, {"k": -1})],
    {"a": {"b": [(), [], {}]}},
    torch.arange(3),
    torch.zeros(0, 4),
    [torch.ones(2, 2), "between", torch.zeros(600, dtype=torch.float64)],
    torch.tensor([1 + 2j, 3]),
    torch.tensor(True),
    tuple(range(40)),
]
_SHARED = [1]
_PLAIN = [
    *_VALUES, 1 << 100, 2j, "\ud800", {1, (2, 3)}, frozenset({"a"}), OrderedDict(a=1), torch.Size([1, 2]), torch.int8,
    torch.device("cpu"), WorkerInfo("w", 1), [_SHARED, {"k": _SHARED}], torch.nn.Linear(1, 1).state_dict(), "x" * 4097,
]  # fmt: skip
_FAILURES = [
    ValueError("a", 1),
    OSError(2, "gone", "here"),
    WorkerDied("w", 1, 2),
    UnicodeDecodeError("a", b"", 0, 1, ""),
]

TARGETS = {
    "plain": Target(_read_plain, [*map(plain.encode, _PLAIN), b"t\2\0\0\0R\0\0\0\0m\0\0\0\0"]),
    "failure": Target(_read_failure, [encode_plain_failure(error, "w1") for error in _FAILURES]),
    "frame": Target(
        _read_frame,
        [_frame(kind, 0, [], b"payload") for kind in Kind]
        + [_frame(1, 2, [_fork(), _fork("Tensor", None)], bytes(24)), _frame(2, 5, [_fork("x" * 50)] * 5, b"")],
    ),
    "fork": Target(_read_fork, [_fork(), _fork("Tensor"), _fork("é" * 20, None)]),
    "stream": Target(
        _read_stream, [data for data in map(encode, _VALUES) if data] + [b"t\2\0\0\0R\0\0\0\0R\1\0\0\0", b"R\1\0\0\0"]
    ),
    **network.TARGETS,
}
