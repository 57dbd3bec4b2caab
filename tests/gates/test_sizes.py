"""Any size, from nothing to beyond 4 GiB, on every way that a value takes. Needs about 14 GiB of memory."""

from __future__ import annotations

import pytest
import torch

import fastref.rpc as rpc
from tests import puppets
from tests.gates.figures import tell
from tests.puppets import Troupe, troupe_fixture  # noqa: F401

pytestmark = [pytest.mark.gates, pytest.mark.timeout(1800)]

SIZES = {"tensor": [0, 1, 2**31 - 1, 2**31, 2**32 + 1], "bytes": [0, 1, 2**31 - 1, 2**31]}


def ends(value: torch.Tensor | bytes) -> tuple[int, list[int]]:
    """Return the size, and a few of the bytes, the first and the last among them."""
    size = value.numel() if isinstance(value, torch.Tensor) else len(value)
    return size, [int(value[place]) for place in (0, size // 3, size - 1) if 0 <= place < size]


def make_tensor(size: int) -> torch.Tensor:
    tensor = torch.zeros(size, dtype=torch.int8)
    if size:
        tensor[0], tensor[size // 3], tensor[-1] = 1, 2, 3
    return tensor


def make_bytes(size: int) -> bytes:
    data = bytearray(size)
    if size:
        data[0], data[size // 3], data[-1] = 1, 2, 3
    return bytes(data)


def send(to: str, kind: str, size: int) -> None:
    value = (make_tensor if kind == "tensor" else make_bytes)(size)
    expected = ends(value)
    assert rpc.rpc_sync(to, ends, (value,), timeout=600) == expected
    assert rpc.rpc_async(to, ends, (value,), timeout=600).wait() == expected
    del value
    made = rpc.rpc_sync(to, make_tensor if kind == "tensor" else make_bytes, (size,), timeout=600)
    assert ends(made) == expected
    del made
    rref = rpc.remote(to, make_tensor if kind == "tensor" else make_bytes, (size,), timeout=600)
    for _ in range(2):
        assert ends(rref.to_here(timeout=600)) == expected


@pytest.mark.parametrize("kind", SIZES)
def test_values_of_any_size_arrive(troupe: Troupe, kind: str) -> None:
    one, other = troupe.start(2, arena_limit=9 << 30)
    for size in SIZES[kind]:
        one.do(send, other.name, kind, size, patience_s=900)
        tell("sent, returned and fetched twice", kind=kind, bytes=size)
    one.do(puppets.wait_until_entries, 0)
