"""Published values when something comes between: garbage, threads, signals, owners that stand still or that lie."""

from __future__ import annotations

import gc
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

import fastref.rpc as rpc
from fastref._core import arm_failpoints
from fastref.errors import CallTimeout, ProtocolError
from fastref.rref import current_wiring
from tests import work
from tests.jobs import in_job, job_fixtures

pytestmark = pytest.mark.shared_memory("published values are read there")

jobs, job = job_fixtures(2)


def published_entries() -> list[int]:
    """Return the entries of this worker's table in whose descriptor something is published."""
    table = current_wiring().table
    return [index for index in table.snapshot()["entries"] if table.holder.published(index) is not None]


def full(size: int, number: float) -> torch.Tensor:
    return torch.full((size,), float(number))


# ---- garbage is collected, and code of the program runs with it


def expose_while_collecting(rref: rpc.RRef) -> list[int]:
    """Have code of the program get the value whenever garbage is collected; return what was published then."""
    found: list[int] = []
    busy = [False]

    def look(phase: str, info: dict[str, int]) -> None:
        if not busy[0]:
            busy[0] = True
            rref.local_value()
            found.append(len(published_entries()))
            busy[0] = False

    assert len(published_entries()) == 1
    thresholds = gc.get_threshold()
    gc.callbacks.append(look)
    busy[0] = True
    gc.set_threshold(1)
    busy[0] = False
    try:
        rref.local_value()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(look)
    found.append(len(published_entries()))
    return found


@in_job
def test_a_value_is_withdrawn_before_garbage_that_is_collected_reaches_it() -> None:
    for _ in range(5):
        rref = rpc.remote("w1", full, args=(3, 1))
        rref.to_here()
        assert set(rpc.rpc_sync("w1", expose_while_collecting, args=(rref,))) == {0}
        del rref


# ---- several threads publish


class Overtaken:
    """A value that is published, or withdrawn, once more while it is encoded: by what runs then in another thread."""

    def __init__(self) -> None:
        self.number = 1
        self.overtake: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        number, overtake = self.number, self.overtake
        self.overtake = None
        if overtake is not None:
            overtake()
        return int, (number,)


def publish_overtaken(then: str) -> rpc.RRef:
    value = Overtaken()
    rref = rpc.RRef(value)

    def overtake() -> None:
        value.number = 2
        getattr(rref, then)()

    value.overtake = overtake
    rref.publish()
    return rref


@pytest.mark.parametrize("then", ["publish", "unpublish"])
@in_job
def test_a_version_that_was_overtaken_is_not_shown_any_more(then: str) -> None:
    rref = rpc.rpc_sync("w1", publish_overtaken, args=(then,))
    for _ in range(3):
        assert rref.to_here() == 2


# ---- signals


class Interrupted(Exception):
    """Raised by the handler."""


def interrupt(number: int, frame: Any) -> None:
    raise Interrupted


@in_job
def test_a_publication_that_is_interrupted_leaves_nothing_behind() -> None:
    before = work.figures("arena", "blocks"), work.figures("table", "used")
    rref = rpc.RRef(full(3000, 1))
    previous = signal.signal(signal.SIGALRM, interrupt)
    interruptions = 0
    try:
        for i in range(3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + i % 300))
                rref.publish()
                while True:  # until it comes
                    pass
            except Interrupted:
                interruptions += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interruptions == 3000
    rref.publish()
    rref.unpublish()
    del rref
    deadline = time.monotonic() + 20
    while (work.figures("arena", "blocks"), work.figures("table", "used")) != before:
        assert time.monotonic() < deadline, (before, work.figures("arena"), work.figures("table", "used"))
        time.sleep(0.01)


# ---- owners that stand still, or lie


class Version:
    """An owner of a value that it publishes."""

    def __init__(self) -> None:
        self.rref = rpc.RRef([7])
        self.rref.publish()

    def reference(self) -> rpc.RRef:
        return self.rref

    def publish(self) -> None:
        self.rref.publish()

    def lie(self, form: int, flags: int, size: int, first: int, second: int) -> None:
        """Write over what is published, as no owner does; `second` -1: an entry that is open, the value's own."""
        (index,) = published_entries()
        memory = memoryview(current_wiring()._memory.descriptors).cast("B")
        if second == -1:
            second = struct.unpack_from("I", memory, index * 128)[0] << 32 | index
        struct.pack_into("=IIIQQQ", memory, index * 128 + 20, form, flags, 0, size, first, second)


@in_job
def test_a_reader_does_not_wait_for_an_owner_that_is_stopped_in_the_middle_of_a_change() -> None:
    server = rpc.remote("w1", Version)
    rref = server.rpc_sync().reference()
    owner = rpc.rpc_sync("w1", work.pid)
    rpc.rpc_sync("w1", arm_failpoints, args=("table.half_published=stop:2",))
    done = server.rpc_async().publish()
    while psutil.Process(owner).status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    with pytest.raises(CallTimeout, match="200 ms"):
        rref.to_here(timeout=0.2)
    done.wait()
    rpc.rpc_sync("w1", arm_failpoints, args=(None,))
    assert rref.to_here() == [7]


MOST = (1 << 64) - 1
NO_ENTRY = 0xFFFFFFFF
LIES: dict[str, tuple[int, int, int, int, int]] = {  # form, flags, size, two words
    "a form that is none": (3, 0, 8, 0, 0),
    "flags that are none": (1, 1 << 31, 8, 0, 0),
    "too many bytes in the descriptor": (1, 0, 89, 0, 0),
    "far too many bytes in the descriptor": (1, 0, MOST, 0, 0),
    "a block behind the arena": (2, 0, 4096, 1 << 62, NO_ENTRY),
    "a block that ends behind the arena": (2, 0, MOST - 4095, 4096, NO_ENTRY),
    "a held block behind the arena": (2, 0, 1 << 20, 1 << 62, -1),
    "a held block that ends behind the arena": (2, 0, MOST, 4096, -1),
    "a held block of nothing": (2, 0, 0, 0, -1),
    "garbage": (1, 0, 16, MOST, 1),
    "a pickle of garbage": (1, 1, 24, 1 << 60, 1 << 60),
    "more buffers than bytes": (1, 1, 24, 3, 0),
}
ENDLESS: dict[str, tuple[int, int, int, int, int]] = {
    "an entry that is none": (2, 0, 4096, 0, 0xFFFFFFF0),
    "an entry of another generation": (2, 0, 4096, 0, 77 << 32 | 5),
    "nothing": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("lie", LIES)
@in_job
def test_a_lie_about_what_is_published_is_an_error_of_the_reader(lie: str) -> None:
    server = rpc.remote("w1", Version)
    rref = server.rpc_sync().reference()
    server.rpc_sync().lie(*LIES[lie])
    with pytest.raises(ProtocolError):
        rref.to_here(timeout=5)
    server.rpc_sync().publish()
    assert rref.to_here() == [7]


@pytest.mark.parametrize("lie", ENDLESS)
@in_job
def test_an_owner_that_says_for_ever_that_a_value_is_published_is_asked_until_the_deadline(lie: str) -> None:
    server = rpc.remote("w1", Version)
    rref = server.rpc_sync().reference()
    server.rpc_sync().lie(*ENDLESS[lie])
    for timeout in (0.3, 0.1):
        with pytest.raises(CallTimeout, match=f"{round(timeout * 1000)} ms"):
            rref.to_here(timeout=timeout)
    server.rpc_sync().publish()
    assert rref.to_here() == [7]
