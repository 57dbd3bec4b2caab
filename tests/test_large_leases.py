"""Leases of large blocks end on a thread of their own, whatever the process does meanwhile."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import pytest
import torch

import fastref.rpc as rpc
from fastref.rref import current_wiring
from tests import puppets
from tests.jobs import in_job, job_fixtures
from tests.puppets import Troupe, troupe_fixture  # noqa: F401
from tests.test_leases import leases, wait_for, wait_for_blocks

pytestmark = pytest.mark.shared_memory("a lease is memory of another worker")

jobs, job = job_fixtures(2)

SIZE = 2_000_000  # elements: 8 MB


def errands() -> int:
    return current_wiring().snapshot()["warm"]["errands"]


def errand_threads() -> int:
    names = (task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "fastref-errands" for name in names)


@in_job
def test_a_large_lease_ends_on_another_thread_which_goes_when_it_has_nothing_to_do() -> None:
    before = errands()
    for number in range(5):
        got = rpc.rpc_sync("w1", torch.full, ((SIZE,), float(number)))
        assert leases("w1") == 1
        got[number * 5000] = -1
        assert got.sum() == number * SIZE - number - 1
        del got
        wait_for(lambda: leases("w1") == 0)
    assert errands() == before + 5
    wait_for(lambda: errand_threads() == 0)
    got = rpc.rpc_sync("w1", torch.full, ((SIZE,), 1.0))
    assert got.sum() == SIZE
    del got
    wait_for(lambda: errands() == before + 6 and leases("w1") == 0)


@in_job
def test_large_leases_that_are_let_go_of_in_any_order_show_what_was_sent() -> None:
    kept: list[tuple[torch.Tensor, float]] = []
    for number in range(40):
        kept.append((rpc.rpc_sync("w1", torch.full, ((SIZE,), float(number))), float(number)))
        kept[-1][0][number] = number  # written, and the same
        for tensor, value in kept:
            assert tensor[0] == tensor[-1] == tensor[SIZE // 2] == value
        if len(kept) > 3:
            tensor = None
            kept.pop(number % 4)
    tensor = None
    kept.clear()
    wait_for(lambda: leases("w1") == 0)


@in_job
def test_a_child_has_no_large_leases_to_end() -> None:
    several = [rpc.rpc_sync("w1", torch.full, ((SIZE,), 1.0)) for _ in range(4)]
    array = several[-1].numpy()
    del several
    child = os.fork()
    if child == 0:
        unchanged = bool((array == 1).all())
        del array
        os._exit(0 if unchanged else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 1).all()
    del array
    wait_for(lambda: leases("w1") == 0)


def fetch_large_and_leave(of: str) -> None:
    """Let go of large leases just before the worker leaves."""
    several = [rpc.rpc_sync(of, torch.full, ((SIZE,), 1.0)) for _ in range(10)]
    del several
    rpc.shutdown(graceful=False)


def fetch_large_and_keep(of: str) -> None:
    """Keep some until the interpreter ends, and let go of others just before."""
    puppets.keep("large", [rpc.rpc_sync(of, torch.full, ((SIZE,), 1.0)) for _ in range(10)])
    atexit.register(lambda: puppets.kept("large").__delitem__(slice(5)))


def test_a_worker_may_leave_and_end_while_large_leases_are_being_ended(troupe: Troupe) -> None:
    owner, user, other = troupe.start(3)
    user.do(fetch_large_and_leave, "w0")
    assert user.end() == 0
    other.do(fetch_large_and_keep, "w0")
    assert other.end() == 0
    for name in ("w1", "w2"):
        owner.do(puppets.wait_until_dead, name)
    owner.do(wait_for_blocks, 0)
    owner.do(rpc.shutdown)
