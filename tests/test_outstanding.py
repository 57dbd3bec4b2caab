"""A hundred thousand calls under way at once: what that takes, on either side, and that it is all given back."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import pytest
import torch

import fastref.rpc as rpc
from fastref.rref import current_wiring
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(2)

CALLS = 100_000
# Measured: 1.0 KiB on the caller's side for a call and its future, and as much again with a tensor of 1 KiB as result.
CALLER_BYTES = 8192
CALLEE_BYTES_AT_REST = 128 << 20

_gate = threading.Event()


def resident() -> int:
    return psutil.Process().memory_info().rss


def shared() -> tuple[int, int]:
    """Return how much shared memory this worker has in use, and how much of its rings."""
    figures = current_wiring().snapshot()
    return figures["arena"]["bytes_lent"], figures["calls"]["threads"]


@pytest.mark.parametrize("kind", ["number", "tensor of 1 KiB"])
@in_job
def test_calls_that_are_answered_at_once_pile_up_only_as_futures(kind: str) -> None:
    value: Any = 5 if kind == "number" else torch.ones(256)
    rpc.rpc_sync("w1", work.echo, (value,))
    mine, theirs = resident(), rpc.rpc_sync("w1", resident)
    futures = [rpc.rpc_async("w1", work.echo, (value,)) for _ in range(CALLS)]
    grown = resident() - mine
    for future in futures:
        assert future.wait() is not None
    assert grown <= CALLS * CALLER_BYTES
    # The callee holds a call only while it has not answered it: what it has kept is the allocator's.
    assert rpc.rpc_sync("w1", resident) - theirs <= CALLEE_BYTES_AT_REST
    for used, threads in (shared(), rpc.rpc_sync("w1", shared)):
        assert used <= 64 << 20
        assert threads <= 32
    if kind != "number":
        assert torch.equal(futures[-1].value(), value)


def wait_for_gate(value: Any) -> float:
    _gate.wait(60)
    return float(value.sum())


def open_gate_after(seconds: float) -> None:
    _gate.clear()
    threading.Timer(seconds, _gate.set).start()


@in_job
def test_calls_that_block_wait_in_the_callees_memory_and_all_are_answered() -> None:
    tensor = torch.ones(256)
    theirs = rpc.rpc_sync("w1", resident)
    rpc.rpc_sync("w1", open_gate_after, (2.0,))
    futures = [rpc.rpc_async("w1", wait_for_gate, (tensor,)) for _ in range(CALLS // 5)]
    assert all(future.wait() == 256 for future in futures)
    assert rpc.rpc_sync("w1", resident) - theirs <= CALLEE_BYTES_AT_REST
    assert rpc.rpc_sync("w1", shared)[0] <= 64 << 20
