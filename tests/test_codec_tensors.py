"""Tensors in the fast encoding: any strides, gradients, parameters, shared memory, and damage."""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastref.codec.stream import decode, encode
from fastref.errors import ProtocolError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def same(one, two) -> bool:
    """Equal in value, exact type, order and sign, NaN included."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return struct.pack("=d", one) == struct.pack("=d", two)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return same(list(one), list(two)) and same(list(one.values()), list(two.values()))
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        one, two = (tensor.detach().clone(memory_format=torch.contiguous_format).view(-1) for tensor in (one, two))
        return one.view(torch.uint8).equal(two.view(torch.uint8)) if one.numel() else True
    return one == two


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_takes_pickle():
    assert encode(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3), (5, 100), (1000, 3), (1,) * 16], ids=str)
def test_a_tensor_comes_back_as_it_was(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    back = decode(encode(tensor))
    assert same(back, tensor) and back.is_contiguous() and not back.requires_grad
    if tensor.numel():
        assert back.data_ptr() != tensor.data_ptr()


def test_a_decoded_tensor_is_its_own_memory():
    data = encode({"small": torch.zeros(4), "large": torch.zeros(5000)})
    one, two = decode(data), decode(data)
    for name in one:
        one[name].add_(1)
        assert two[name].sum() == 0 and one[name].data_ptr() % 64 == 0


@pytest.mark.parametrize("elements", [1, 255, 256, 257, 5000])
def test_tensors_between_other_values_stay_apart(elements):
    value = [1, torch.arange(elements), "x", {"t": torch.arange(elements, dtype=torch.float64), "n": None}, b"end"]
    assert same(decode(encode(value)), value)


def test_a_view_travels_as_its_own_elements():
    whole = torch.arange(100_000.0)
    data = encode(whole[10:20])
    assert data is not None and len(data) < 200
    assert same(decode(data), whole[10:20].clone())


def noted(tensor):
    tensor.note = "seen"
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64).conj().imag,
        torch.ones((1,) * 17),
        noted(torch.nn.Parameter(torch.ones(2))),
        torch.zeros(2, dtype=torch.uint8).view(torch.uint4),
        torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
    ids=["conjugated", "sparse", "meta", "negative", "17d", "with an attribute", "4 bits", "two in a byte"],
)
def test_a_tensor_that_is_not_plain_takes_pickle(tensor):
    assert encode(tensor) is None


@pytest.mark.parametrize("size", [2, 100, 10_000])
def test_a_tensor_that_wants_a_gradient_does_so_afterwards(size):
    for tensor in (torch.ones(size, requires_grad=True), torch.ones(size, requires_grad=True) * 2):
        back = decode(encode(tensor))
        assert same(back.detach(), tensor.detach()) and back.requires_grad and back.is_leaf
    for wanted in (True, False):
        back = decode(encode(torch.nn.Parameter(torch.ones(size), wanted)))
        assert type(back) is torch.nn.Parameter and back.requires_grad is wanted and back.sum() == size


def base(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


STRIDED = {
    # What keeps its strides.
    "transposed": (lambda: base(200, 300).t(), (1, 300)),
    "permuted": (lambda: base(4, 5, 6, 70).permute(3, 1, 0, 2), (1, 420, 2100, 70)),
    "small gaps": (lambda: base(40, 5)[::2, ::3], (10, 3)),
    "narrow gaps": (lambda: base(300, 40)[:, :39], (40, 1)),
    "expanded": (lambda: base(3000, 1).expand(3000, 50), (1, 0)),
    "expanded scalar": (lambda: torch.tensor(5.0, dtype=torch.float64).expand(50, 50), (0, 0)),
    "overlapping": (lambda: base(5000).as_strided((2000, 7), (1, 3)), (1, 3)),
    # What leaves wide gaps behind.
    "wide gaps": (lambda: base(300, 40)[:, ::4], (10, 1)),
    "a column": (lambda: base(3000, 50)[:, 7], (1,)),
    "wide gaps, transposed": (lambda: base(300, 40)[:, ::4].t(), (1, 10)),
    "wide gaps, permuted": (lambda: base(20, 30, 40)[::3, ::2, ::5].permute(2, 0, 1), (1, 120, 8)),
    "wide gaps, expanded": (lambda: base(9000)[::3].unsqueeze(1).expand(3000, 4), (1, 0)),
    "wide gaps between blocks": (lambda: base(20, 30, 40)[::5], (1200, 40, 1)),
    "far apart": (lambda: base(100_000)[::50_000], (1,)),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_a_strided_tensor_travels_as_one_copy_of_what_it_needs(view, dtype):
    make, strides = STRIDED[view]
    tensor = make()
    if dtype != torch.float64:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(dtype)
        tensor = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    data = encode([tensor, "end"])
    back, end = decode(data)
    assert same(back, tensor) and end == "end"
    if view != "small gaps" and tensor.element_size() == 8:
        assert back.stride() == strides
    distinct = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    assert len(data) <= max(16384, distinct * tensor.element_size() * 3 // 2) + 256


@given(st.data())
def test_any_view_of_a_tensor_comes_back(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    strides = data.draw(st.lists(st.integers(0, 40), min_size=len(shape), max_size=len(shape)))
    whole = torch.arange(6 * 5 * 40 * 8).to(data.draw(st.sampled_from([torch.int16, torch.float64])))
    factor = data.draw(st.sampled_from([1, 7]))  # the wide ones are gathered
    tensor = whole.as_strided(shape, [stride * factor for stride in strides], 3)
    back = decode(encode(tensor))
    assert same(back, tensor)


def test_tensors_that_share_memory_take_pickle():
    whole = torch.arange(100.0)
    for value in ([whole, whole[10:20]], [whole[:11], whole[10:]], (whole.reshape(10, 10).t(), whole), [whole, whole]):
        assert encode(value) is None
    empty = torch.ones(0)
    assert encode([empty, empty]) is None
    assert same(decode(encode(list(whole.chunk(4)))), list(whole.chunk(4)))


def test_many_tensors_stay_apart():
    whole = torch.arange(20_000.0)
    pieces = list(whole.view(2000, 10).unbind())
    random.Random(3).shuffle(pieces)
    assert same(decode(encode(pieces)), pieces)
    assert encode([*pieces, whole[19_999:]]) is None
    assert encode(list(torch.arange(10_000).unbind())) is None  # too many to remember


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 100_000])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_of_any_size_come_back(kind, size):
    value, other = (kind(random.Random(seed).randbytes(size)) for seed in (1, 2))
    assert same(decode(encode([1, value, "x", other, 2])), [1, value, "x", other, 2])
    if kind is bytearray:
        assert encode([value, value]) is None
        value.append(1)  # nothing holds on to it


def tensor_bytes(code=2, bits=32, shape=(2,), data=bytes(8), ndim=None, size=None, flags=0, strides=()) -> bytes:
    head = struct.pack(
        "=BBBB4xQ", code, bits, len(shape) if ndim is None else ndim, flags, len(data) if size is None else size
    )
    return b"X" + head + b"".join(struct.pack("=q", n) for n in (*shape, *strides)) + data


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 0},
        {"bits": 7},
        {"bits": 24, "shape": (1,), "data": bytes(3)},
        {"bits": 248, "shape": (0,), "data": b""},
        {"code": 3},
        {"code": 4},
        {"code": 200},
        {"code": 6, "bits": 64, "shape": (1,)},
        {"code": 5, "bits": 8, "shape": (8,)},
        {"shape": (3,)},
        {"shape": (-2,)},
        {"shape": (-1, -2)},
        {"shape": (2**62, 2**62)},
        {"shape": (2**63 - 1,)},
        {"shape": (2**32, 2**32), "data": b""},
        {"shape": (0, 2**62, 2**62), "data": b""},
        {"ndim": 17},
        {"ndim": 255},
        {"ndim": 2},
        {"size": 9},
        {"size": 2**64 - 1},
        {"size": 2**40, "shape": (2**38,)},
        {"size": 2**48, "shape": (2**46,)},
        {"data": bytes(7)},
        {"flags": 8},
        {"flags": 255},
        {"flags": 1, "code": 0},
        {"flags": 3, "code": 0},
        {"flags": 4},
        {"flags": 4, "strides": (-1,)},
        {"flags": 4, "strides": (2,)},
        {"flags": 4, "strides": (0,)},
        {"flags": 4, "strides": (2**63 - 1,)},
        {"flags": 4, "strides": (2**62,), "shape": (5,), "size": 4},
        {"flags": 4, "strides": (1,), "shape": (0,), "data": b""},
        {"flags": 4, "strides": (1,), "shape": (0,), "data": bytes(4)},
    ],
    ids=str,
)
def test_a_damaged_tensor_is_refused(changes):
    assert same(decode(tensor_bytes()), torch.zeros(2))
    with pytest.raises(ProtocolError):
        decode(tensor_bytes(**changes))
