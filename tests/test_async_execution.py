"""Functions marked by ``async_execution``: their answer is the result of the future that they return."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import CallTimeout, RemoteError
from fastref.rpc.functions import async_execution
from fastref.rref import current_wiring
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3, [{}, {"transport": "tcp"}])

WAYS = ["sync", "async", "remote"]
_released: list[torch.futures.Future] = []


def run(way: str, to: str, function: Any, *args: Any) -> Any:
    """Call a function in one of three ways and return its result."""
    if way == "sync":
        return rpc.rpc_sync(to, function, args)
    if way == "async":
        return rpc.rpc_async(to, function, args).wait()
    return rpc.remote(to, function, args).to_here()


@async_execution
def add_elsewhere(to: str, a: Any, b: Any) -> Any:
    return rpc.rpc_async(to, work.add, (a, b)).then(lambda future: future.wait() + 1)


@async_execution
def done_already(value: Any) -> Any:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(value)
    return future


@async_execution
def no_future(value: Any) -> Any:
    return value


@async_execution
def fails_later() -> Any:
    future: torch.futures.Future = torch.futures.Future()
    threading.Timer(0.05, future.set_exception, (ValueError("later"),)).start()
    return future


@async_execution
def raises() -> Any:
    raise KeyError("at once")


@async_execution
def unpicklable() -> Any:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(threading.Lock())
    return future


class Adder:
    """Asynchronous methods of every kind."""

    def __init__(self, value: int) -> None:
        self.value = value

    @staticmethod
    @async_execution
    def static(to: str, a: int, b: int) -> Any:
        return rpc.rpc_async(to, work.add, (a, b))

    @classmethod
    @async_execution
    def of_class(cls, to: str, a: int, b: int) -> Any:
        return rpc.rpc_async(to, work.add, (a, b))

    @async_execution
    def bound(self, to: str, a: int) -> Any:
        return rpc.rpc_async(to, work.add, (self.value, a))


@pytest.mark.parametrize("way", WAYS)
@in_job
def test_the_answer_is_the_result_of_the_future(way: str) -> None:
    assert run(way, "w1", add_elsewhere, "w2", 1, 2) == 4
    assert run(way, "w1", add_elsewhere, "w1", 1, 2) == 4
    assert run(way, "w0", add_elsewhere, "w2", 1, 2) == 4
    assert run(way, "w1", done_already, "x") == "x"
    assert torch.equal(run(way, "w1", add_elsewhere, "w2", torch.zeros(100_000), 1), torch.full((100_000,), 2.0))


@pytest.mark.parametrize("way", WAYS)
@in_job
def test_methods_of_classes_and_references_may_be_marked(way: str) -> None:
    assert run(way, "w1", Adder.static, "w2", 1, 2) == 3
    assert run(way, "w1", Adder.of_class, "w2", 1, 2) == 3
    adder = rpc.remote("w1", Adder, (5,))
    for proxy in (adder.rpc_sync(), adder.rpc_async(), adder.remote()):
        result = proxy.bound("w2", 2)
        if isinstance(result, torch.futures.Future):
            result = result.wait()
        elif isinstance(result, rpc.RRef):
            result = result.to_here()
        assert result == 7


@pytest.mark.parametrize("way", WAYS)
@in_job
def test_errors_come_through(way: str) -> None:
    for function, kind, text in (
        (fails_later, ValueError, "later"),
        (raises, KeyError, "at once"),
        (unpicklable, TypeError, "pickle"),
    ):
        if way == "remote" and function is unpicklable:
            continue  # it is kept where it is, and need not travel
        with pytest.raises(kind, match=text) as caught:
            run(way, "w1", function)
        assert isinstance(caught.value, RemoteError)
    with pytest.raises(TypeError, match="must return a torch.futures.Future object, but got builtins.int"):
        run(way, "w1", no_future, 1)


def hold() -> Any:
    future: torch.futures.Future = torch.futures.Future()
    _released.append(future)
    return future


held = async_execution(hold)


@in_job
@pytest.mark.parametrize("way", ["sync", "async", "remote", "fetch"])
def test_nobody_waits_for_a_future_longer_than_its_caller(way: str) -> None:
    with pytest.raises(CallTimeout):
        if way == "sync":
            rpc.rpc_sync("w1", held, timeout=0.1)
        elif way == "async":
            rpc.rpc_async("w1", held, timeout=0.1).wait()
        elif way == "remote":
            rpc.remote("w1", held, timeout=0.1).to_here()
        else:
            rpc.remote("w1", held, timeout=0.2).to_here(timeout=0.1)
    while rpc.rpc_sync("w1", awaited):
        time.sleep(0.05)
    assert rpc.rpc_sync("w1", release_all) == 1  # it comes all the same, and reaches nobody
    assert rpc.rpc_sync("w1", work.add, (1, 2)) == 3


def release_all() -> int:
    count = len(_released)
    for future in _released:
        future.set_result("released")
    _released.clear()
    return count


def awaited() -> int:
    return current_wiring().futures_awaited


@in_job
def test_no_thread_waits_for_them() -> None:
    before = current_wiring().snapshot()["calls"]["threads"]
    futures = [rpc.rpc_async("w1", held) for _ in range(100)]
    while rpc.rpc_sync("w1", awaited) < 100:
        time.sleep(0.001)
    assert rpc.rpc_sync("w1", work.add, (1, 2)) == 3
    assert rpc.rpc_sync("w1", release_all) == 100
    assert torch.futures.wait_all(futures) == ["released"] * 100
    assert rpc.rpc_sync("w1", awaited) == 0
    assert current_wiring().snapshot()["calls"]["threads"] <= before + 1
