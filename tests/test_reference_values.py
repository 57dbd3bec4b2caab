"""References put to use: fetching values, calling methods, for how long, and with an owner that stands still."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import CallTimeout, RemoteError, UsageError
from fastref.rref import current_wiring
from tests import work
from tests.jobs import in_job, job_fixtures
from tests.stopping import stopped

jobs, job = job_fixtures(3, [{}, {"table_bits": 1}, {"table_bits": 0}])


# ---- fetching


@in_job
def test_every_fetch_returns_a_copy_of_its_own() -> None:
    rref = rpc.remote("w1", work.echo, args=([1, [2]],))
    first, second = rref.to_here(), rref.to_here()
    assert first == second == [1, [2]]
    assert first is not second
    first[1].append(3)
    assert rref.to_here() == [1, [2]]


@in_job
def test_a_fetch_sees_what_the_owner_has_changed() -> None:
    rref = rpc.remote("w1", work.echo, args=([],))
    for count in range(5):
        assert rref.to_here() == [0] * count
        rref.rpc_sync().append(0)


IMMUTABLE = [
    *(None, True, False, 0, -1, 2**62, 1.5, "", "text", "h\u00e9llo \N{SNOWMAN}", b"", b"\x00\xff", ()),
    *((1, "a", (b"b", None)), "x" * 40, "x" * 1000, b"x" * 100_000, tuple(range(500)), ("x" * 100,) * 50),
]


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_an_immutable_value_is_read_without_asking_its_owner() -> None:
    for value in IMMUTABLE:
        rref = rpc.remote("w1", work.echo, args=(value,))
        assert rref.to_here() == value  # waits until it is there
        asked = work.figures("calls", "fetched_by_message")
        served = rpc.rpc_sync("w1", work.figures, args=("calls", "served"))
        for _ in range(5):
            answer = rref.to_here()
            assert answer == value
            assert type(answer) is type(value)
        assert work.figures("calls", "fetched_by_message") == asked, value
        assert rpc.rpc_sync("w1", work.figures, args=("calls", "served")) == served + 1


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_a_value_that_was_fetched_by_message_is_published() -> None:
    kept = []
    for size in range(800_000, 800_000 + 4096 * 40, 4096):
        kept.append(rpc.remote("w1", bytes, args=(size,)))  # each needs memory that the owner's arena does not have yet
        kept[-1].to_here()
        asked = work.figures("calls", "fetched_by_message")
        assert len(kept[-1].to_here()) == size
        assert work.figures("calls", "fetched_by_message") == asked, len(kept)


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_a_local_value_that_is_immutable_is_read_by_others_without_asking() -> None:
    rref = rpc.RRef((1, "two"))
    rpc.rpc_sync("w1", work.keep, args=(rref,))
    before = rpc.rpc_sync("w1", work.figures, args=("calls", "fetched_by_message"))
    assert rpc.rpc_sync("w1", work.fetch_kept) == (1, "two")
    assert rpc.rpc_sync("w1", work.figures, args=("calls", "fetched_by_message")) == before
    assert rpc.rpc_sync("w1", work.drop) == 1


@in_job
def test_a_value_that_could_change_is_asked_for_every_time() -> None:
    for value in (bytearray(b"a"), {1}, [bytearray(b"a")], (1, {2: {3}}), work.Counter):
        rref = rpc.remote("w1", work.echo, args=(value,))
        asked = work.figures("calls", "fetched_by_message")
        for _ in range(3):
            assert rref.to_here() == value
        assert work.figures("calls", "fetched_by_message") == asked + 3


@in_job
def test_subclasses_of_immutable_types_keep_their_type() -> None:
    for value in (work.Name("a"), (work.Name("b"),)):
        rref = rpc.remote("w1", work.echo, args=(value,))
        for _ in range(2):
            answer = rref.to_here()
            assert answer == value
            assert type(answer) is type(value)
    assert type(rref.to_here()[0]) is work.Name


@in_job
def test_only_the_owner_has_the_local_value() -> None:
    rref = rpc.remote("w1", work.Counter)
    ids = f"rref_id={rref.rref_id()}, fork_id="
    with pytest.raises(UsageError) as caught:
        rref.local_value()
    assert str(caught.value).startswith(f"For UserRRef({ids}GloballyUniqueId(created_on=0, local_id=")
    assert str(caught.value).endswith(
        "can't call localValue() on user WorkerInfo(id=0, name=w0). Call it on owner WorkerInfo(id=1, name=w1)"
    )


@in_job
def test_fetches_wait_for_a_value_to_come() -> None:
    for owner in ("w1", "w0"):
        rref = rpc.remote(owner, work.SlowToMake, args=(0.15, 8))
        assert rref.to_here().get() == 8
        rref = rpc.remote(owner, work.SlowToMake, args=(0.15, 9))
        assert rpc.rpc_sync(owner, work.value_of, args=(rref,)).get() == 9
        rref = rpc.remote(owner, work.SlowToMake, args=(0.15, 10))
        assert rpc.rpc_sync("w2", work.look, args=(rref,))[2].get() == 10
    assert rpc.remote("w0", work.SlowToMake, args=(0.15, 11)).local_value().get() == 11


@in_job
def test_waiting_for_values_takes_no_thread_of_their_owner() -> None:
    slow = [rpc.remote("w1", work.SlowToMake, args=(0.3, number)) for number in range(4)]
    waiting = [rref.rpc_async().get() for rref in slow for _ in range(50)]
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
    assert work.figures("calls", "pending") >= 100  # the answer came before theirs
    assert [future.wait() for future in waiting] == [number for number in range(4) for _ in range(50)]


# ---- methods


@pytest.mark.parametrize("owner", ["w1", "w0"])
@in_job
def test_methods_run_where_the_value_lives(owner: str) -> None:
    rref = rpc.remote(owner, work.Counter, args=(5,))
    assert rref.rpc_sync().owner() == owner
    assert rref.rpc_async().owner().wait() == owner
    assert rref.remote().owner().to_here() == owner
    assert rref.remote().owner().owner_name() == owner
    assert rref.rpc_sync().add(amount=2) == 7
    assert rref.rpc_async().add(3).wait() == 10
    assert rref.remote().add().to_here() == 11
    assert rref.rpc_sync().get() == 11
    assert rref.rpc_sync().of_class(1) == ("Counter", 1)
    assert rref.rpc_sync().static(2) == 2
    assert rpc.RRef([3, 1, 2]).rpc_sync().index(1) == 1


@in_job
def test_methods_take_references_and_return_them() -> None:
    one, two = rpc.remote("w1", work.Counter, args=(1,)), rpc.remote("w2", work.Counter, args=(2,))
    assert one.rpc_sync().add_value_of(two) == 3
    assert two.rpc_sync().add_value_of(one) == 5
    assert one.rpc_sync().add_value_of(one) == 6
    local = rpc.RRef(work.Counter(10))
    assert one.rpc_sync().add_value_of(local) == 16
    assert one.rpc_sync().reference().rpc_sync().get() == 16


@in_job
def test_the_reference_to_a_methods_result_is_a_value_of_its_own() -> None:
    rref = rpc.remote("w1", work.Traced, args=(1,))
    inner = rref.remote().itself()
    assert inner.rref_id() != rref.rref_id()
    assert inner.rpc_sync().count() == 1
    del rref
    assert inner.rpc_sync().count() == 1
    del inner
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(0,)) == 0


@pytest.mark.parametrize("owner", ["w1", "w0"])
@in_job
def test_what_a_method_raises_is_raised(owner: str) -> None:
    rref = rpc.remote(owner, work.Counter)
    with pytest.raises(ValueError, match="no"):
        rref.rpc_sync().fail("no")
    with pytest.raises(ValueError, match="no"):
        rref.rpc_async().fail("no").wait()
    with pytest.raises(ValueError, match="no"):
        rref.remote().fail("no").to_here()
    with pytest.raises(AttributeError, match="no_such_method"):
        rref.rpc_sync().no_such_method()
    with pytest.raises(TypeError, match="not callable"):
        rref.rpc_sync().value()


@pytest.mark.parametrize("owner", ["w1", "w0"])
@in_job
def test_a_value_that_could_not_be_made_raises_wherever_it_is_asked_for(owner: str) -> None:
    rref = rpc.remote(owner, work.Counter().fail, args=("never",))
    failures: list[Callable[[], Any]] = [
        rref.to_here,
        rref.rpc_sync().get,
        lambda: rref.rpc_async().get().wait(),
        lambda: rref.remote().get().to_here(),
        lambda: rpc.rpc_sync("w2", work.look, args=(rref,)),
        lambda: rpc.rpc_sync(owner, work.look, args=(rref,)),
        lambda: rpc.rpc_sync(owner, work.value_of, args=(rref,)),
    ]
    if owner == "w0":
        failures.append(rref.local_value)
    for attempt in failures:
        for _ in range(2):
            with pytest.raises(ValueError, match="never") as caught:
                attempt()
            assert isinstance(caught.value, RemoteError)
    assert rref.confirmed_by_owner()


# ---- time


@in_job
def test_a_fetch_that_takes_too_long_can_be_tried_again() -> None:
    for owner in ("w1", "w0"):
        rref = rpc.remote(owner, work.SlowToMake, args=(0.3, 5))
        with pytest.raises(CallTimeout, match="RPC ran for more than"):
            rref.to_here(timeout=0.05)
        assert rref.to_here(timeout=0).get() == 5
    assert rref.to_here(0.001) is rref.local_value()


@in_job
def test_a_local_value_that_takes_too_long_can_be_tried_again() -> None:
    rref = rpc.remote("w0", work.SlowToMake, args=(0.3, 5))
    with pytest.raises(CallTimeout, match="RPC ran for more than"):
        rref.local_value(timeout=0.05)
    assert rref.local_value().get() == 5


@in_job
def test_a_method_that_takes_too_long_is_given_up() -> None:
    for owner in ("w1", "w0"):
        rref = rpc.remote(owner, work.Counter)
        rref.rpc_sync().get()
        for attempt in (
            lambda: rref.rpc_sync(timeout=0.05).sleep(0.5),  # noqa: B023
            lambda: rref.rpc_async(timeout=0.05).sleep(0.5).wait(),  # noqa: B023
        ):
            with pytest.raises(CallTimeout, match=r"more than set timeout \(50 ms\)"):
                attempt()
        assert rref.rpc_sync(timeout=0).sleep(0.05) == 0.05
        assert rref.rpc_sync(timeout=5).get() == 0


@in_job
def test_a_timeout_given_to_remote_covers_the_value() -> None:
    rref = rpc.remote("w1", work.SlowToMake, args=(0.4,), timeout=0.05)
    time.sleep(0.1)
    with pytest.raises(CallTimeout) as caught:
        rref.to_here()
    assert str(caught.value) == (
        "RRef creation via rpc.remote() timed out, and it is possible that the RRef on the owner node does not exist."
    )


# ---- an owner that stands still


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_published_values_are_fetched_from_a_stopped_owner() -> None:
    rrefs = [rpc.remote("w1", work.echo, args=(value,)) for value in IMMUTABLE]
    for rref in rrefs:
        rref.to_here()
    with stopped(rpc.rpc_sync("w1", os.getpid)):
        for _ in range(3):
            assert [rref.to_here() for rref in rrefs] == IMMUTABLE
        assert all(rref.confirmed_by_owner() for rref in rrefs)


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_references_are_handed_on_and_let_go_of_while_their_owner_is_stopped() -> None:
    kept = [rpc.remote("w1", work.echo, args=(number,)) for number in range(20)]
    dropped = [rpc.remote("w1", work.Traced) for _ in range(20)]
    assert [rref.to_here() for rref in kept] == list(range(20))
    rpc.rpc_sync("w2", work.keep, args=dropped)
    with stopped(rpc.rpc_sync("w1", os.getpid)):
        assert rpc.rpc_sync("w2", work.total, args=(kept,)) == sum(range(20))
        assert rpc.rpc_sync("w2", work.keep, args=kept) == 40
        assert rpc.rpc_sync("w2", work.get_kept).to_here() == 19
        del dropped, kept
        assert rpc.rpc_sync("w2", work.fetch_kept) == 19
        assert rpc.rpc_sync("w2", work.drop) == 40
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(0,)) == 0


@in_job
def test_a_remote_call_to_a_stopped_worker_returns_a_reference() -> None:
    rpc.remote("w1", work.nothing).to_here()
    with stopped(rpc.rpc_sync("w1", os.getpid)):
        rrefs = [rpc.remote("w1", work.echo, args=(number,)) for number in range(10)]
        future = rpc.rpc_async("w1", work.echo, args=(11,))
        with pytest.raises(CallTimeout):
            rpc.rpc_sync("w1", work.nothing, timeout=0.05)
        assert not any(rref.confirmed_by_owner() for rref in rrefs)
        assert not future.done()
    assert [rref.to_here() for rref in rrefs] == list(range(10))
    assert future.wait() == 11


def fetch_repeatedly(rref: rpc.RRef) -> None:
    for _ in range(1000):
        rref.to_here()


def take_and_drop_repeatedly(rref: rpc.RRef) -> None:
    """Do what the arrival and the end of a handle do, a thousand times, on an entry that is let go of each time."""
    holder = current_wiring().peers[1].holder
    index, generation = work.entry_of(rref)
    count = holder.count(index)
    for _ in range(count):
        holder.release(index)
    for _ in range(1000):
        holder.acquire_unpinned(index, generation)
        holder.release(index)
    for _ in range(count):
        holder.acquire_unpinned(index, generation)


@pytest.mark.shared_memory("published values are read there")
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: nothing counts system calls")
@pytest.mark.parametrize("act", [fetch_repeatedly, take_and_drop_repeatedly])
@in_job
def test_fetching_published_values_and_holding_references_takes_no_system_call(act: Callable[..., None]) -> None:
    if act is take_and_drop_repeatedly and current_wiring().bits == 0:
        pytest.skip("without a bit in the owner's table a reference is held by messages")
    rref = rpc.remote("w1", work.echo, args=(5,))
    assert rref.to_here() == 5
    rpc.rpc_sync("w2", work.keep, args=(rref,))  # it stays alive whatever this worker does
    act(rref)
    counts = [_system_calls_during(lambda: act(rref)) for _ in range(5)]
    # The interpreter's own threads may ask for its lock meanwhile; a call of ours would be there every time.
    assert min(counts) == 0
    assert rpc.rpc_sync("w2", work.drop) == 1


def _system_calls_during(act: Callable[[], None]) -> int:
    log = Path(os.environ["FASTREF_RUN_DIR"]).parent / f"strace-{os.getpid()}"
    tracer = subprocess.Popen(
        ["strace", "-qq", "-o", str(log), "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True
    )
    try:
        while "TracerPid:\t0" in Path("/proc/thread-self/status").read_text():
            if tracer.poll() is not None:
                pytest.skip(f"this process may not be traced: {tracer.stderr.read().strip()}")
            time.sleep(0.01)
        _mark("begin")
        act()
        _mark("end")
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()
    text = log.read_text()
    log.unlink()
    return len(text.partition('"begin"')[2].partition('"end"')[0].splitlines()) - 2  # the marks' own two lines


def _mark(word: str) -> None:
    """Leave a line in the trace: a write to nowhere."""
    with pytest.raises(OSError):
        os.write(-1, word.encode())
