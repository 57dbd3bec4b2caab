"""Destructors that the collector runs, wherever it starts: they call others, and hand references on."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import pytest

import fastref.rpc as rpc
from tests import work
from tests.jobs import Job

CALLS = 1500


class Caller:
    """In a cycle, so that only the collector ends it; then it calls a worker, and waits."""

    ended: list[bool] = []

    def __init__(self) -> None:
        self.myself = self

    def __del__(self) -> None:
        rpc.rpc_sync("w1", work.echo, args=(rpc.RRef(1),))
        Caller.ended.append(True)


def wait_until(condition: Callable[[], bool]) -> None:
    """For ten seconds at most."""
    give_up_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_destructors_may_call_others_whichever_thread_collects(mp_context: ForkServerContext, transport: str) -> None:
    """A small threshold has the collector start at every few objects: in the threads that read what comes, too."""
    job = Job(mp_context, 2, transport=transport, rpc_timeout=10.0)
    try:
        job.run(make_cycles_and_calls)
        job.close()
    finally:
        job.kill()


def make_cycles_and_calls() -> None:
    before = gc.get_threshold()
    Caller.ended.clear()
    gc.set_threshold(3, 2, 2)
    try:
        for number in range(CALLS):
            Caller()
            rpc.rpc_sync("w1", work.echo, args=(rpc.RRef(number),))
    finally:
        gc.set_threshold(*before)
    gc.collect()
    wait_until(lambda: len(Caller.ended) == CALLS)  # other threads may be at some yet
    wait_until(gc.isenabled)  # a thread that reads what comes may have it off for a moment


@pytest.mark.parametrize("enabled", [True, False])
def test_what_the_program_said_of_the_collector_stands(mp_context: ForkServerContext, enabled: bool) -> None:
    job = Job(mp_context, 2, transport="tcp")
    try:
        job.run(call_from_threads, enabled)
        job.close()
    finally:
        job.kill()


def call_from_threads(enabled: bool) -> None:
    def call() -> None:
        for _ in range(30):
            for future in [rpc.rpc_async("w1", work.echo, args=([rpc.RRef(1)] * 4,)) for _ in range(20)]:
                future.wait()

    (gc.enable if enabled else gc.disable)()
    try:
        callers = [threading.Thread(target=call) for _ in range(3)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        wait_until(lambda: gc.isenabled() == enabled)
    finally:
        gc.enable()
