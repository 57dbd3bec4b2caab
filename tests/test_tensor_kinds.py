"""Tensors that are not plain, arrays and other buffers: what arrives, what is shared there, and where its bytes lie."""

from __future__ import annotations

import array
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import fastref.rpc as rpc
from fastref.rref import current_wiring
from tests import work
from tests.jobs import in_job, job_fixtures
from tests.test_leases import all_leases, leases, wait_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:TypedStorage"),
]

jobs, job = job_fixtures(2)

LEASED_FROM = 131072  # bytes; smaller memory is copied
SIDE = 400  # a square of this side is large enough to be leased, whatever its elements are


class Marked(torch.Tensor):
    """A subclass, as programs define them."""


class Holder:
    """An object that pickles its memory out of band."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: int) -> Any:  # type: ignore[override]
        return Holder, (pickle.PickleBuffer(self.memory),)


def square(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.arange(SIDE * SIDE).reshape(SIDE, SIDE).to(dtype)


def blocks() -> torch.Tensor:
    """Return a square of which a quarter is zero, in blocks."""
    tensor = square() + 1
    tensor[: SIDE // 2, : SIDE // 2] = 0
    return tensor


def noted(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "kept"  # type: ignore[attr-defined]
    return tensor


def per_channel(dtype: torch.dtype) -> torch.Tensor:
    scales = torch.linspace(0.1, 0.4, SIDE, dtype=torch.float64)
    return torch.quantize_per_channel(torch.randn(SIDE, 400), scales, torch.zeros(SIDE, dtype=torch.int64), 0, dtype)


def big(kind: str) -> Any:
    """Make a large value of one kind."""
    return KINDS[kind]()


KINDS: dict[str, Callable[[], Any]] = {
    "wanting a gradient": lambda: square().requires_grad_(),
    "computed with a gradient": lambda: square().requires_grad_() * 2,
    "parameter": lambda: torch.nn.Parameter(square()),
    "frozen parameter": lambda: torch.nn.Parameter(square(), False),
    "parameter with an attribute": lambda: noted(torch.nn.Parameter(square())),
    "bfloat16": lambda: square(torch.bfloat16),
    "float8": lambda: torch.randn(400, 400).to(torch.float8_e5m2),
    "complex32": lambda: torch.complex(square().half(), square().half()),
    "uint64": lambda: square(torch.uint64),
    "two in a byte": lambda: torch.arange(200_000).to(torch.uint8).view(torch.float4_e2m1fn_x2),
    "bits": lambda: torch.arange(200_000).to(torch.uint8).view(torch.bits8),
    "transposed": lambda: square().t(),
    "channels last": lambda: torch.randn(4, 3, 60, 60).to(memory_format=torch.channels_last),
    "narrow gaps": lambda: square()[:, 1:-1],
    "wide gaps": lambda: torch.randn(600, 600)[::2, ::3],
    "wide gaps, transposed": lambda: torch.randn(600, 600)[::2, ::3].t(),
    "flipped": lambda: square().flip(0),
    "expanded": lambda: torch.arange(40_000.0).unsqueeze(1).expand(40_000, 100),
    "overlapping": lambda: torch.arange(50_000.0).as_strided((20_000, 7), (2, 1)),
    "conjugated": lambda: torch.complex(square(), square()).conj(),
    "negative": lambda: torch.complex(square(), square()).conj().imag,
    "coo": lambda: blocks().to_sparse(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor(
        torch.zeros(2, 40_000, dtype=torch.int64), torch.ones(40_000)
    ),
    "coo, hybrid": lambda: torch.sparse_coo_tensor([[0, 5]], torch.randn(2, 40_000), (7, 40_000)),
    "coo, wanting a gradient": lambda: blocks().to_sparse().requires_grad_(),
    "csr": lambda: blocks().to_sparse_csr(),
    "csr, wanting a gradient": lambda: blocks().to_sparse_csr().requires_grad_(),
    "csc": lambda: blocks().to_sparse_csc(),
    "bsr": lambda: blocks().to_sparse_bsr((10, 10)),
    "bsc": lambda: blocks().to_sparse_bsc((10, 10)),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(400, 400), 0.1, 3, torch.qint8),
    "quantized, transposed": lambda: torch.quantize_per_tensor(torch.randn(400, 400), 0.1, 3, torch.quint8).t(),
    "quantized, qint32": lambda: torch.quantize_per_tensor(torch.randn(400, 400), 0.1, 3, torch.qint32),
    "quantized per channel": lambda: per_channel(torch.qint8),
    "subclass": lambda: square().as_subclass(Marked),
    "subclass with an attribute": lambda: noted(square().as_subclass(Marked)),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(20_000), torch.randn(30_000)], layout=torch.jagged),
    "storage": lambda: square().untyped_storage(),
    "typed storage": lambda: square().storage(),
    "array": lambda: square().numpy(),
    "array in Fortran's order": lambda: numpy.asfortranarray(square().numpy()),
    "array with gaps": lambda: square().numpy()[::2, ::2],
    "array backwards": lambda: square().numpy()[::-1],
    "structured array": lambda: numpy.ones(30_000, dtype=[("a", "i4"), ("b", "f8")]),
    "array of the other byte order": lambda: numpy.arange(60_000, dtype=">i4"),
    "buffer of an object": lambda: Holder(bytearray(os.urandom(200_000))),
}


def inner(value: Any) -> list[torch.Tensor]:
    """Return the dense tensors that a tensor is made of."""
    if value.layout is torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [value.values()] if value.layout is torch.jagged else [value]


def addresses(value: Any) -> list[int]:
    """Return where the large memories of a value begin."""
    if isinstance(value, numpy.ndarray):
        return [value.ctypes.data]
    if isinstance(value, Holder):
        return [numpy.frombuffer(value.memory, dtype=numpy.uint8).ctypes.data]
    if isinstance(value, torch.Tensor):
        return [part.data_ptr() for part in inner(value.detach()) if part.untyped_storage().nbytes() >= LEASED_FROM]
    return [value.data_ptr()]


def in_the_arena_of(value: Any) -> bool:
    """Tell whether all large memory of a value is a peer's, mapped here."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:fastref-arena" in line:
            start, end = line.split()[0].split("-")
            spans.append((int(start, 16), int(end, 16)))
    found = addresses(value)
    return bool(found) and all(any(start <= address < end for start, end in spans) for address in found)


def bits(value: Any) -> Any:
    """Return what has to be equal, bit by bit."""
    if isinstance(value, Holder):
        return bytes(value.memory)
    if isinstance(value, numpy.ndarray):
        return value.dtype.descr, value.shape, value.tobytes()
    if not isinstance(value, torch.Tensor):
        return type(value), bytes(value.untyped() if hasattr(value, "untyped") else value)
    about: list[Any] = [type(value), value.dtype, value.layout, value.requires_grad, getattr(value, "note", None)]
    value = value.detach()
    if value.layout is not torch.jagged:
        about.append(tuple(value.shape))
    if value.is_quantized:
        about.append(value.qscheme())
        if value.qscheme() == torch.per_channel_affine:
            about += [value.q_per_channel_axis(), value.q_per_channel_scales().tolist()]
        else:
            about += [value.q_scale(), value.q_zero_point()]
    if value.layout is torch.sparse_coo:
        about.append(value.is_coalesced())
    for part in inner(value):
        about += [part.is_conj(), part.is_neg()]
        plain = part.as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        plain = plain.int_repr() if plain.is_quantized else plain
        about.append(plain.contiguous().view(torch.uint8).numpy().tobytes())
    return about


def look(value: Any) -> tuple[int, bool, Any]:
    return leases("w0"), in_the_arena_of(value), bits(value)


@pytest.mark.parametrize("kind", KINDS)
@in_job
def test_a_large_value_of_any_kind_arrives_and_lies_in_the_senders_memory(kind: str) -> None:
    value = big(kind)
    expected = bits(value)
    shares = not work.figures("peers", "w1")["far"]
    assert rpc.rpc_sync("w1", look, (value,)) == (int(shares), shares, expected)
    wait_for(lambda: rpc.rpc_sync("w1", leases, ("w0",)) == 0)
    torch.manual_seed(0)
    for number, get in enumerate(
        (
            lambda: rpc.rpc_sync("w1", work.echo, (value,)),
            lambda: rpc.rpc_async("w1", work.echo, ([{"a": value}],)).wait()[0]["a"],
            lambda: rpc.remote("w1", work.echo, (value,)).to_here(),
        )
    ):
        answer = get()
        assert bits(answer) == expected
        assert all_leases() == int(shares), number
        assert in_the_arena_of(answer) == shares
        del answer
        wait_for(lambda: all_leases() == 0)
    assert bits(value) == expected


# What torch's own RPC keeps of small tensors; each figure was seen there.
SMALL: dict[str, tuple[Callable[[], torch.Tensor], dict[str, Any]]] = {
    "transposed": (lambda: torch.arange(6.0).reshape(2, 3).t(), {"stride": (1, 3)}),
    "gaps": (lambda: torch.arange(1000.0)[::2], {"stride": (2,)}),
    "expanded": (lambda: torch.arange(3.0).reshape(3, 1).expand(3, 1000), {"stride": (1, 0)}),
    "expanded parameter": (lambda: torch.nn.Parameter(torch.randn(1).expand(5)), {"stride": (0,)}),
    "overlapping": (lambda: torch.arange(11.0).as_strided((5, 4), (1, 2)), {"stride": (1, 2)}),
    "channels last": (
        lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        {"stride": (192, 1, 24, 3)},
    ),
    "wide gaps": (lambda: torch.arange(100_000.0)[::4], {"stride": (1,)}),
    "conjugated": (lambda: torch.randn(3, dtype=torch.complex64).conj(), {"is_conj": True}),
    "negative": (lambda: torch.randn(3, dtype=torch.complex64).conj().imag, {"is_neg": True, "stride": (2,)}),
    "computed": (lambda: torch.ones(3, requires_grad=True) * 2, {"is_leaf": True, "requires_grad": True}),
    "with a gradient": (lambda: with_gradient(), {"grad": None}),
    "with an attribute": (lambda: noted(torch.ones(3)), {"note": None}),
    "parameter with an attribute": (lambda: noted(torch.nn.Parameter(torch.ones(3))), {"note": "kept"}),
    "subclass with an attribute": (lambda: noted(torch.ones(3).as_subclass(Marked)), {"note": "kept"}),
    "of 4 bits": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.uint4), {"dtype": torch.uint4}),
    "of 1 bit": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.uint1), {"dtype": torch.uint1}),
    "meta": (lambda: torch.empty(3, 4, device="meta"), {"is_meta": True, "stride": (4, 1)}),
}


def with_gradient() -> torch.Tensor:
    tensor = torch.ones(3, requires_grad=True)
    tensor.sum().backward()
    return tensor


def features(tensor: torch.Tensor, names: list[str]) -> dict[str, Any]:
    found = {name: getattr(tensor, name, None) for name in names}
    return {name: value() if callable(value) else value for name, value in found.items()}


@pytest.mark.parametrize("kind", SMALL)
@in_job
def test_of_a_small_tensor_arrives_what_torchs_rpc_keeps(kind: str) -> None:
    make, expected = SMALL[kind]
    tensor = make()
    assert rpc.rpc_sync("w1", features, (tensor, list(expected))) == expected
    assert rpc.rpc_sync("w1", features, args=(tensor,), kwargs={"names": list(expected)}) == expected
    answer = rpc.rpc_sync("w1", work.echo, ([tensor],))[0]
    assert features(answer, list(expected)) == expected
    assert type(answer) is type(tensor)
    if not tensor.is_meta and tensor.dtype not in (torch.uint4, torch.uint1):
        assert torch.equal(answer, tensor)


# ---- memory that tensors of one message share


def set_first(values: list[Any], to: float) -> list[list[float]]:
    """Write the first element of the first, and return the beginning of all."""
    with torch.no_grad():
        values[0].view(-1)[0] = to
    return [value.reshape(-1)[:3].tolist() for value in values]


@pytest.mark.parametrize("size", [1000, 100_000])
@in_job
def test_views_of_one_memory_share_it_after_the_journey_too(size: int) -> None:
    whole = torch.zeros(size)
    for values in (
        [whole, whole[:size], whole.reshape(10, -1), whole.view(torch.int32)],
        [whole, whole.detach(), torch.nn.Parameter(whole)],
        [whole, whole.as_subclass(Marked)],
        [whole, whole.reshape(10, -1).t()],
    ):
        seen = rpc.rpc_sync("w1", set_first, (values, 7.0))
        assert all(first[0] in (7.0, 7 + 0x40DFFFF9) for first in seen), seen
        assert not whole.any()
        mine = rpc.rpc_sync("w1", work.echo, (values,))
        assert len({value.untyped_storage().data_ptr() for value in mine}) == 1


@in_job
def test_views_that_do_not_overlap_are_each_their_own() -> None:
    pieces = list(torch.arange(1000.0).chunk(10))
    answer = rpc.rpc_sync("w1", work.echo, (pieces,))
    answer[0].fill_(-1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(pieces[1:], answer[1:], strict=True))


@in_job
def test_little_pieces_of_a_large_tensor_do_not_bring_it_along() -> None:
    whole = torch.arange(1_000_000.0)
    for value in ([whole[:10], whole[5:15]], [whole[:10].as_strided((5,), (1,)), whole[3:4]]):
        answer = rpc.rpc_sync("w1", work.echo, (value,))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(value, answer, strict=True))
        assert all(piece.untyped_storage().nbytes() < 8192 for piece in answer)


@pytest.mark.shared_memory("a lease is memory of another worker")
@in_job
def test_tied_weights_of_a_module_stay_tied() -> None:
    first, second = torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)
    second.weight = first.weight
    module = torch.nn.Sequential(first, second)
    module.register_buffer("steps", torch.tensor(3))
    copy = rpc.rpc_sync("w1", work.echo, (module,))
    assert copy[0].weight is copy[1].weight
    assert copy.steps == 3
    assert torch.equal(copy[0].weight, first.weight)
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert leases("w1") == 1


# ---- other buffers


@in_job
def test_other_buffers_travel() -> None:
    for size in (10, 100_000):
        data = os.urandom(size)
        for value in (bytearray(data), array.array("B", data), data):
            answer = rpc.rpc_sync("w1", work.echo, (value,))
            assert type(answer) is type(value)
            assert answer == value
        held = rpc.rpc_sync("w1", work.echo, (Holder(bytearray(data)),))
        assert bytes(held.memory) == data
        held.memory[:] = bytes(size)  # it can be written to
        with pytest.raises(TypeError, match="memoryview"):
            rpc.rpc_sync("w1", work.echo, (memoryview(data),))
    grows = bytearray(100_000)
    future = rpc.rpc_async("w1", len, (grows,))
    grows.append(1)  # it is not held on to
    assert future.wait() == 100_000


@pytest.mark.shared_memory("a lease is memory of another worker")
@in_job
def test_an_array_of_objects_travels_with_what_is_in_it() -> None:
    values = numpy.empty(3, dtype=object)
    values[:] = [torch.ones(50_000), None, "x"]
    answer = rpc.rpc_sync("w1", work.echo, (values[::2],))
    assert torch.equal(answer[0], values[0])
    assert answer[1] == "x"
    assert leases("w1") == 1


# ---- memory that is copied into


def write_all(tensor: torch.Tensor) -> float:
    tensor.add_(1)
    return float(tensor.sum())


@in_job
def test_what_is_copied_for_a_writer_takes_memory_that_is_warm() -> None:
    assert rpc.rpc_sync("w1", warm_pieces) is not None
    for make in (torch.zeros, numpy.zeros):
        before = rpc.rpc_sync("w1", warm_pieces)
        for _ in range(30):
            assert rpc.rpc_sync("w1", work.call, (fill_and_sum, make(100_000), 2)) == 200_000
        assert rpc.rpc_sync("w1", warm_pieces) >= before + 10


def fill_and_sum(values: Any, number: float) -> float:
    values[...] = number
    return float(values.sum())


def warm_pieces() -> int:
    return current_wiring().snapshot()["warm"]["warm"]


@in_job
def test_warm_memory_goes_back_when_nobody_wants_it() -> None:
    rpc.rpc_sync("w1", work.call, (fill_and_sum, torch.zeros(100_000), 2))
    wait_for(lambda: current_wiring().snapshot()["warm"]["kept"] == 0)
    wait_for(lambda: rpc.rpc_sync("w1", kept_warm) == 0)


def kept_warm() -> int:
    return current_wiring().snapshot()["warm"]["kept"]
