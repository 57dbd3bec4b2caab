"""Values that are read without their owner: which are, until when, and that no read is stale or torn."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref.codec.publishable import publishability
from fastref.errors import ResourceError, UsageError
from fastref.rref import current_wiring
from tests import work
from tests.jobs import Job, in_job, job_fixtures
from tests.stopping import stopped

jobs, job = job_fixtures(3, [{}, {"table_bits": 1}])

LARGE = 50_000  # elements: read where they lie
SIZES = [0, 3, 100, 3000, LARGE]  # in the descriptor, in a block and copied, in a block and read there


# ---- who can reach a value


class Saved(torch.autograd.Function):
    """Saves its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return weight * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("no backward pass is made")


def future_of(tensor: torch.Tensor) -> torch.futures.Future:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(tensor)
    return future


def generator_over(tensor: torch.Tensor) -> Any:
    def numbers() -> Any:
        yield tensor.sum()
        yield tensor

    started = numbers()
    next(started)
    return started


def module_with(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("buffer", tensor)
    return module


def weight() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


REACHED: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1:],
    "a reshaped view": lambda tensor: tensor.view(3, 1),
    "an expanded view": lambda tensor: tensor.expand(2, 3),
    "a detached tensor": lambda tensor: tensor.detach(),
    "its data": lambda tensor: tensor.data,
    "its storage": lambda tensor: tensor.untyped_storage(),
    "its typed storage": lambda tensor: tensor.storage(),
    "an array": lambda tensor: tensor.numpy(),
    "an array of a detached tensor": lambda tensor: tensor.detach().numpy(),
    "a view of an array": lambda tensor: tensor.numpy()[1:],
    "a memoryview": lambda tensor: memoryview(tensor.numpy()),
    "another library's tensor": lambda tensor: numpy.from_dlpack(tensor),
    "a capsule": lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    "a weak reference": weakref.ref,
    "a finalizer": lambda tensor: weakref.finalize(tensor, print),
    "a list": lambda tensor: [tensor],
    "an attribute": lambda tensor: functools.partial(print, tensor),
    "a closure": lambda tensor: lambda: tensor,
    "a generator": generator_over,
    "a module's buffer": module_with,
    "a parameter": lambda tensor: torch.nn.Parameter(tensor),
    "an optimizer": lambda tensor: torch.optim.SGD([torch.nn.Parameter(tensor)], lr=1.0),
    "what autograd saved": lambda tensor: tensor * weight(),
    "what a function saved": lambda tensor: Saved.apply(tensor, weight()),
    "a future": future_of,
    "a tensor set to its storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "another whose data it is": lambda tensor: setattr(other := torch.empty(3), "data", tensor) or other,
    "a sparse tensor": lambda tensor: torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 2]]), tensor, check_invariants=False
    ),
    "a dictionary's views": lambda tensor: {"a": tensor}.values(),
}


@pytest.mark.parametrize("way", REACHED)
def test_a_tensor_that_something_else_reaches_is_not_published(way: str) -> None:
    alone = [torch.ones(3)]
    assert publishability(alone) == "unreachable"
    reaching = REACHED[way](alone[0])
    assert publishability(alone) == "no"
    assert publishability([[alone[0]]]) == "no"
    del reaching


@pytest.mark.parametrize("way", [way for way in REACHED if "array" not in way and "memoryview" not in way])
def test_a_tensor_is_published_again_when_what_reached_it_is_gone(way: str) -> None:
    alone = [torch.ones(3)]
    reaching = REACHED[way](alone[0])
    if way == "a finalizer":
        reaching.detach()
    del reaching
    found = publishability(alone)
    # Torch marks for good what it has handed to numpy or another library; then it is not known any more.
    assert found == "unreachable" or (found == "no" and not alone[0].untyped_storage().resizable())


FOREIGN: dict[str, Callable[[], torch.Tensor]] = {
    "an array's memory": lambda: torch.from_numpy(numpy.ones(3)),
    "a buffer's memory": lambda: torch.frombuffer(bytearray(12), dtype=torch.float32),
    "memory of several processes": lambda: torch.ones(3).share_memory_(),
    "a view without its base": lambda: torch.ones(3)[1:],
    "one that needs a gradient": lambda: torch.ones(3, requires_grad=True),
    "one with a history": lambda: weight() * 2,
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a subclass": lambda: torch.ones(3).as_subclass(Subclass),
    "no plain dimension order": lambda: (
        torch.ones(3, 3).to_mkldnn() if torch.backends.mkldnn.is_available() else weight()
    ),
}


class Subclass(torch.Tensor):
    """One more kind of tensor."""


@pytest.mark.parametrize("kind", FOREIGN)
def test_memory_that_may_be_somebody_elses_is_not_published(kind: str) -> None:
    assert publishability([FOREIGN[kind]()]) == "no"


ALONE: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(3),
    "a number": lambda: torch.tensor(1.5),
    "nothing": lambda: torch.empty(0),
    "a result": lambda: torch.ones(3) @ torch.ones(3, 3),
    "a clone of a view": lambda: torch.ones(3)[1:].clone(),
    "what was computed without gradients": lambda: (weight() * 2).detach().clone(),
    "a list": lambda: [torch.ones(3), 1, "a"],
    "a tuple": lambda: (torch.ones(3), torch.zeros(2)),
    "a dictionary": lambda: {"a": torch.ones(3), 1: [torch.ones(2), None]},
    "an empty list": lambda: [],
    "a deep one": lambda: [[[{"a": (torch.ones(1),)}]]],
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_only_its_holder_reaches_is_published(kind: str) -> None:
    assert publishability([ALONE[kind]()]) == "unreachable"


def test_containers_of_what_others_reach_are_not_published() -> None:
    shared = torch.ones(3)
    inner = [torch.ones(3)]
    row = (torch.ones(3),)
    base = torch.ones(4)
    for value in ([shared], (1, shared), {"a": shared}, [inner], [row], {"a": {"b": row}}, [base[:2], base[2:]]):
        assert publishability([value]) == "no"
    twice = torch.ones(3)
    pair = [twice, twice]
    del twice
    assert publishability([pair]) == "no"


def test_values_of_other_kinds_are_not_published() -> None:
    for make in (
        lambda: {1},
        lambda: bytearray(1),
        lambda: numpy.ones(3),
        object,
        lambda: [numpy.ones(3)],
        work.Counter,
    ):
        assert publishability([make()]) == "no"
    endless: list[Any] = []
    endless.append(endless)
    assert publishability([endless]) == "no"
    del endless[:]
    assert publishability([[None] * 10_000]) == "no"
    assert publishability([(1, ("a", b"b"), None)]) == "immutable"


# ---- in a job


def published(to: str = "w1") -> int:
    return rpc.rpc_sync(to, work.figures, args=("calls", "values_published"))


def asked() -> int:
    return work.figures("calls", "fetched_by_message")


def has_bits() -> bool:
    """Whether w1 publishes for this worker: with a bit in its table, in memory that both share."""
    if work.figures("peers", "w1")["far"]:
        return False
    return work.figures("table", "capacity") > 0 and rpc.rpc_sync("w1", bits_of_owner) > 1


def bits_of_owner() -> int:
    return current_wiring().bits


def full(size: int, number: float) -> torch.Tensor:
    return torch.full((size,), float(number))


def pair(size: int) -> list[Any]:
    return [torch.ones(size), {"a": torch.zeros(size), "b": "text"}]


def matrix(size: int) -> torch.Tensor:
    return torch.ones(size, 2) * 2


MADE: dict[str, Callable[[int], Any]] = {
    "a tensor": lambda size: rpc.remote("w1", full, args=(size, 1)),
    "a list": lambda size: rpc.remote("w1", pair, args=(size,)),
    "two dimensions": lambda size: rpc.remote("w1", matrix, args=(size,)),
    "what came as an argument": lambda size: rpc.remote("w1", work.echo, args=(torch.ones(size),)),
    "what torch made": lambda size: rpc.remote("w1", torch.ones, args=(size,)),
    "what a method returned": lambda size: rpc.remote("w1", torch.ones, args=(size,)).remote().add(1),
}


@pytest.mark.parametrize("kind", MADE)
@in_job
def test_after_the_first_fetch_the_owner_is_not_asked(kind: str) -> None:
    if not has_bits():
        pytest.skip("without a bit in the owner's table a reference is held by messages")
    for size in SIZES:
        before = published()
        rref = MADE[kind](size)
        first = rref.to_here()
        assert published() >= before + 1
        count = asked()
        for _ in range(3):
            assert str(rref.to_here()) == str(first)
        assert rpc.rpc_sync("w2", fetch, args=(rref,)) is None
        assert asked() == count


def fetch(rref: rpc.RRef) -> None:
    before = asked()
    rref.to_here()
    assert asked() == before


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_a_published_value_is_read_while_its_owner_is_stopped() -> None:
    if not has_bits():
        pytest.skip("without a bit in the owner's table a reference is held by messages")
    rrefs = [rpc.remote("w1", full, args=(size, 7)) for size in SIZES]
    for rref in rrefs:
        rref.to_here()
    with stopped(rpc.rpc_sync("w1", work.pid)):
        for size, rref in zip(SIZES, rrefs, strict=True):
            for _ in range(3):
                assert torch.equal(rref.to_here(timeout=5), full(size, 7))


@in_job
def test_a_published_value_is_read_while_its_owner_holds_the_interpreter_lock() -> None:
    if not has_bits():
        pytest.skip("without a bit in the owner's table a reference is held by messages")
    rref = rpc.remote("w1", full, args=(LARGE, 7))
    rref.to_here()
    future = rpc.rpc_async("w1", hold_lock)
    count = 0
    while not future.done():
        assert rref.to_here()[-1] == 7
        count += 1
    assert count > 3
    future.wait()


def hold_lock() -> None:
    sum(range(20_000_000))  # one call of C code: nobody else gets the lock


@in_job
def test_what_a_reader_writes_is_its_own() -> None:
    for size in SIZES[1:]:
        rref = rpc.remote("w1", full, args=(size, 1))
        for _ in range(2):
            first, second = rref.to_here(), rref.to_here()
            first += 1
            third = rref.to_here()
            second *= 5
            assert (first[0], second[0], third[-1]) == (2, 5, 1)
            assert torch.equal(rref.to_here(), full(size, 1))
            rpc.rpc_sync("w2", fetch_and_check, args=(rref, 1.0))


def fetch_and_check(rref: rpc.RRef, number: float) -> None:
    value = rref.to_here()
    assert torch.equal(value, torch.full_like(value, number))


def use_local_value(rref: rpc.RRef) -> None:
    rref.local_value().add_(1)


def fetch_at_home(rref: rpc.RRef) -> None:
    rref.to_here().add_(1)


def keep_value(rref: rpc.RRef) -> None:
    work.keep(rref.local_value())


def change_kept() -> None:
    work.get_kept().add_(1)


def keep_and_change(rref: rpc.RRef) -> None:
    rpc.rpc_sync("w1", keep_value, args=(rref,))
    rref.to_here()
    rpc.rpc_sync("w1", change_kept)
    rpc.rpc_sync("w1", work.drop)


DOORS: dict[str, Callable[[rpc.RRef], Any]] = {
    "local_value": lambda rref: rpc.rpc_sync("w1", use_local_value, args=(rref,)),
    "to_here on the owner": lambda rref: rpc.rpc_sync("w1", fetch_at_home, args=(rref,)),
    "a method": lambda rref: rref.rpc_sync().add_(1),
    "a method that is not waited for": lambda rref: rref.rpc_async().add_(1).wait(),
    "a method that makes a reference": lambda rref: rref.remote().add_(1).to_here(),
    "what was kept": keep_and_change,
    "a third worker": lambda rref: rpc.rpc_sync("w2", call_method, args=(rref,)),
}


def call_method(rref: rpc.RRef) -> None:
    rref.rpc_sync().add_(1)


@pytest.mark.parametrize("door", DOORS)
@in_job
def test_code_of_the_owner_that_reaches_a_value_ends_its_publication(door: str) -> None:
    for size in SIZES[1:]:
        rref = rpc.remote("w1", full, args=(size, 0))
        snapshots = [rref.to_here()]
        for number in range(1, 4):
            DOORS[door](rref)
            snapshots.append(rref.to_here())
            assert torch.equal(snapshots[-1], full(size, number))
            rpc.rpc_sync("w2", fetch_and_check, args=(rref, float(number)))
        for number, snapshot in enumerate(snapshots):  # what was read before is what it was
            assert torch.equal(snapshot, full(size, number))


@in_job
def test_a_value_of_the_owners_own_is_published_when_the_owner_has_let_go_of_it() -> None:
    kept = rpc.rpc_sync("w1", make_and_keep, args=(LARGE,))
    assert kept.to_here()[0] == 0
    rpc.rpc_sync("w1", change_kept)
    assert kept.to_here()[0] == 1
    before = published()
    rpc.rpc_sync("w1", work.drop)
    assert kept.to_here()[0] == 1
    if has_bits():
        assert published() == before + 1


def make_and_keep(size: int) -> rpc.RRef:
    value = full(size, 0)
    work.keep(value)
    return rpc.RRef(value)


@in_job
def test_a_reader_keeps_what_it_read_when_the_reference_is_gone() -> None:
    rref = rpc.remote("w1", full, args=(LARGE, 3))
    rref.to_here()
    value = rref.to_here()
    del rref
    for number in range(20):  # others use the memory
        assert torch.equal(rpc.remote("w1", full, args=(LARGE, number)).to_here(), full(LARGE, number))
    assert torch.equal(value, full(LARGE, 3))


# ---- published by the program


class Parameters:
    """An owner whose value changes: parts of it all say which version they are of."""

    def __init__(self, size: int) -> None:
        self.state = {"weight": torch.zeros(size), "bias": torch.zeros(3), "step": 0}
        self.rref = rpc.RRef(self.state)

    def reference(self) -> rpc.RRef:
        return self.rref

    def step(self) -> int:
        self.state["step"] += 1
        self.state["weight"] += 1
        self.state["bias"] += 1
        return self.state["step"]

    def publish(self) -> None:
        self.rref.publish()

    def unpublish(self) -> None:
        self.rref.unpublish()


def version_of(state: dict[str, Any]) -> int:
    """Return the version of a state, whose parts must agree."""
    step = state["step"]
    assert torch.equal(state["bias"], torch.full_like(state["bias"], step))
    assert torch.equal(state["weight"], torch.full_like(state["weight"], step))
    return int(step)


@in_job
def test_readers_see_the_last_version_that_was_published() -> None:
    for size in SIZES:
        server = rpc.remote("w1", Parameters, args=(size,))
        state = server.rpc_sync().reference()
        server.rpc_sync().step()
        assert version_of(state.to_here()) == 1
        server.rpc_sync().publish()
        server.rpc_sync().step()
        assert version_of(state.to_here()) == 1
        old = state.to_here()
        server.rpc_sync().publish()
        assert version_of(state.to_here()) == 2
        assert rpc.rpc_sync("w2", fetch_version, args=(state,)) == 2
        server.rpc_sync().step()
        server.rpc_sync().unpublish()
        assert version_of(state.to_here()) == 3
        server.rpc_sync().step()
        assert version_of(state.to_here()) == 4
        assert version_of(old) == 1
        server.rpc_sync().unpublish()  # there is nothing: nothing happens


def fetch_version(state: rpc.RRef) -> int:
    return version_of(state.to_here())


@in_job
def test_every_kind_of_value_can_be_published() -> None:
    for make in (torch.nn.Linear, make_array, make_shared_tensor, work.Counter):
        rref = rpc.rpc_sync("w1", make_and_publish, args=(make,))
        count = asked()
        shown = str(rref.to_here())
        if make is not work.Counter:
            assert shown == str(rref.to_here())
        if has_bits():
            assert asked() == count


def make_array() -> numpy.ndarray:
    return numpy.arange(20_000)


def make_shared_tensor() -> torch.Tensor:
    return torch.ones(LARGE).share_memory_()


def make_and_publish(make: Callable[..., Any]) -> rpc.RRef:
    torch.manual_seed(0)
    rref = rpc.RRef(make(200, 200) if make is torch.nn.Linear else make())
    rref.publish()
    return rref


@in_job
def test_only_an_owner_publishes_and_only_what_has_no_references() -> None:
    rref = rpc.remote("w1", full, args=(3, 1))
    for refused in (rref.publish, rref.unpublish):
        with pytest.raises(UsageError, match="only by its owner WorkerInfo"):
            refused()
    mine = rpc.RRef([rref])
    with pytest.raises(UsageError, match="references in its value"):
        mine.publish()
    failed = rpc.remote("w0", work.Counter(1).fail, args=("no",))
    with pytest.raises(ValueError, match="no"):
        failed.publish()


@pytest.mark.shared_memory("published values are read there")
@in_job
def test_a_published_version_is_read_while_the_owner_is_stopped() -> None:
    if not has_bits():
        pytest.skip("without a bit in the owner's table a reference is held by messages")
    server = rpc.remote("w1", Parameters, args=(LARGE,))
    state = server.rpc_sync().reference()
    server.rpc_sync().step()
    server.rpc_sync().publish()
    server.rpc_sync().step()
    with stopped(rpc.rpc_sync("w1", work.pid)):
        for _ in range(5):
            assert version_of(state.to_here(timeout=5)) == 1


# ---- no read is stale or torn, whoever does what at the same time


class Registry:
    """On the owner: values that are changed by every door, and what everybody may know of them."""

    def __init__(self, size: int, by_hand: bool) -> None:
        self.by_hand = by_hand
        self.acknowledged = 0  # every read that begins from now on has to show this version or a later one
        self.begun = 0  # no read that has ended may show a later one
        self.rref = rpc.RRef(full(size, 0))
        if by_hand:
            self.rref.publish()  # until then readers have what is there, also while it changes
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def reference(self) -> rpc.RRef:
        return self.rref

    def known(self) -> tuple[int, int]:
        return self.acknowledged, self.begun

    def start(self, seed: int) -> None:
        self._thread = threading.Thread(target=self._change, args=(seed,))
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        return self.acknowledged

    def _change(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            time.sleep(chance.choice([0, 0, 0.0002, 0.002]))
            self.begun += 1
            if self.by_hand:
                value = self.rref.local_value()
                value.fill_(self.begun)
                self.rref.publish()
            else:
                # In two steps, so that a copy made in between is torn.
                value = self.rref.local_value()
                half = value.numel() // 2
                value[:half].fill_(self.begun)
                value[half:].fill_(self.begun)
                del value
            self.acknowledged = self.begun


def read_again_and_again(server: rpc.RRef, rref: rpc.RRef, seconds: float, whole: bool) -> int:
    """Fetch for a while; every version is whole, none is stale, none from the future."""
    count, last = 0, 0.0
    held: list[tuple[torch.Tensor, float]] = []
    chance = random.Random(os.getpid())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        least, _ = server.rpc_sync().known()
        value = rref.to_here()
        _, most = server.rpc_sync().known()
        lowest, highest = value.min().item(), value.max().item()
        if whole:
            assert lowest == highest, f"torn: {lowest} to {highest}"
            assert last <= lowest, f"version {lowest} after {last}"
        assert least <= highest <= most, f"version {highest}, which should be between {least} and {most}"
        last = lowest
        count += 1
        if chance.random() < 0.2:
            held.append((value.clone() if chance.random() < 0.1 else value, lowest if whole else -1.0))
        if len(held) > 5:
            kept, version = held.pop(chance.randrange(5))
            assert version < 0 or torch.equal(kept, torch.full_like(kept, version)), "what was read has changed"
        if chance.random() < 0.1:
            value.fill_(-1)  # its own
            held = [pair for pair in held if pair[0] is not value]
    return count


@pytest.mark.parametrize("size", [4, 3000, LARGE])
@in_job
def test_versions_are_whole_and_never_stale_while_the_owner_publishes(size: int) -> None:
    server = rpc.remote("w1", Registry, args=(size, True))
    rref = server.rpc_sync().reference()
    server.rpc_sync().start(size)
    other = rpc.rpc_async("w2", read_again_and_again, args=(server, rref, 2.0, True))
    assert read_again_and_again(server, rref, 2.0, True) > 20
    assert other.wait() > 20
    assert server.rpc_sync().stop() > 10


@in_job
def test_a_value_that_its_owner_changes_is_never_read_stale() -> None:
    """The values are published by themselves, at their first fetch, and withdrawn before the first change."""
    chance = random.Random(5)
    for turn in range(150):
        size = chance.choice([3, 3000, LARGE])
        rref = rpc.remote("w1", full, args=(size, 0))
        done = rpc.rpc_async("w1", change_later, args=(rref, chance.choice([0, 0, 0.0005, 0.002])))
        other = rpc.rpc_async("w2", read_until_changed, args=(rref,))
        read_until_changed(rref)
        done.wait()
        assert torch.equal(rref.to_here(), full(size, 3)), turn
        other.wait()
        rpc.rpc_sync("w2", fetch_and_check, args=(rref, 3.0))


def change_later(rref: rpc.RRef, pause: float) -> None:
    time.sleep(pause)
    value = rref.local_value()
    for _ in range(3):
        value += 1


def read_until_changed(rref: rpc.RRef) -> None:
    """A version once seen does not go back, and what was read stays."""
    seen = [rref.to_here()]
    while (least := seen[-1].min().item()) < 3:
        seen.append(rref.to_here())
        assert seen[-1].min().item() >= least
        if len(seen) > 10:
            assert seen[0].max().item() <= seen[-1].max().item()
            seen = seen[-3:]


# ---- memory


def publish_many(count: int, size: int) -> None:
    work.keep(*(rpc.remote("w1", full, args=(size, number)) for number in range(count)))
    for number, rref in enumerate(work.kept):
        assert torch.equal(rref.to_here(), full(size, number))


@pytest.mark.shared_memory("published values are read there")
@pytest.mark.parametrize("body", ["fill_the_arena", "publish_too_much"])
def test_memory_is_bounded(body: str, mp_context: Any) -> None:
    job = Job(mp_context, 2, arena_limit=32 << 20)
    try:
        job.run(globals()[body])
        job.check()
    finally:
        job.close()


def publish_too_much() -> None:
    """Without memory for a new version the last one stays published."""
    server = rpc.remote("w1", Parameters, args=(LARGE,))
    state = server.rpc_sync().reference()
    server.rpc_sync().step()
    server.rpc_sync().publish()
    rpc.rpc_sync("w1", add_too_much, args=(state,))
    assert version_of(state.to_here()) == 1


def add_too_much(state: rpc.RRef) -> None:
    value = state.local_value()
    value["much"] = torch.empty(9 << 20)
    with pytest.raises(ResourceError):
        state.publish()
    del value["much"]


def fill_the_arena() -> None:
    size = 1 << 18  # 1 MiB each: 60 copies do not fit
    publish_many(60, size)
    assert rpc.rpc_sync("w1", work.figures, args=("calls", "values_published")) > 5
    lent = rpc.rpc_sync("w1", lend_all)
    assert torch.equal(rpc.rpc_sync("w1", full, args=(size, 1)), full(size, 1))  # there is room only without the copies
    assert rpc.rpc_sync("w1", work.figures, args=("calls", "values_withdrawn")) > 0
    rpc.rpc_sync("w1", give_all_back, args=(lent,))
    for number, rref in enumerate(work.kept):
        assert torch.equal(rref.to_here(), full(size, number))
    work.drop()


def lend_all() -> list[int]:
    """Lend what is left of this worker's arena, and say where."""
    arena, lent = current_wiring().arena, []
    with contextlib.suppress(ResourceError):
        while True:
            lent.append(arena.lend(1 << 20))
    return lent


def give_all_back(lent: list[int]) -> None:
    for offset in lent:
        current_wiring().arena.give_back(offset)


@in_job
def test_debug_counts_what_was_published_and_withdrawn() -> None:
    figures = fastref.debug.snapshot()["calls"]
    rref = rpc.RRef([1])
    rref.publish()
    rref.unpublish()
    now = fastref.debug.snapshot()["calls"]
    assert now["values_published"] == figures["values_published"] + 1
    assert now["values_withdrawn"] == figures["values_withdrawn"] + 1
