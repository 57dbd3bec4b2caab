"""Futures: torch's own to torch, awaitable to asyncio, each with the answer of its call."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import CallTimeout, RemoteError
from fastref.futures import Future
from tests import failing, work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3)


@in_job
def test_a_future_is_a_future_of_torch() -> None:
    future = rpc.rpc_async("w1", work.add, args=(1, 2))
    assert isinstance(future, torch.futures.Future)
    assert isinstance(future, Future)
    assert future.wait() == future.wait() == future.value() == 3
    assert future.done()


@in_job
def test_a_future_is_not_done_before_its_answer_is_there() -> None:
    future = rpc.rpc_async("w1", work.sleep, args=(0.1,))
    assert not future.done()
    assert future.wait() == 0.1
    assert future.done()


@in_job
def test_torch_waits_for_futures_and_collects_them() -> None:
    futures = [rpc.rpc_async(f"w{i % 3}", work.add, args=(i, i)) for i in range(100)]
    assert torch.futures.wait_all(futures) == [2 * i for i in range(100)]
    futures = [rpc.rpc_async(f"w{i % 3}", work.sleep, args=(0.01 * i,)) for i in range(6)]
    collected = torch.futures.collect_all(futures).wait()
    assert [future.value() for future in collected] == [0.01 * i for i in range(6)]


@in_job
def test_what_a_call_raised_is_raised_by_its_future() -> None:
    future = rpc.rpc_async("w1", failing.make_and_raise, args=("Complete", 5, "why"))
    for _ in range(3):
        with pytest.raises(failing.Complete, match="code 5: why") as caught:
            future.wait()
        assert isinstance(caught.value, RemoteError)
        assert (caught.value.code, caught.value.reason) == (5, "why")
    with pytest.raises(failing.Complete):
        future.value()
    assert future.done()
    with pytest.raises(failing.Complete):
        torch.futures.wait_all([rpc.rpc_async("w1", work.nothing), future])


@in_job
def test_a_future_that_failed_keeps_nothing_alive() -> None:
    def fail() -> None:
        rref = rpc.remote("w1", work.Traced)
        future = rpc.rpc_async("w1", failing.outer, args=("text",))
        assert rref.rpc_sync().count() == 0
        with pytest.raises(ValueError, match="text"):
            future.wait()

    fail()
    gc.collect()
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(0,)) == 0


@in_job
def test_a_call_given_up_fails_its_future_once() -> None:
    seen: list[Any] = []
    future = rpc.rpc_async("w1", work.sleep, args=(0.2,), timeout=0.05)
    future.add_done_callback(lambda done: seen.append(done.done()))
    with pytest.raises(CallTimeout, match=r"more than set timeout \(50 ms\)"):
        future.wait()
    assert rpc.rpc_sync("w1", work.sleep, args=(0.25,)) == 0.25  # the late answer has come meanwhile
    with pytest.raises(CallTimeout):
        future.wait()
    assert seen == [True]


# ---- callbacks


@in_job
def test_callbacks_run_when_the_answer_comes() -> None:
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    future = rpc.rpc_async("w1", work.sleep, args=(0.05,))
    chained = future.then(lambda done: done.value() * 2).then(lambda done: [done.wait()])
    future.add_done_callback(lambda done: results.put(done.value()))
    assert chained.wait() == [0.1]
    assert future.then(lambda done: done.value()).wait() == 0.05  # of one that is done already
    assert results.get() == 0.05


@in_job
def test_a_callback_sees_what_the_call_raised() -> None:
    def describe(done: torch.futures.Future[Any]) -> str:
        try:
            done.wait()
        except ValueError as error:
            return str(error.__cause__)
        return "nothing"

    assert rpc.rpc_async("w1", failing.outer, args=("text",)).then(describe).wait() == "text"
    failed = rpc.rpc_async("w1", work.nothing).then(lambda _: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        failed.wait()
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3


@in_job
def test_a_callback_may_make_calls() -> None:
    reached = threading.Event()
    future = rpc.rpc_async("w1", work.add, args=(1, 2))

    def go_on(done: torch.futures.Future[Any]) -> torch.futures.Future[Any]:
        reached.set()
        return rpc.rpc_async("w2", work.add, args=(done.value(), 10))

    assert future.then(go_on).wait().wait() == 13
    assert reached.is_set()


@in_job
def test_a_callback_that_raises_disturbs_no_other_answer() -> None:
    futures = []
    for number in range(50):
        future = rpc.rpc_async("w1", work.echo, args=(number,))
        future.add_done_callback(lambda _: 1 / 0)
        futures.append(future)
    assert [future.wait() for future in futures] == list(range(50))


@in_job
def test_a_future_made_by_the_program_works_too() -> None:
    future: Future[int] = Future()
    threading.Timer(0.05, future.set_result, args=(5,)).start()
    assert future.wait() == 5


# ---- asyncio


@in_job
def test_a_future_can_be_awaited() -> None:
    async def main() -> None:
        assert await rpc.rpc_async("w1", work.add, args=(1, 2)) == 3
        assert await rpc.rpc_async("w1", work.sleep, args=(0.05,)) == 0.05
        future = rpc.rpc_async("w1", work.add, args=(3, 4))
        future.wait()
        assert await future == 7
        assert await future == 7
        assert await rpc.remote("w1", work.Counter, args=(5,)).rpc_async().get() == 5

    asyncio.run(main())


@in_job
def test_what_a_call_raised_is_raised_where_it_is_awaited() -> None:
    async def main() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="text") as caught:
                await rpc.rpc_async("w1", failing.outer, args=("text",))
            assert isinstance(caught.value, RemoteError)
        with pytest.raises(CallTimeout):
            await rpc.rpc_async("w1", work.sleep, args=(0.1,), timeout=0.02)
        results = await asyncio.gather(
            *(rpc.rpc_async("w1", failing.outer, args=(str(i),)) for i in range(5)), return_exceptions=True
        )
        assert [str(error.__cause__) for error in results] == ["0", "1", "2", "3", "4"]

    asyncio.run(main())


@in_job
def test_many_futures_are_awaited_at_once() -> None:
    async def one(number: int) -> int:
        first = await rpc.rpc_async(f"w{number % 3}", work.add, args=(number, 1))
        return await rpc.rpc_async(f"w{(number + 1) % 3}", work.add, args=(first, 1))

    async def main() -> None:
        assert await asyncio.gather(*(one(number) for number in range(1000))) == [n + 2 for n in range(1000)]

    asyncio.run(main())


@in_job
def test_the_loop_goes_on_while_a_future_is_awaited() -> None:
    async def main() -> None:
        slow = asyncio.ensure_future(_awaited(rpc.rpc_async("w1", work.sleep, args=(0.2,))))
        ticks = 0
        while not slow.done():
            ticks += 1
            await asyncio.sleep(0.01)
        assert ticks >= 2
        assert await slow == 0.2

    asyncio.run(main())


@in_job
def test_a_task_that_is_cancelled_leaves_its_call_alone() -> None:
    async def main() -> None:
        future = rpc.rpc_async("w1", work.sleep, args=(0.1,))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(future), timeout=0.02)
        assert await future == 0.1

    asyncio.run(main())


async def _awaited(future: Any) -> Any:
    return await future


# ---- many


@in_job
def test_ten_thousand_calls_in_flight_are_all_answered() -> None:
    futures = [rpc.rpc_async(f"w{1 + i % 2}", work.add, args=(i, i)) for i in range(10_000)]
    assert torch.futures.wait_all(futures) == [2 * i for i in range(10_000)]
    assert work.figures("calls", "pending") == 0


@in_job
def test_answers_are_right_whatever_their_size_and_order() -> None:
    futures = []
    for number in range(400):
        size = (number * 7919) % 20_000
        call = (bytes(size), number)
        futures.append((call, rpc.rpc_async(f"w{number % 3}", work.sleep_and_echo, args=(0.001 * (number % 5), call))))
    for call, future in reversed(futures):
        assert future.wait() == call


@in_job
def test_threads_that_share_futures_all_see_the_answer() -> None:
    seen: list[Any] = []
    future = rpc.rpc_async("w1", work.sleep, args=(0.1,))
    threads = [threading.Thread(target=lambda: seen.append(future.wait())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0.1] * 20


@in_job
def test_a_future_nobody_waits_for_is_no_trouble() -> None:
    for number in range(200):
        rpc.rpc_async("w1", work.add, args=(number, 1))
        rpc.rpc_async("w1", failing.outer, args=("text",))
    deadline = time.monotonic() + 10
    while work.figures("calls", "pending") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert work.figures("calls", "pending") == 0
