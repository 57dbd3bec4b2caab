"""What fastref does on purpose as torch does not: each a job of two workers that comes to its end on fastref alone.

The names come from the module that ``$FASTREF_DIFFERENCES_FROM`` says, ``fastref.rpc`` by default.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["DIFFERENCES", "KILLS", "MEMBERS", "MODULE_VARIABLE", "WHOLE", "work"]

MODULE_VARIABLE = "FASTREF_DIFFERENCES_FROM"
MEMBERS = 2
THREADS = 2

rpc: Any = importlib.import_module(os.environ.get(MODULE_VARIABLE, "fastref.rpc"))

# Bodies by name. Each runs on w0 while w1 serves; those in WHOLE run on both, and join and leave themselves.
DIFFERENCES: dict[str, Callable[..., None]] = {}
WHOLE: set[str] = set()
KILLS: set[str] = set()


def difference(body: Callable[[], None]) -> Callable[[], None]:
    """Add a body that runs on w0."""
    DIFFERENCES[body.__name__] = body
    return body


def fatal_difference(body: Callable[[], None]) -> Callable[[], None]:
    """Add a body that runs on w0 and kills w1."""
    KILLS.add(body.__name__)
    return difference(body)


def whole_difference(body: Callable[[int, str], None]) -> Callable[[int, str], None]:
    """Add a body that runs on both workers, with its rank and a path to meet at."""
    DIFFERENCES[body.__name__] = body
    WHOLE.add(body.__name__)
    return body


def join(rank: int, meeting: str) -> Any:
    """Join the job."""
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=THREADS, init_method=f"file://{meeting}")
    return rpc.init_rpc(f"w{rank}", rank=rank, world_size=MEMBERS, rpc_backend_options=options)


def work(name: str, rank: int, meeting: str) -> None:
    """Be a worker of one job."""
    if name in WHOLE:
        DIFFERENCES[name](rank, meeting)
        return
    join(rank, meeting)
    if rank == 0:
        DIFFERENCES[name]()
    rpc.shutdown()


# ---- what the jobs call


class Custom(Exception):
    """Takes two arguments, as many classes of programs do."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _custom, (self.code, self.reason)


def _custom(code: int, reason: str) -> Custom:
    return Custom(code, reason=reason)


def raise_custom() -> None:
    raise Custom(3, reason="why not")


def raise_key_error() -> None:
    raise KeyError("k")


def raise_value_error(text: str) -> None:
    raise ValueError(text)


def map_over(function: Callable[[int], int], numbers: list[int]) -> list[int]:
    return [function(number) for number in numbers]


class Thing:
    """A value with a method, made in a while."""

    def __init__(self, seconds: float = 0) -> None:
        time.sleep(seconds)

    def answer(self) -> int:
        return 42

    def fail(self) -> None:
        raise_key_error()


class Abroad:
    """Can be pickled, and not unpickled anywhere but where it was."""

    def __reduce__(self) -> tuple[Any, ...]:
        return refuse_elsewhere, (os.getpid(),)


def refuse_elsewhere(pid: int) -> Abroad:
    if pid != os.getpid():
        raise LookupError("no such thing on this worker")
    return Abroad()


def take(*arguments: Any) -> None:
    """Take and drop."""


def keep(rref: Any) -> None:
    _kept.append(rref)


_kept: list[Any] = []
_event = threading.Event()


def wait_for_event() -> int:
    _event.wait()
    return 1


def set_event() -> None:
    _event.set()


def owned() -> int:
    """Return how many values on this worker others know of."""
    return int(rpc._rref_context_get_debug_info()["num_owner_rrefs"])


def forks() -> int:
    """Return how many references others have to values on this worker."""
    return int(rpc._rref_context_get_debug_info()["num_forks"])


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for as long as it takes; the watchdog knows how long that may be."""
    while not condition():
        time.sleep(0.01)


def kill_w1() -> None:
    os.kill(rpc.rpc_sync("w1", os.getpid), signal.SIGKILL)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Let those who wait for the event go on at the end."""
    try:
        yield
    finally:
        _event.set()


# ---- calls


def nest(depth: int) -> int:
    other = f"w{1 - rpc.get_worker_info().id}"
    return 1 + rpc.rpc_sync(other, nest, (depth - 1,)) if depth else 0


@difference
def calls_nested_deeper_than_there_are_threads_come_back() -> None:
    assert rpc.rpc_sync("w1", nest, (8,)) == 8


@difference
def many_nested_calls_at_once_come_back() -> None:
    futures = [rpc.rpc_async("w1", nest, (4,)) for _ in range(8)]
    assert [future.wait() for future in futures] == [4] * 8


@difference
def wait_all_of_calls_may_be_nested() -> None:
    with rpc.api._wait_all():
        outer = rpc.rpc_async("w1", time.sleep, (0.2,))
        with rpc.api._wait_all():
            inner = rpc.rpc_async("w1", time.sleep, (0.1,))
        assert inner.done()
    assert outer.done()


@difference
def wait_all_of_futures_waits_for_all_before_it_raises() -> None:
    futures = [rpc.rpc_async("w1", raise_key_error), rpc.rpc_async("w1", time.sleep, (0.5,))]
    with pytest.raises(RuntimeError):
        torch.futures.wait_all(futures)
    assert all(future.done() for future in futures)


@difference
def a_signal_interrupts_a_call() -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(InterruptedError):
        rpc.rpc_sync("w1", wait_for_event)
    rpc.rpc_sync("w1", set_event)


@difference
def an_operator_does_elsewhere_what_it_does_here() -> None:
    assert torch.equal(rpc.rpc_sync("w1", torch.add, (1, 2)), torch.add(1, 2))
    with pytest.raises(ValueError, match="math domain error"):
        rpc.rpc_sync("w1", math.sqrt, (-1.0,))


@difference
def wrong_arguments_of_an_operator_are_noticed_where_it_runs() -> None:
    future, rref = rpc.rpc_async("w1", torch.add, ("a", 1)), rpc.remote("w1", torch.add, ("a", 1))
    for use in (future.wait, rref.to_here):
        with pytest.raises(RuntimeError, match="torch operator invoked from Python failed to match any schema"):
            use()


# ---- timeouts


@difference
def a_wait_for_a_value_of_ones_own_has_a_timeout() -> None:
    with released():
        rref = rpc.remote("w0", wait_for_event)
        with pytest.raises(RuntimeError, match="ran for more than"):
            rref.to_here(timeout=0.2)
    assert rref.to_here(timeout=30) == 1


@difference
def a_value_made_on_the_own_worker_has_a_timeout() -> None:
    with released():
        rref = rpc.remote("w0", wait_for_event, timeout=0.2)
        with pytest.raises(RuntimeError, match="timed out"):
            rref.to_here()


@difference
def the_default_timeout_does_not_cover_how_long_a_value_takes() -> None:
    rpc._set_rpc_timeout(0.5)
    rref = rpc.remote("w1", Thing, (1.5,))
    time.sleep(2)
    assert rref.rpc_sync(timeout=30).answer() == 42
    rpc._set_rpc_timeout(60)


@difference
def a_method_that_ran_into_its_timeout_may_be_called_again() -> None:
    rref = rpc.remote("w1", Thing, (1,))
    with pytest.raises(RuntimeError, match="ran for more than"):
        rref.rpc_sync(timeout=0.1).answer()
    time.sleep(1.5)
    assert rref.rpc_sync().answer() == 42


@difference
def a_value_that_came_after_its_timeout_is_dropped() -> None:
    rref = rpc.remote("w1", Thing, (1,), timeout=0.1)
    with pytest.raises(RuntimeError):
        rref._get_future().wait()
    del rref
    time.sleep(1.5)
    wait_until(lambda: rpc.rpc_sync("w1", owned) == 0)


# ---- errors


@difference
def the_text_of_an_exception_arrives_as_it_was_written() -> None:
    for text in ("déjà vu, 日本", r"C:\Users\name\x41", "a\\nb"):
        for raises in (
            lambda text=text: rpc.rpc_sync("w1", raise_value_error, (text,)),
            lambda text=text: rpc.remote("w1", raise_value_error, (text,)).to_here(),
        ):
            with pytest.raises(ValueError) as caught:
                raises()
            assert repr(text) in str(caught.value)


@difference
def an_exception_keeps_its_type_on_every_way() -> None:
    rref = rpc.remote("w1", Thing)
    for raises in (
        lambda: rpc.rpc_sync("w1", raise_key_error),
        lambda: rpc.rpc_async("w1", raise_key_error).wait(),
        lambda: rpc.remote("w1", raise_key_error).to_here(),
        lambda: rref.rpc_sync().fail(),
        lambda: rref.rpc_async().fail().wait(),
        lambda: rref.remote().fail().to_here(),
    ):
        with pytest.raises(KeyError):
            raises()


@difference
def an_exception_whose_class_takes_several_arguments_has_them() -> None:
    for raises in (
        lambda: rpc.rpc_sync("w1", raise_custom),
        lambda: rpc.rpc_async("w1", raise_custom).wait(),
        lambda: rpc.remote("w1", raise_custom).to_here(),
    ):
        with pytest.raises(Custom) as caught:
            raises()
        assert (caught.value.code, caught.value.reason) == (3, "why not")


@difference
def an_exception_has_the_original_as_its_cause_and_the_traceback_apart() -> None:
    with pytest.raises(ValueError) as caught:
        rpc.rpc_sync("w1", raise_value_error, ("text",))
    assert repr(caught.value.__cause__) == "ValueError('text')"
    assert "in raise_value_error" in caught.value.remote_traceback


def redirect() -> None:
    sys.stderr = io.StringIO()


def printed() -> str:
    return sys.stderr.getvalue()  # type: ignore[attr-defined]


@difference
def what_a_function_raises_is_not_printed_where_it_ran() -> None:
    rpc.rpc_sync("w1", redirect)
    with pytest.raises(KeyError):
        rpc.remote("w1", raise_key_error).to_here()
    assert rpc.rpc_sync("w1", printed) == ""


@difference
def a_method_that_is_not_there_is_noticed_when_its_result_is_used() -> None:
    result = rpc.remote("w1", Thing).remote().no_such_method()
    with pytest.raises(AttributeError):
        result.to_here()


# ---- creations that fail


@difference
def a_reference_whose_argument_could_not_be_read_tells_so() -> None:
    rref = rpc.remote("w1", take, (Abroad(),))
    with pytest.raises(RuntimeError, match="no such thing on this worker"):
        rref.to_here(timeout=5)


@fatal_difference
def a_reference_on_a_worker_that_is_dead_names_it() -> None:
    rref = rpc.remote("w1", wait_for_event)
    kill_w1()
    for fetches in (lambda: rref.to_here(timeout=5), lambda: rpc.remote("w1", Thing).to_here(timeout=5)):
        with pytest.raises(RuntimeError, match="w1"):
            fetches()


@difference
def arguments_of_which_one_cannot_be_pickled_leave_nothing_behind() -> None:
    mine, theirs = rpc.RRef(1), rpc.remote("w1", Thing)
    theirs.to_here()
    for to in ("w0", "w1"):
        for call in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
            with pytest.raises(TypeError, match="pickle"):
                call(to, take, (mine, theirs, threading.Lock()))
    assert forks() == 0
    assert owned() == 0
    del theirs
    wait_until(lambda: rpc.rpc_sync("w1", owned) == 0)


# ---- deaths


@fatal_difference
def a_call_of_a_worker_that_dies_names_it() -> None:
    future = rpc.rpc_async("w1", wait_for_event)
    kill_w1()
    with pytest.raises(RuntimeError, match="w1"):
        future.wait()


@fatal_difference
def what_only_a_dead_worker_held_is_dropped() -> None:
    rref = rpc.RRef(Thing())
    rpc.rpc_sync("w1", keep, (rref,))
    assert forks() == 1
    kill_w1()
    wait_until(lambda: forks() == 0)


@fatal_difference
def a_worker_leaves_though_another_one_is_dead() -> None:
    kill_w1()


# ---- joining and leaving


@whole_difference
def a_job_may_be_joined_again_with_references_to_the_one_before_alive(rank: int, meeting: str) -> None:
    before = []
    for number in range(3):
        join(rank, f"{meeting}-{number}")
        if rank == 0:
            rref = rpc.remote("w1", Thing)
            assert rref.rpc_sync().answer() == 42
            before.append(rref)
            other = rpc.remote("w1", Thing)
            other.to_here()
            assert rpc.rpc_sync("w1", owned) == 2
            del other
            wait_until(lambda: rpc.rpc_sync("w1", owned) == 1)
        rpc.shutdown()
    for rref in before:
        with pytest.raises(RuntimeError):
            rref.to_here()


@whole_difference
def workers_that_disagree_on_the_world_size_are_told_who_says_what(rank: int, meeting: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=10, init_method=f"file://{meeting}")
    with pytest.raises(RuntimeError, match="world_size: 'w1' .* says 3, 'w0' .* says 2"):
        rpc.init_rpc(f"w{rank}", rank=rank, world_size=MEMBERS + rank, rpc_backend_options=options)


@whole_difference
def another_backend_does_not_hide_the_default_one(rank: int, meeting: str) -> None:
    rpc.backend_registry.register_backend("ANOTHER", lambda rpc_timeout, init_method: None, lambda **arguments: None)
    join(rank, meeting)
    rpc.shutdown()
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{meeting}-again")
    rpc.init_rpc(f"w{rank}", rpc.BackendType.TENSORPIPE, rank, MEMBERS, options)
    rpc.shutdown()


@whole_difference
def leaving_twice_is_leaving_once(rank: int, meeting: str) -> None:
    join(rank, meeting)
    rpc.shutdown()
    rpc.shutdown()


@difference
def a_timeout_beyond_all_clocks_is_none() -> None:
    for timeout in (math.inf, 1e10):
        assert rpc.rpc_sync("w1", divmod, (7, 2), timeout=timeout) == (3, 1)


@difference
def a_function_without_a_name_can_be_called_and_sent() -> None:
    offset = 3
    assert rpc.rpc_sync("w1", lambda number: number + offset, (4,)) == 7
    assert rpc.rpc_sync("w1", map_over, (lambda number: number + offset, [1, 2])) == [4, 5]


@whole_difference
def a_job_may_be_joined_for_the_time_of_a_with_statement(rank: int, meeting: str) -> None:
    with join(rank, meeting):
        assert rpc.rpc_sync("w1", divmod, (7, 2)) == (3, 1)


@whole_difference
def a_worker_that_leaves_a_group_lets_go_of_what_it_held(rank: int, meeting: str) -> None:
    address, held = Path(f"{meeting}-address"), Path(f"{meeting}-held")
    if rank == 0:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
    else:
        wait_until(address.exists)
        port = int(address.read_text())
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=THREADS, init_method=f"tcp://localhost:{port}")
    if rank == 1:
        rpc.init_rpc("w1", rank=1, rpc_backend_options=options)
        rref = rpc.remote("w0", Thing)
        assert rref.rpc_sync().answer() == 42
        held.touch()
        rpc.shutdown()
        return
    unfinished = address.with_suffix(".new")
    unfinished.write_text(str(port))
    rpc.init_rpc("w0", rank=0, rpc_backend_options=options)
    unfinished.rename(address)
    wait_until(held.exists)
    wait_until(lambda: owned() == 0)
    rpc.shutdown()
