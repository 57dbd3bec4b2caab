"""Memory that several workers write: handed over without a copy, and gone with its last user."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref.errors import ResourceError, UsageError, WorkerDied
from tests import puppets, work
from tests.jobs import in_job, job_fixtures
from tests.puppets import Troupe, troupe_fixture  # noqa: F401
from tests.stopping import stopped

pytestmark = pytest.mark.shared_memory("that is what several write")

jobs, job = job_fixtures(3, [{}, {"table_bits": 0}])

DTYPES = [torch.float32, torch.float64, torch.int8, torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]


def add_one(tensor: torch.Tensor) -> None:
    tensor += 1


_adding = threading.Lock()


def add_one_to_all(tensors: list[torch.Tensor]) -> None:
    with _adding:  # calls are served on several threads, and an addition in place is none in one step
        for tensor in tensors:
            tensor += 1


def blocks_here() -> int:
    """Count the blocks that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:fastref-shared")


def wait_until_blocks(count: int) -> None:
    end = time.monotonic() + 30
    while blocks_here() != count:
        assert time.monotonic() < end, Path("/proc/self/maps").read_text()
        time.sleep(0.01)


def test_a_shared_tensor_is_a_tensor() -> None:
    for dtype in DTYPES:
        tensor = fastref.shared_empty(3, 4, dtype=dtype)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 4), dtype, True)
        assert tensor.float().sum() == 0 if not dtype.is_complex else not tensor.abs().sum()
    assert fastref.shared_empty((2, 3)).shape == (2, 3)
    assert fastref.shared_empty(torch.Size([2])).dtype == torch.get_default_dtype()
    assert fastref.shared_empty().shape == ()
    assert fastref.shared_empty(0, 3).shape == (0, 3)


def test_sharing_copies_once() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    shared = fastref.share(tensor)
    assert torch.equal(shared, tensor)
    tensor += 1
    assert not torch.equal(shared, tensor)
    assert fastref.share(shared) is shared
    assert fastref.share(shared[1:]).data_ptr() == shared[1:].data_ptr()
    assert not fastref.share(torch.ones(2, requires_grad=True)).requires_grad


def test_what_is_not_dense_is_not_shared() -> None:
    with pytest.raises(UsageError, match="only dense tensors"):
        fastref.share(torch.eye(3).to_sparse())


def test_too_much_is_an_error() -> None:
    with pytest.raises(ResourceError):
        fastref.shared_empty(1 << 50, dtype=torch.int8)


def test_it_goes_with_the_last_tensor_in_it() -> None:
    before, open_files = blocks_here(), len(os.listdir("/proc/self/fd"))
    tensor = fastref.shared_empty(1000)
    view = tensor[10:]
    del tensor
    assert blocks_here() == before + 1
    del view
    assert blocks_here() == before
    assert len(os.listdir("/proc/self/fd")) == open_files


@in_job
def test_all_who_get_it_write_the_same_memory() -> None:
    for size in (1, 100, 100_000):
        tensor = fastref.shared_empty(size)
        rpc.rpc_sync("w1", add_one, args=(tensor,))
        assert torch.equal(tensor, torch.ones(size))
        rpc.rpc_async("w2", add_one, args=(tensor,)).wait()
        rpc.remote("w1", add_one, args=(tensor,)).to_here()
        rpc.rpc_sync("w0", add_one, args=(tensor,))
        assert torch.equal(tensor, torch.full((size,), 4.0))


@in_job
def test_it_is_handed_over_in_any_container_and_as_any_view() -> None:
    tensor = fastref.share(torch.arange(12.0).reshape(3, 4))
    for view in (tensor, tensor[1:], tensor.t(), tensor[:, 1], tensor[::2, ::2], tensor.view(-1), tensor[2, 3]):
        args = {"a": [view, (view, "text")]}
        answer = rpc.rpc_sync("w1", work.echo, args=(args,))
        for found in (answer["a"][0], answer["a"][1][0]):
            assert torch.equal(found, view)
            assert found.stride() == view.stride()
            found += 1
        assert torch.equal(answer["a"][0], view)
    assert torch.equal(rpc.rpc_sync("w1", work.echo, args=(tensor,)), tensor)


@in_job
def test_results_and_values_of_references_are_shared_too() -> None:
    made = rpc.rpc_sync("w1", make_and_keep, args=(1000,))
    made.fill_(5)
    assert rpc.rpc_sync("w1", sum_of_kept) == 5000
    rref = rpc.remote("w1", work.get_kept)
    first, second = rref.to_here(), rref.to_here()
    first.fill_(1)
    assert torch.equal(second, made)
    assert rpc.rpc_sync("w1", sum_of_kept) == 1000
    passed_on = rpc.rpc_sync("w2", ask_for, args=("w1",))
    passed_on.fill_(2)
    assert rpc.rpc_sync("w1", sum_of_kept) == 2000
    rpc.rpc_sync("w1", work.drop)


def make_and_keep(size: int) -> torch.Tensor:
    tensor = fastref.shared_empty(size)
    work.keep(tensor)
    return tensor


def sum_of_kept() -> float:
    return work.get_kept().sum().item()


def ask_for(to: str) -> torch.Tensor:
    return rpc.rpc_sync(to, work.get_kept)


@in_job
def test_one_that_comes_often_is_mapped_once() -> None:
    before = rpc.rpc_sync("w1", blocks_here)
    tensor = fastref.shared_empty(10)
    for _ in range(50):
        rpc.rpc_sync("w1", work.keep, args=(tensor,))
        rpc.rpc_async("w1", work.keep, args=([tensor],)).wait()
    assert rpc.rpc_sync("w1", blocks_here) == before + 1
    rpc.rpc_sync("w1", work.drop)
    rpc.rpc_sync("w1", wait_until_blocks, args=(before,))


@in_job
def test_nothing_of_it_stays_when_all_have_dropped_it() -> None:
    before = blocks_here()
    descriptors = len(os.listdir("/proc/self/fd"))
    for size in range(1, 50):
        tensor = fastref.shared_empty(size)
        futures = [rpc.rpc_async(to, work.echo, args=(tensor,)) for to in ("w0", "w1", "w2")]
        for future in futures:
            assert future.wait().data_ptr() == tensor.data_ptr()
        del tensor, futures, future
    wait_until_blocks(before)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    rpc.rpc_sync("w1", wait_until_blocks, args=(0,))


@in_job
def test_a_call_that_cannot_be_sent_hands_nothing_over() -> None:
    before = rpc.rpc_sync("w1", blocks_here)
    tensor = fastref.shared_empty(10)
    for _ in range(5):
        with pytest.raises((TypeError, AttributeError)):
            rpc.rpc_sync("w1", work.echo, args=([tensor, (number for number in range(3))],))
    assert rpc.rpc_sync("w1", blocks_here) == before


@in_job
def test_it_is_never_published() -> None:
    tensor = fastref.shared_empty(10)
    rref = rpc.remote("w1", work.echo, args=(tensor,))
    for number in range(3):
        tensor.fill_(number)
        assert rref.to_here().sum() == 10 * number
    with pytest.raises(UsageError, match="shared memory"):
        rpc.RRef([tensor]).publish()


def test_it_outlives_who_made_it(troupe: Troupe) -> None:
    maker, user, other = troupe.start(3)
    user.do(puppets.keep_result, "shared", rpc.rpc_sync, maker.name, make_and_keep, (1000,))
    maker.kill()
    user.do(use_after_death, maker.name, other.name)


def use_after_death(dead: str, other: str) -> None:
    puppets.wait_until_dead(dead)
    tensor = puppets.kept("shared")
    tensor.fill_(3)
    rpc.rpc_sync(other, add_one, args=(tensor,))
    assert tensor.sum() == 4000
    with pytest.raises(WorkerDied):
        rpc.rpc_sync(dead, add_one, args=(tensor,))


def test_it_goes_when_all_who_have_it_are_killed(troupe: Troupe) -> None:
    maker, user, other = troupe.start(3)
    user.do(puppets.keep_result, "shared", rpc.rpc_sync, maker.name, make_and_keep, (1000,))
    maker.kill()
    user.kill()
    other.do(puppets.wait_until_dead, user.name)
    assert other.do(blocks_here) == 0


@in_job
def test_a_stopped_worker_is_sent_shared_tensors_all_the_same() -> None:
    tensors = [fastref.shared_empty(100) for _ in range(40)]  # more than the socket holds, fewer calls than the ring
    with stopped(rpc.rpc_sync("w1", work.pid)):
        futures = [rpc.rpc_async("w1", add_one_to_all, args=(tensors,)) for _ in range(20)]
        rpc.rpc_sync("w2", add_one_to_all, args=(tensors,))
        assert all(tensor[0] == 1 for tensor in tensors)
    for future in futures:
        future.wait()
    for tensor in tensors:
        assert torch.equal(tensor, torch.full((100,), 21.0))


@in_job
def test_a_forked_child_shares_it_too() -> None:
    tensor = fastref.shared_empty(3)
    rpc.rpc_sync("w1", add_one, args=(tensor,))
    child = os.fork()
    if child == 0:
        tensor.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor.sum() == 21
    assert rpc.rpc_sync("w1", work.echo, args=(tensor,)).sum() == 21
