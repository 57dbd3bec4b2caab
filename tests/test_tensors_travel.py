"""Tensors and arrays in calls and references: every kind arrives as it was, and as a copy."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import fastref.rpc as rpc
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(2, [{}, {"transport": "tcp"}])

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
# On both sides of what is copied into the stream, sent in a slot, in a ring, or in a block of shared memory.
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (3, 4), (2, 1, 3, 1), (100,), (600,), (33, 33), (70_001,)]


def round_trips(value: Any) -> list[Any]:
    """Send a value there and back by every way."""
    found = []
    for to in ("w1", "w0"):
        found.append(rpc.rpc_sync(to, work.echo, args=(value,)))
        found.append(rpc.rpc_async(to, work.echo, args=([value],)).wait()[0])
        found.append(rpc.rpc_sync(to, work.gather, kwargs={"a": {"b": (value, "c")}})[1]["a"]["b"][0])
        found.append(rpc.remote(to, work.echo, args=(value,)).to_here())
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two dense tensors have one dtype, one shape and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape or a.requires_grad != b.requires_grad:
        return False
    return a.resolve_conj().resolve_neg().tolist() == b.resolve_conj().resolve_neg().tolist()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of small whole numbers, which every dtype can tell apart."""
    numbers = torch.randint(0, 2 if dtype == torch.bool else 8, shape)
    return torch.complex(numbers.double(), numbers.double() + 1).to(dtype) if dtype.is_complex else numbers.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_job
def test_a_tensor_of_any_dtype_and_shape_arrives_as_it_was(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = random_tensor(shape, dtype)
        for answer in round_trips(tensor):
            assert type(answer) is torch.Tensor
            assert same(answer, tensor), (shape, dtype)


def big() -> torch.Tensor:
    return torch.arange(60_000.0).reshape(200, 300)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: big().t(),
    "small, transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "every second": lambda: big()[::2, 1::3],
    "a column": lambda: big()[:, 5],
    "a slice": lambda: big()[50:60],
    "one element of many": lambda: torch.arange(8.0)[::8],
    "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 1000),
    "expanded scalar": lambda: torch.tensor(5.0).expand(50, 50),
    "permuted": lambda: torch.randn(4, 5, 6, 7).permute(3, 1, 0, 2),
    "channels last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "overlapping": lambda: torch.arange(11.0).as_strided((5, 4), (1, 2)),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "conjugated, large": lambda: torch.randn(3000, dtype=torch.complex64).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "real part": lambda: torch.randn(3000, dtype=torch.complex64).real,
    "viewed as another dtype": lambda: torch.arange(8.0).view(torch.int32),
}


@pytest.mark.parametrize("view", VIEWS)
@in_job
def test_a_view_travels_as_its_own_elements(view: str) -> None:
    tensor = VIEWS[view]()
    for answer in round_trips(tensor):
        assert same(answer, tensor)
        # Small gaps between the elements go with them, and narrow ones; of what lies far apart the elements alone go.
        assert answer.untyped_storage().nbytes() <= max(tensor.numel() * tensor.element_size() * 2, 16384)


@in_job
def test_what_is_not_a_number_and_signed_zeros_keep_their_bits() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    for answer in round_trips(tensor):
        assert answer.view(torch.int32).tolist() == tensor.view(torch.int32).tolist()


@in_job
def test_tensors_and_parameters_that_want_gradients_do_so_afterwards() -> None:
    for size in (3, 5000):
        tensor = torch.ones(size, requires_grad=True)
        for answer in round_trips(tensor):
            assert same(answer, tensor)
            assert type(answer) is torch.Tensor
        for parameter in (
            torch.nn.Parameter(torch.ones(size)),
            torch.nn.Parameter(torch.ones(size), requires_grad=False),
        ):
            for answer in round_trips(parameter):
                assert type(answer) is torch.nn.Parameter
                assert same(answer, parameter)


@in_job
def test_sparse_tensors_arrive_as_they_were() -> None:
    dense = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    for tensor in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), torch.eye(300).to_sparse()):
        for answer in round_trips(tensor):
            assert answer.layout == tensor.layout
            assert torch.equal(answer.to_dense(), tensor.to_dense())
    uncoalesced = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2))
    for answer in round_trips(uncoalesced):
        assert not answer.is_coalesced()
        assert answer._nnz() == 2


@in_job
def test_quantized_tensors_arrive_as_they_were() -> None:
    tensors = [
        torch.quantize_per_tensor(torch.randn(5, 100), 0.1, 3, torch.qint8),
        torch.quantize_per_channel(torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8),
    ]
    for tensor in tensors:
        for answer in round_trips(tensor):
            assert answer.dtype == tensor.dtype
            assert answer.qscheme() == tensor.qscheme()
            assert torch.equal(answer.int_repr(), tensor.int_repr())
            assert torch.equal(answer.dequantize(), tensor.dequantize())


@in_job
def test_tensors_travel_inside_containers_and_modules() -> None:
    small, large = torch.arange(3.0), torch.arange(5000)
    Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024
    for value in ([small, large], (large, [small]), {"a": small, 5: [large]}, work.Box([small, large])):
        answer = rpc.rpc_sync("w1", work.echo, args=(value,))
        assert type(answer) is type(value)
    answer = rpc.rpc_sync("w1", work.echo, args=(Pair(small, {"x": large}),))
    assert same(answer.left, small)
    assert same(answer.right["x"], large)
    many = [torch.full((number % 50,), number) for number in range(500)]
    for mine, theirs in zip(many, rpc.rpc_sync("w1", work.echo, args=(many,)), strict=True):
        assert same(mine, theirs)
    module = torch.nn.Sequential(torch.nn.Linear(50, 60), torch.nn.Linear(60, 2))
    copy = rpc.rpc_sync("w1", work.echo, args=(module,))
    assert all(map(same, module.parameters(), copy.parameters()))
    state = rpc.rpc_sync("w1", work.echo, args=(module.state_dict(),))
    assert all(same(state[key], value) for key, value in module.state_dict().items())


@in_job
def test_one_tensor_met_twice_arrives_as_one() -> None:
    for size in (3, 5000):
        tensor = torch.ones(size)
        first, second = rpc.rpc_sync("w1", work.echo, args=((tensor, tensor),))
        assert first is second
        other, again = rpc.rpc_sync("w1", work.echo, args=([tensor, tensor.clone()],))
        assert other.data_ptr() != again.data_ptr()
        assert rpc.rpc_sync("w1", work.same_memory, args=(tensor, tensor)) is True
        assert rpc.rpc_sync("w1", work.same_memory, args=(tensor, torch.ones(size))) is False


@in_job
def test_arrays_travel() -> None:
    structured = numpy.zeros(3, dtype=[("a", "i4"), ("b", "f8")])
    arrays = [
        *(
            numpy.arange(5),
            numpy.arange(100_000.0),
            numpy.zeros((0, 3)),
            numpy.array(5),
            numpy.arange(12).reshape(3, 4).T,
        ),
        *(numpy.array(["a", "bc"]), numpy.array([1, None], dtype=object), structured, numpy.arange(3) == 1),
        *(numpy.asfortranarray(numpy.random.rand(300, 20)), numpy.arange(10)[::2], numpy.arange(3, dtype=">i4")),
    ]
    for array in arrays:
        for answer in round_trips(array):
            assert answer.dtype == array.dtype
            assert answer.shape == array.shape
            assert answer.tolist() == array.tolist()
            if array.dtype != object:
                answer[...] = array[...]  # it can be written to
    scalar = rpc.rpc_sync("w1", work.echo, args=(numpy.float32(1.5),))
    assert type(scalar) is numpy.float32


@in_job
def test_64_mebibytes_travel() -> None:
    tensor = torch.arange(1 << 23, dtype=torch.int64)
    answer = rpc.rpc_sync("w1", work.echo, args=(tensor,))
    assert torch.equal(answer, tensor)
    del answer
    rref = rpc.remote("w1", torch.arange, args=(1 << 23,))
    assert torch.equal(rref.to_here(), tensor)
    assert rpc.rpc_sync("w1", work.checksum, args=(tensor,)) == int(tensor.sum())


# ---- copies


@pytest.mark.parametrize("size", [3, 1000, 100_000])
@pytest.mark.parametrize("to", ["w1", "w0"])
@in_job
def test_what_the_callee_changes_stays_there(to: str, size: int) -> None:
    for tensor in (torch.zeros(size), torch.zeros(size)[::2], torch.zeros(2, size).t(), numpy.zeros(size)):
        rpc.rpc_sync(to, work.keep_and_fill, args=(tensor, 5))
        assert not tensor.any()
        assert rpc.rpc_sync(to, work.drop) == 1


@pytest.mark.parametrize("size", [3, 1000, 100_000])
@in_job
def test_what_the_caller_changes_stays_here(size: int) -> None:
    tensor = torch.zeros(size)
    for to in ("w1", "w0"):
        rpc.rpc_sync(to, work.keep, args=(tensor,))
        future = rpc.rpc_async(to, work.checksum, args=(tensor,))
        tensor.fill_(1)
        assert future.wait() == 0
        assert rpc.rpc_sync(to, work.checksum_kept) == 0
        assert rpc.rpc_sync(to, work.drop) == 1
        tensor.zero_()


@pytest.mark.parametrize("size", [3, 1000, 100_000])
@in_job
def test_every_fetch_is_a_copy_and_shows_the_owners_latest_change(size: int) -> None:
    rref = rpc.remote("w1", torch.zeros, args=(size,))
    first, second = rref.to_here(), rref.to_here()
    first.fill_(1)
    assert not second.any()
    assert not rref.to_here().any()
    rref.rpc_sync().fill_(2)
    assert rref.to_here().eq(2).all()
    assert not second.any()
    assert first.eq(1).all()
    assert rref.rpc_sync().sum().item() == 2 * size


@in_job
def test_a_fetched_tensor_outlives_its_reference_and_its_owners_memory() -> None:
    fetched = []
    for number in range(20):
        rref = rpc.remote("w1", torch.full, args=((30_000,), number))
        fetched.append(rref.to_here())
        del rref
        rpc.rpc_sync("w1", work.echo, args=(torch.zeros(30_000),))
    assert [tensor.unique().tolist() for tensor in fetched] == [[number] for number in range(20)]


@in_job
def test_a_received_tensor_can_be_resized_shared_and_used_as_any_other() -> None:
    for size in (3, 100_000):
        tensor = rpc.rpc_sync("w1", torch.ones, args=(size,))
        weight = tensor.clone().requires_grad_()
        (tensor * weight).sum().backward()
        assert weight.grad.eq(1).all()
        tensor.add_(1).mul_(2)
        assert tensor.eq(4).all()
        assert torch.cat([tensor, tensor]).numel() == 2 * size
        assert tensor.numpy().sum() == 4 * size
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert tensor.resize_(size // 2).numel() == size // 2


@pytest.mark.gates
@pytest.mark.timeout(600)
@in_job
def test_a_tensor_of_more_than_4_gib_arrives_there_and_here() -> None:
    size = (4 << 30) + 12_345
    last = torch.zeros(size, dtype=torch.uint8)
    last[-1] = 77
    assert rpc.rpc_sync("w1", torch.argmax, args=(last,), timeout=0) == size - 1
    del last
    answer = rpc.rpc_sync("w1", torch.ones, args=((size,),), kwargs={"dtype": torch.uint8}, timeout=0)
    assert answer.numel() == size and answer[::4096].sum() == len(answer[::4096]) and answer[-1] == 1
