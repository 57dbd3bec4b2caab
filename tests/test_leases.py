"""Large tensors are read where they lie in the sender's memory: when that is so, how long, and whose the bytes are."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import ResourceError
from fastref.rref import current_wiring
from tests import puppets, work
from tests.jobs import in_job, job_fixtures
from tests.puppets import Troupe, troupe_fixture  # noqa: F401

pytestmark = pytest.mark.shared_memory("a lease is memory of another worker")

jobs, job = job_fixtures(2)

SIZE = 100_000  # elements: a few hundred KiB
SMALL = 10_000  # bytes that are copied


def leases(of: str) -> int:
    """Count the blocks of a worker's memory that this one leases now."""
    return current_wiring().snapshot()["peers"][of].get("leases", 0)


def all_leases() -> int:
    """Count the blocks that this worker leases now, its own among them: what comes back to its owner lies there."""
    return sum(peer.get("leases", 0) for peer in current_wiring().snapshot()["peers"].values())


def pages_written(of: str) -> int:
    """Count the pages that were found written when leases of a worker's memory ended here."""
    return current_wiring().snapshot()["peers"][of]["pages_written"]


def blocks() -> int:
    """Count the blocks of this worker's memory that are in use."""
    return current_wiring().snapshot()["arena"]["blocks"]


def wait_for(condition: Any, patience_s: float = 20.0) -> None:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.005)


def big(kind: str, value: float) -> Any:
    """Return a large value of one kind, all of whose elements are ``value``."""
    tensor = torch.full((SIZE,), value)
    if kind == "parameter":
        return torch.nn.Parameter(tensor)
    if kind == "array":
        return tensor.numpy()
    if kind == "in containers":
        return [{"a": (tensor, None)}]
    if kind == "transposed":
        return torch.full((2, SIZE), value).t()
    if kind == "bfloat16":
        return tensor.to(torch.bfloat16)
    return tensor


def elements(value: Any) -> Any:
    """Return the tensor or array in a value."""
    return (
        elements(value["a"] if isinstance(value, dict) else value[0])
        if isinstance(value, (list, tuple, dict))
        else value
    )


KINDS = ["tensor", "parameter", "array", "in containers", "transposed", "bfloat16"]


def take_apart(value: Any) -> tuple[int, float]:
    """Look, write, and say how many leases there were."""
    taken = elements(value)
    before = leases("w0")
    seen = float(taken.sum()) / taken.size if isinstance(taken, numpy.ndarray) else float(taken.double().mean())
    (taken.data if isinstance(taken, torch.Tensor) else taken)[0] = 77
    return before, seen


# ---- that it is so


@pytest.mark.parametrize("kind", KINDS)
@in_job
def test_a_large_argument_is_leased_and_is_the_callees_to_write(kind: str) -> None:
    for value in (1.0, 2.0, 3.0):
        sent = big(kind, value)
        assert rpc.rpc_sync("w1", take_apart, (sent,)) == (1, value)
        assert (elements(sent) == value).all()
        # The serving thread lets go of its argument after it has answered.
        wait_for(lambda: rpc.rpc_sync("w1", leases, ("w0",)) == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["sync", "async", "to_here", "method"])
@in_job
def test_a_large_result_is_leased_and_is_the_callers_to_write(way: str, kind: str) -> None:
    for value in (1.0, 2.0, 3.0):
        if way == "sync":
            got = rpc.rpc_sync("w1", big, (kind, value))
        elif way == "async":
            got = rpc.rpc_async("w1", big, (kind, value)).wait()
        elif way == "to_here":
            got = rpc.remote("w1", big, (kind, value)).to_here()
        else:
            got = rpc.remote("w1", puppets.Cell, (big(kind, value),)).rpc_sync().get()
        assert all_leases() == 1
        assert (elements(got) == value).all()
        with torch.no_grad():
            elements(got)[5:9] = 88
        del got
        wait_for(lambda: leases("w1") == 0)


@in_job
def test_one_lease_serves_all_tensors_of_a_message() -> None:
    many = [torch.full((SIZE,), float(i)) for i in range(5)]
    got = rpc.rpc_sync("w1", work.echo, (many,))
    assert all_leases() == 1
    for i in (3, 0, 4, 1):
        assert (got[i] == i).all()
        got[i] = None
        assert all_leases() == 1
    assert (got[2] == 2).all()
    del got
    wait_for(lambda: all_leases() == 0)


@in_job
def test_small_buffers_are_copied() -> None:
    got = rpc.rpc_sync("w1", work.echo, (torch.ones(SMALL // 4),)), rpc.rpc_sync("w1", work.echo, (bytearray(SIZE),))
    assert leases("w1") == 0
    assert got[0].sum() == SMALL // 4


@in_job
def test_a_worker_leases_what_it_sends_to_itself() -> None:
    sent = torch.ones(SIZE)
    got = rpc.rpc_sync("w0", work.echo, (sent,))
    got.add_(1)
    wait_for(lambda: leases("w0") == 1)  # the serving thread lets go of its argument after it has answered
    assert (sent == 1).all()
    assert (got == 2).all()
    del got
    wait_for(lambda: leases("w0") == 0 and blocks() == 0)


# ---- how long it lasts


def keep_sum(value: Any) -> float:
    work.keep(value)
    return float(value.sum())


@in_job
def test_what_is_kept_does_not_change_while_the_sender_goes_on() -> None:
    for i in range(10):
        assert rpc.rpc_sync("w1", keep_sum, (torch.full((SIZE,), float(i)),)) == i * SIZE
    assert rpc.rpc_sync("w1", leases, ("w0",)) == 10
    assert blocks() == 10
    for _ in range(50):
        rpc.rpc_sync("w1", work.checksum, (torch.full((SIZE,), -1.0),))
    assert rpc.rpc_sync("w1", sums_kept) == [float(i * SIZE) for i in range(10)]
    assert rpc.rpc_sync("w1", work.drop) == 10
    wait_for(lambda: blocks() == 0)


def sums_kept() -> list[float]:
    return [float(value.sum()) for value in work.kept]


@in_job
def test_memory_is_used_again() -> None:
    for _ in range(5):
        rpc.rpc_sync("w1", work.checksum, (torch.ones(SIZE),))
    used = current_wiring().snapshot()["arena"]["committed"]
    for _ in range(300):
        rpc.rpc_sync("w1", work.checksum, (torch.ones(SIZE),))
    assert current_wiring().snapshot()["arena"]["committed"] <= used + 4 * SIZE * 4


@in_job
def test_writers_get_copies_and_readers_leases_again() -> None:
    taken = []
    for _ in range(30):
        taken.append(rpc.rpc_sync("w1", write_all, (torch.ones(SIZE),)))
        wait_for(lambda: rpc.rpc_sync("w1", leases, ("w0",)) == 0)
    assert taken[0] == 1
    assert 1 <= sum(taken) <= 4  # the probes: the 1st, the 10th, the 27th
    # Others are not taken for it.
    assert rpc.rpc_sync("w1", take_apart, (torch.ones(SIZE),)) == (1, 1.0)


def write_all(value: torch.Tensor) -> int:
    value.add_(1)
    assert (value == 2).all()
    return leases("w0")


@in_job
def test_a_tensor_may_end_on_a_thread_without_the_interpreter_lock() -> None:
    tensor = rpc.rpc_sync("w1", torch.ones, (SIZE,))
    tensor[3] = 5
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    del tensor
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    managed = get(capsule, b"dltensor")
    # The deleter is the last of the structure's words, behind a tensor of 48 bytes and the context.
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.c_void_p.from_address(managed + 56).value)
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
    rename(capsule, b"used_dltensor")
    assert leases("w1") == 1
    thread = threading.Thread(target=deleter, args=(managed,))  # ctypes lets go of the lock meanwhile
    thread.start()
    thread.join()
    assert leases("w1") == 0
    assert rpc.rpc_sync("w1", torch.ones, (SIZE,)).sum() == SIZE


@in_job
def test_a_childs_tensors_do_not_change() -> None:
    got = rpc.rpc_sync("w1", torch.ones, (SIZE,))
    got[0] = 7
    array = got.numpy()  # torch's own threads are not there in a child
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(readable, 1)
        os._exit(0 if array[0] == 7 and (array[1:] == 1).all() else 1)
    expected = got.clone()
    assert torch.equal(got, expected)
    del got, array
    wait_for(lambda: leases("w1") == 0)
    for _ in range(20):
        rpc.rpc_sync("w1", torch.zeros, (SIZE,)).sum()
    os.write(writable, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(readable)
    os.close(writable)


@in_job
def test_gradients_and_modules_work_on_leased_memory() -> None:
    module = torch.nn.Linear(400, 400)
    copy = rpc.rpc_sync("w1", work.echo, (module,))
    assert leases("w1") == 1
    loss = copy(torch.ones(2, 400)).sum()
    loss.backward()
    torch.optim.SGD(copy.parameters(), 0.1).step()
    assert not torch.equal(copy.weight, module.weight)
    assert copy.weight.grad is not None


# ---- ends of workers


def fetch_and_keep(label: str, of: str, value: float) -> None:
    puppets.keep(label, rpc.rpc_sync(of, torch.full, ((SIZE,), value)))


def is_still(label: str, value: float) -> bool:
    kept = puppets.kept(label)
    return bool((kept[1:] == value).all())


def overwrite(to: str, count: int) -> None:
    """Use this worker's shared memory for other things."""
    for _ in range(count):
        rpc.rpc_sync(to, puppets.nothing_with, (torch.full((SIZE,), -1.0),))


def test_what_was_leased_outlives_its_owner(troupe: Troupe) -> None:
    owner, user = troupe.start(2)
    user.do(fetch_and_keep, "a", "w0", 3.0)
    owner.kill()
    user.do(puppets.wait_until_dead, "w0")
    assert user.do(is_still, "a", 3.0)
    user.do(puppets.drop_all)
    user.do(rpc.shutdown, False)


def test_what_was_leased_outlives_its_users_job(troupe: Troupe) -> None:
    """Whoever leaves is taken out of all tables, and its blocks are filled again."""
    owner, user, third = troupe.start(3)
    user.do(fetch_and_keep, "a", "w0", 3.0)
    user.do(write_one, "a")
    user.do(rpc.shutdown, False)
    owner.do(puppets.wait_until_dead, "w1")
    owner.do(wait_for_blocks, 0)
    owner.do(overwrite, "w2", 20)
    assert user.do(is_still, "a", 3.0)
    assert user.do(arenas_mapped) > 0
    user.do(puppets.drop_all)
    assert user.do(arenas_mapped) == 0
    for puppet in (owner, third):
        puppet.order(rpc.shutdown)
    for puppet in (owner, third):
        puppet.outcome()


def write_one(label: str) -> None:
    puppets.kept(label)[0] = 7


def wait_for_blocks(count: int) -> None:
    wait_for(lambda: blocks() == count)


def arenas_mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:fastref-arena")


def test_a_worker_that_was_cut_off_keeps_what_it_leased(troupe: Troupe) -> None:
    owner, user = troupe.start(2)
    user.do(fetch_and_keep, "a", "w0", 3.0)
    owner.do(cut, 1)
    user.do(puppets.wait_until_dead, "w0")
    user.do(wait_until_detached, "a")
    owner.do(wait_for_blocks, 0)
    owner.do(overwrite, "w0", 20)
    assert user.do(is_still, "a", 3.0)
    user.do(puppets.drop_all)
    for puppet in (owner, user):
        puppet.do(rpc.shutdown, False)


def wait_until_detached(label: str) -> None:
    wait_for(lambda: all_private(puppets.kept(label)))


def all_private(tensor: torch.Tensor) -> bool:
    """Tell whether all pages of a tensor belong to this process alone."""
    first, last = tensor.data_ptr() // 4096, (tensor.data_ptr() + tensor.nbytes - 1) // 4096
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first * 8)
        words = numpy.frombuffer(pagemap.read((last - first + 1) * 8), dtype=numpy.uint64)
    present, of_the_file = words >> numpy.uint64(62) > 0, words >> numpy.uint64(61) & numpy.uint64(1) > 0
    return bool((present & ~of_the_file).all())


def cut(rank: int) -> None:
    current_wiring().cut(rank, "a test wants it")


def test_a_killed_user_gives_back_what_it_leased(troupe: Troupe) -> None:
    owner, user = troupe.start(2)
    for value in range(10):
        user.do(fetch_and_keep, str(value), "w0", float(value))
    assert owner.do(blocks) == 10
    user.kill()
    owner.do(puppets.wait_until_dead, "w1")
    owner.do(wait_for_blocks, 0)
    assert owner.do(puppets.entries_held) == 0
    owner.do(rpc.shutdown)


@pytest.mark.parametrize("options", [{"table_bits": 1}, {"table_capacity": 64}], ids=str)
def test_without_a_bit_or_an_entry_it_is_copied(troupe: Troupe, options: dict[str, int]) -> None:
    crew = owner, user = troupe.start(2, **options)
    if "table_capacity" in options:
        owner.do(fill_table)
        assert owner.do(send_ones) == (0, SIZE)
    else:
        user.do(fetch_and_keep, "a", "w0", 3.0)
        assert user.do(is_still, "a", 3.0)
        assert user.do(leases, "w0") == 0
    for puppet in crew:
        puppet.do(puppets.drop_all)
    if "table_capacity" in options:
        owner.do(wait_for_entries)
        assert owner.do(send_ones) == (1, SIZE)
    troupe.leave(crew)


def fill_table() -> None:
    kept = []
    while True:
        kept.append(rpc.RRef(len(kept)))
        try:
            rpc.rpc_sync("w1", puppets.nothing_with, (kept[-1],))
        except ResourceError:
            break
    puppets.keep("table", kept)


def wait_for_entries() -> None:
    wait_for(lambda: puppets.entries_held() == 0)


def send_ones() -> tuple[int, float]:
    return rpc.rpc_sync("w1", lease_count_during, (torch.ones(SIZE),))


def lease_count_during(value: torch.Tensor) -> tuple[int, float]:
    return leases("w0"), float(value.sum())


def test_what_peers_keep_does_not_fill_the_arena(troupe: Troupe) -> None:
    """Once half of it is in use, they get copies."""
    crew = owner, user = troupe.start(2, arena_limit=8 << 20)
    sums = [owner.do(send_to_keep, i) for i in range(60)]  # 24 MB
    assert sums == [float(i * SIZE) for i in range(60)]
    assert 5 <= user.do(leases, "w0") <= 12
    assert user.do(sums_kept) == sums
    user.do(work.drop)
    owner.do(wait_for_blocks, 0)
    troupe.leave(crew)


def send_to_keep(i: int) -> float:
    return rpc.rpc_sync("w1", keep_sum, (torch.full((SIZE,), float(i)),))


def read_at_exit(label: str) -> None:
    """End without ``shutdown``, and look at what was received when everything of fastref has ended."""
    import atexit

    atexit._clear()  # what is left runs in this order reversed
    atexit.register(lambda: os._exit(0 if is_still(label, 3.0) and all_private(puppets.kept(label)) else 1))
    from fastref.runtime import runtime

    atexit.register(runtime._abandon_all)


def test_what_was_leased_can_be_read_until_the_process_ends(troupe: Troupe) -> None:
    owner, user = troupe.start(2)
    user.do(fetch_and_keep, "a", "w0", 3.0)
    user.do(read_at_exit, "a")
    assert user.end() == 0
    owner.do(puppets.wait_until_dead, "w1")
    owner.do(rpc.shutdown)
