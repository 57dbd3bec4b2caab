"""Ctrl-C and other signals: they end any wait, and the process goes on working."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import FastrefError
from tests import puppets
from tests.puppets import Cell, Troupe, troupe_fixture  # noqa: F401

DELAY_S = 0.3  # for a call to get where it waits
LONG_S = 20.0  # how long what is waited for takes; far more than the interruption


def wait_in_sync_call() -> None:
    rpc.rpc_sync("w1", puppets.sleep, (LONG_S,), timeout=0)


def wait_in_sync_call_with_deadline() -> None:
    rpc.rpc_sync("w1", puppets.sleep, (LONG_S,), timeout=LONG_S)


def wait_in_call_of_this_worker() -> None:
    rpc.rpc_sync("w0", puppets.sleep, (LONG_S,), timeout=0)


def wait_in_future() -> None:
    rpc.rpc_async("w1", puppets.sleep, (LONG_S,)).wait()


def wait_in_fetch() -> None:
    rpc.remote("w1", puppets.make_slowly, (LONG_S, Cell())).to_here(timeout=0)


def wait_in_method() -> None:
    rpc.remote("w1", Cell).rpc_sync(timeout=0).get_slowly(LONG_S)


def wait_for_own_value() -> None:
    rpc.remote("w0", puppets.make_slowly, (LONG_S, 1)).local_value()


def wait_in_fetch_of_own_value() -> None:
    rpc.remote("w0", puppets.make_slowly, (LONG_S, 1)).to_here(timeout=0)


WAITS = [
    wait_in_sync_call,
    wait_in_sync_call_with_deadline,
    wait_in_call_of_this_worker,
    wait_in_future,
    wait_in_fetch,
    wait_in_method,
    wait_for_own_value,
    wait_in_fetch_of_own_value,
]


def interrupted(wait: Callable[[], None], kind: type[BaseException] = KeyboardInterrupt) -> None:
    """Run a wait and have it ended by SIGINT; fail if it ends otherwise."""
    puppets.interrupt_after(DELAY_S)
    try:
        wait()
    except kind:
        return
    raise AssertionError(f"{wait.__name__} came back instead of being interrupted")


def works() -> None:
    """Every kind of call, as after a start."""
    assert rpc.rpc_sync("w1", puppets.echo, ("a",)) == "a"
    assert rpc.rpc_async("w1", puppets.echo, (b"b" * 100_000,)).wait() == b"b" * 100_000
    cell = rpc.remote("w1", Cell, (3,))
    assert cell.rpc_sync().get() == 3
    assert cell.to_here().value == 3


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_ends_the_wait_and_the_process_goes_on(troupe: Troupe, wait: Callable) -> None:
    w0, w1 = troupe.start(2)
    for _ in range(3):
        w0.do(interrupted, wait)
        w0.do(works)
    assert w1.do(rpc.rpc_sync, "w0", puppets.process_id) == w0.pid


@pytest.mark.parametrize("wait", [wait_in_sync_call, wait_in_fetch, wait_in_method])
def test_an_interrupted_call_leaves_nothing_behind(troupe: Troupe, wait: Callable) -> None:
    w0, w1 = troupe.start(2)
    w0.do(interrupted, _shortly(wait))
    time.sleep(1.5)  # the function ends, and leaves its answer to nobody
    w1.do(puppets.wait_until_entries, 0)
    w0.do(works)
    figures = w0.do(puppets.snapshot)
    assert figures["calls"]["pending"] == 0
    troupe.leave([w0, w1])


def _shortly(wait: Callable) -> Callable:
    return {
        wait_in_sync_call: _short_sync_call,
        wait_in_fetch: _short_fetch,
        wait_in_method: _short_method,
    }[wait]


def _short_sync_call() -> None:
    rpc.rpc_sync("w1", puppets.sleep, (1.0,), timeout=0)


def _short_fetch() -> None:
    rpc.remote("w1", puppets.make_slowly, (1.0, Cell())).to_here(timeout=0)


def _short_method() -> None:
    rpc.remote("w1", Cell).rpc_sync(timeout=0).get_slowly(1.0)


def fill_ring() -> None:
    while True:
        rpc.rpc_async("w1", puppets.echo, (b"x" * 2000,))


def use_up_credits() -> None:
    while True:
        rpc.remote("w1", puppets.nothing, timeout=0)


@pytest.mark.parametrize("wait", [fill_ring, use_up_credits, wait_in_sync_call])
def test_ctrl_c_ends_a_wait_for_a_stopped_worker(troupe: Troupe, wait: Callable) -> None:
    w0, w1 = troupe.start(2)
    w1.stop()
    w0.do(interrupted, wait)
    w0.do(interrupted, wait)
    w1.go_on()
    if wait is not wait_in_sync_call:
        w0.do(works)
    w1.kill()


def test_ctrl_c_ends_a_graceful_shutdown_and_the_process_can_start_again(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    w0.do(interrupted, rpc.shutdown)
    troupe.leave([w1])
    troupe.join([w0, w1])
    w0.do(works)
    troupe.leave([w0, w1])


def shut_down_while_a_call_is_under_way() -> None:
    rpc.rpc_async("w1", puppets.sleep, (LONG_S,))
    rpc.shutdown()


def test_ctrl_c_ends_a_shutdown_that_waits_for_a_call(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    w0.do(interrupted, shut_down_while_a_call_is_under_way)
    w1.do(puppets.wait_until_dead, "w0")


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_init_that_waits_for_others_and_the_process_can_start_again(troupe: Troupe, rank: int) -> None:
    w0, w1 = troupe.hire("w0"), troupe.hire("w1")
    early = (w0, w1)[rank]
    early.do(init_and_be_interrupted, early.name, rank, troupe.job)
    troupe.join([w0, w1])
    w0.do(works)
    troupe.leave([w0, w1])


def init_and_be_interrupted(name: str, rank: int, job: str) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    puppets.interrupt_after(DELAY_S)
    with pytest.raises(KeyboardInterrupt):
        puppets.join_job(name, rank, 2, job, {})
    assert sorted(os.listdir("/proc/self/fd")) == before


class Enough(Exception):
    """What the program's own handler raises."""


def be_told_by_handler(wait: Callable[[], None]) -> None:
    """SIGALRM has a handler that raises; SIGUSR1 one that does not."""

    def raise_enough(number: int, frame: Any) -> None:
        raise Enough

    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    signal.signal(signal.SIGALRM, raise_enough)
    for delay_s in (0.05, 0.1, 0.15):
        puppets.interrupt_after(delay_s, signal.SIGUSR1)
    puppets.interrupt_after(DELAY_S, signal.SIGALRM)
    try:
        wait()
    except Enough:
        assert heard, "the handler that does not raise was not run during the wait"
        return
    raise AssertionError("the wait came back")


@pytest.mark.parametrize("wait", WAITS)
def test_a_handler_that_raises_ends_the_wait_and_one_that_does_not_leaves_it(troupe: Troupe, wait: Callable) -> None:
    w0, _ = troupe.start(2)
    w0.do(be_told_by_handler, wait)
    w0.do(works)


def handler_that_calls(count: int) -> int:
    """A handler may itself call, in the middle of a call."""
    answers = []
    signal.signal(signal.SIGUSR1, lambda *_: answers.append(rpc.rpc_sync("w1", puppets.echo, (1,))))
    for i in range(count):
        puppets.interrupt_after(0.05 * (i + 1), signal.SIGUSR1)
    assert rpc.rpc_sync("w1", puppets.sleep, (0.05 * count + 0.5,)) > 0
    return sum(answers)


def test_a_handler_may_call_while_a_call_is_interrupted(troupe: Troupe) -> None:
    w0, _ = troupe.start(2)
    assert w0.do(handler_that_calls, 5) == 5


def interrupt_at_random(seed: int, rounds: int) -> int:
    """Interrupt calls, fetches and remotes at any moment, and check every answer that comes."""
    import random
    import threading

    rng = random.Random(seed)
    interruptions = 0
    interruptible = False
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(rng.uniform(0.0005, 0.01)):
            os.kill(os.getpid(), signal.SIGALRM)

    def raise_enough(number: int, frame: Any) -> None:
        nonlocal interruptible
        if interruptible:  # not between two rounds, and once in each
            interruptible = False
            raise Enough

    signal.signal(signal.SIGALRM, raise_enough)
    thread = threading.Thread(target=disturb)
    i = 0
    try:
        thread.start()
        while i < rounds:
            try:
                i += 1
                interruptible = True
                assert rpc.rpc_sync("w1", puppets.echo, (i,)) == i
                assert rpc.rpc_sync("w1", puppets.echo, (b"z" * 10_000,)) == b"z" * 10_000
                assert rpc.remote("w1", Cell, (i,)).rpc_sync().get() == i
                assert rpc.rpc_async("w1", puppets.make_slowly, (0.002, i)).wait() == i
                interruptible = False
            except Enough:
                interruptions += 1
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        done.set()
        thread.join()
    return interruptions


def test_interruptions_at_any_moment_mix_no_answers_up_and_leak_nothing(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    assert w0.do(interrupt_at_random, 1, 300) > 10
    w0.do(works)
    w1.do(puppets.wait_until_entries, 0)
    figures = w0.do(puppets.snapshot)
    assert figures["slots"]["free"] + figures["slots"]["abandoned"] == figures["slots"]["count"]
    assert figures["peers"]["w1"]["pins"] == 0
    troupe.leave([w0, w1])


def test_ctrl_c_at_a_worker_in_the_middle_of_serving_loses_no_call(troupe: Troupe) -> None:
    """The signal is for its main thread; the functions run on others."""
    w0, w1 = troupe.start(2)
    w0.do(puppets.keep_result, "future", rpc.rpc_async, "w1", puppets.make_slowly, (1.0, 5))
    w1.do(interrupted, _sleep_here)
    assert w0.do(puppets.call_kept, "future", "wait") == 5
    w0.do(puppets.drop_all)
    troupe.leave([w0, w1])


def _sleep_here() -> None:
    time.sleep(LONG_S)


def test_a_call_after_an_interrupted_one_has_its_own_deadline(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    w0.do(interrupted, wait_in_sync_call_with_deadline)
    with pytest.raises(FastrefError, match="timeout"):
        w0.do(rpc.rpc_sync, "w1", puppets.sleep, (LONG_S,), None, 0.2)
    w0.do(works)
    w1.kill()
