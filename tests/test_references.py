"""References made, handed on in every way, and let go of: a value lives exactly as long as somebody holds it."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import io
import operator
import pickle
import random
import re
import threading
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import UsageError
from tests import work
from tests.jobs import in_job, job_fixtures, names

# With 61 bits all holders are bits; with 1 only w0 is one and the others go by messages; with 0 all do.
jobs, job = job_fixtures(4, [{}, {"table_bits": 1}, {"table_bits": 0}, {"transport": "tcp"}])

OTHERS = ["w1", "w2", "w3"]


def traced_on(worker: str) -> int:
    return rpc.rpc_sync(worker, work.traced_alive)


def gone_on(worker: str) -> bool:
    return rpc.rpc_sync(worker, work.wait_until_traced, args=(0,)) == 0


# ---- what a reference says of itself


@in_job
def test_a_reference_to_a_remote_value_knows_its_owner() -> None:
    rref = rpc.remote("w1", work.Counter, args=(5,))
    assert isinstance(rref, rpc.RRef)
    assert rref.owner() == rpc.get_worker_info("w1")
    assert rref.owner_name() == "w1"
    assert not rref.is_owner()
    assert rref.to_here().get() == 5
    assert rref.confirmed_by_owner()


@in_job
def test_a_local_reference_is_the_owners() -> None:
    work.keep([1])
    value = work.get_kept()
    for rref in (rpc.RRef(value), rpc.remote("w0", work.get_kept)):
        assert rref.is_owner()
        assert rref.owner() == rpc.get_worker_info()
        assert rref.owner_name() == "w0"
        assert rref.confirmed_by_owner()
        assert rref.local_value() is value
        assert rref.to_here() is value
    work.drop()


@in_job
def test_a_reference_is_not_confirmed_before_its_value_is_there() -> None:
    rref = rpc.remote("w1", work.SlowToMake, args=(0.2, 7))
    assert not rref.confirmed_by_owner()
    assert rref.to_here().get() == 7
    assert rref.confirmed_by_owner()


@in_job
def test_ids_are_numbered_as_torch_numbers_them() -> None:
    first = int(re.fullmatch(r"OwnerRRef\(GloballyUniqueId\(created_on=0, local_id=(\d+)\)\)", repr(rpc.RRef(1)))[1])
    user = repr(rpc.remote("w1", work.nothing))
    assert user == (
        f"UserRRef(RRefId = GloballyUniqueId(created_on=0, local_id={first + 1}), "
        f"ForkId = GloballyUniqueId(created_on=0, local_id={first + 2}))"
    )
    assert repr(rpc.RRef(2)) == f"OwnerRRef(GloballyUniqueId(created_on=0, local_id={first + 3}))"


@in_job
def test_a_reference_has_one_name_everywhere() -> None:
    rref = rpc.remote("w1", work.Counter)
    for worker in names(4):
        assert rpc.rpc_sync(worker, rpc.RRef.rref_id, args=(rref,)) == rref.rref_id()
    seen_by_owner = rpc.rpc_sync("w1", repr, args=(rref,))
    assert seen_by_owner == f"OwnerRRef({rref.rref_id()})"
    assert rpc.rpc_sync("w2", repr, args=(rref,)).startswith(f"UserRRef(RRefId = {rref.rref_id()}, ForkId = ")


@in_job
def test_references_are_equal_only_to_themselves() -> None:
    rref = rpc.remote("w1", work.Counter)
    other = rpc.rpc_sync("w1", work.echo, args=(rref,))
    assert rref == rref
    assert rref != other
    assert len({rref, other, rref}) == 2


@in_job
def test_a_reference_can_be_annotated_with_its_type() -> None:
    assert (get_origin(rpc.RRef[int]), get_args(rpc.RRef[int])) == (rpc.RRef, (int,))
    assert rpc.RRef[int] == rpc.RRef[int] != rpc.RRef[str]
    assert len({rpc.RRef[int], rpc.RRef[int], rpc.RRef[str]}) == 2
    assert get_type_hints(annotated) == {"one": rpc.RRef[int], "return": rpc.RRef[list[int]] | None}
    with pytest.raises(TypeError, match="one type argument, the type of its value; got 2"):
        rpc.RRef[int, str]
    rref = rpc.RRef[int](1)
    assert type(rref) is rpc.RRef
    assert rref.to_here() == 1
    assert isinstance(rref, rpc.RRef)
    with pytest.raises(TypeError):
        isinstance(rref, rpc.RRef[int])


def annotated(one: rpc.RRef[int]) -> rpc.RRef[list[int]] | None: ...


# ---- handed on


@in_job
def test_a_reference_handed_to_its_owner_is_the_owners_there() -> None:
    rref = rpc.rpc_sync("w1", work.make_and_keep, args=([1, 2],))
    assert not rref.is_owner()
    assert rpc.rpc_sync("w1", work.is_the_object, args=(rref,))
    through = rpc.rpc_sync("w2", work.pass_and_return, args=(rref, ["w3", "w1"]))
    assert rpc.rpc_sync("w1", work.is_the_object, args=(through,))
    assert rpc.rpc_sync("w1", work.drop) == 1


@in_job
def test_a_reference_that_comes_home_leads_to_the_object_itself() -> None:
    value = [1]
    rref = rpc.RRef(value)
    for worker in names(4):
        home = rpc.rpc_sync(worker, work.echo, args=(rref,))
        assert home.is_owner()
        assert home.local_value() is value
        assert home.rref_id() == rref.rref_id()
    home = rpc.rpc_sync("w1", work.pass_and_return, args=(rref, ["w2", "w3", "w0", "w2"]))
    assert home.local_value() is value


@in_job
def test_a_reference_handed_to_a_third_worker_works_there() -> None:
    rref = rpc.remote("w1", work.Counter, args=(5,))
    mine = rpc.RRef(work.Counter(6))
    for worker in ("w2", "w3"):
        assert rpc.rpc_sync(worker, operator.methodcaller("owner_name"), args=(rref,)) == "w1"
        rpc.rpc_sync(worker, work.keep, args=(rref, mine))
        assert rpc.rpc_sync(worker, work.use_kept, args=("get",)) == 6
    assert [rpc.rpc_sync(worker, work.use_kept, args=("add",)) for worker in ("w2", "w3", "w2")] == [7, 8, 9]
    assert mine.local_value().get() == 9
    assert [rpc.rpc_sync(worker, work.drop) for worker in ("w2", "w3")] == [2, 2]


@pytest.mark.parametrize("to", ["w0", "w1", "w2"])
@in_job
def test_references_travel_inside_anything(to: str) -> None:
    rref, mine = rpc.remote("w1", work.echo, args=(7,)), rpc.RRef(8)
    box = work.Box([rref, {"mine": mine}])
    deep: Any = rref
    for _ in range(40):
        deep = [deep]
    for value, find in (
        ([rref, mine], lambda v: v),
        ((rref, mine), lambda v: v),
        ({"a": rref, "b": mine}, lambda v: [v["a"], v["b"]]),
        ({rref: mine}, lambda v: next(iter(v.items()))),
        ({rref, mine}, lambda v: sorted(v, key=rpc.RRef.to_here)),
        (([{"a": (rref,)}], mine), lambda v: [v[0][0]["a"][0], v[1]]),
        (box, lambda v: [v.content[0], v.content[1]["mine"]]),
        (collections.OrderedDict(a=rref, b=mine), lambda v: list(v.values())),
        (functools.partial(work.gather, rref, mine), lambda v: v.args),
        (lambda: (rref, mine), lambda v: v()),
        ([deep, mine, torch.ones(3), object], lambda v: [_core_of(v[0]), v[1]]),
    ):
        found = find(rpc.rpc_sync(to, work.echo, args=(value,)))
        assert [r.to_here() for r in found] == [7, 8], value
        assert [r.owner_name() for r in found] == ["w1", "w0"]
        found = find(rpc.remote(to, work.echo, args=(value,)).to_here())
        assert [r.to_here() for r in found] == [7, 8], value
        assert rpc.rpc_sync(to, work.gather, kwargs={"value": value})[0] == ()


def _core_of(value: Any) -> Any:
    while isinstance(value, list):
        (value,) = value
    return value


@in_job
def test_one_reference_met_twice_arrives_as_one() -> None:
    rref = rpc.remote("w1", work.nothing)
    for to in ("w1", "w2"):
        assert rpc.rpc_sync(to, operator.is_, args=(rref, rref)) is True
        first, second = rpc.rpc_sync(to, work.echo, args=([rref, rref],))
        assert first is second


@in_job
def test_references_come_back_in_results() -> None:
    for rref, owner in (
        (rpc.rpc_sync("w1", work.make_traced), "w1"),
        (rpc.rpc_sync("w1", work.make_on, args=("w2", work.Traced)), "w2"),
        (rpc.rpc_sync("w1", work.make_on, args=("w0", work.Traced)), "w0"),
        (rpc.rpc_sync("w1", work.make_on, args=("w1", work.Traced)), "w1"),
        (rpc.rpc_async("w1", work.make_on, args=("w3", work.Traced)).wait(), "w3"),
        (rpc.remote("w1", work.make_on, args=("w3", work.Traced)).to_here(), "w3"),
        (rpc.remote("w1", work.make_on, args=("w0", work.Traced)).to_here(), "w0"),
        (rpc.RRef(rpc.remote("w3", work.Traced)).to_here(), "w3"),
        (rpc.rpc_sync("w1", work.make_traced, args=(rpc.RRef(1),)), "w1"),
    ):
        assert rref.owner_name() == owner
        assert rref.rpc_sync().count() in (0, 1)


@in_job
def test_a_reference_goes_on_and_on() -> None:
    rref = rpc.remote("w1", work.echo, args=("far",))
    route = ["w2", "w3", "w1", "w0"] * 10
    assert rpc.rpc_sync("w2", work.pass_on, args=(rref, route)) == "far"
    for _ in range(200):
        rref = rpc.rpc_sync(random.choice(OTHERS), work.echo, args=(rref,))
    assert rref.to_here() == "far"


@in_job
def test_many_references_travel_in_one_message() -> None:
    for count in (1, 7, 100, 1000):
        rrefs = [rpc.remote(OTHERS[i % 3], work.echo, args=(i,)) for i in range(count)]
        rrefs += [rpc.RRef(i) for i in range(count)]
        assert rpc.rpc_sync("w2", work.total, args=(rrefs,)) == 2 * sum(range(count))
        back = rpc.rpc_sync("w3", work.echo, args=(rrefs,))
        assert [rref.to_here() for rref in back] == 2 * list(range(count))


@in_job
def test_a_message_of_any_size_carries_references() -> None:
    rref = rpc.remote("w1", work.echo, args=(1,))
    for size in (0, 100, 3000, 5000, 100_000, 2_000_000):
        load = b"x" * size
        answer, back = rpc.rpc_sync("w2", work.echo, args=([load, rref],))
        assert answer == load
        assert back.to_here() == 1


@in_job
def test_a_lambda_carries_the_references_it_uses() -> None:
    rref, mine = rpc.remote("w1", work.Counter, args=(3,)), rpc.RRef(4)
    assert rpc.rpc_sync("w2", lambda: rref.rpc_sync().get() + mine.to_here()) == 7
    assert rpc.rpc_sync("w1", lambda: rref.local_value().get() + mine.to_here()) == 7


@in_job
def test_outside_calls_references_are_not_pickled() -> None:
    text = "Can not pickle rref in python pickler, rref can only be pickled when using RPC"
    for rref in (rpc.RRef(1), rpc.remote("w1", work.nothing)):
        for attempt in (pickle.dumps, copy.deepcopy, lambda value: torch.save(value, io.BytesIO())):
            for value in (rref, [rref]):
                with pytest.raises(UsageError, match=text):
                    attempt(value)
        with pytest.raises(UsageError, match=text):
            copy.copy(rref)


# ---- let go of


@in_job
def test_a_value_dies_with_its_last_reference() -> None:
    for rref in (rpc.remote("w1", work.Traced), rpc.rpc_sync("w1", work.make_traced)):
        assert rref.rpc_sync().count() == 0
        assert traced_on("w1") >= 1
    del rref
    assert gone_on("w1")


@in_job
def test_a_reference_let_go_at_once_lets_its_value_die() -> None:
    for _ in range(50):
        rpc.remote("w1", work.Traced)
        rpc.remote("w0", work.Traced)
    assert gone_on("w1")
    assert work.wait_until_traced(0) == 0


@in_job
def test_a_value_lives_until_the_last_holder_lets_go() -> None:
    rref = rpc.remote("w1", work.Traced)
    for worker in names(4):
        rpc.rpc_sync(worker, work.keep, args=(rref,))
    del rref
    for worker in ("w0", "w3", "w2", "w1"):
        assert rpc.rpc_sync(worker, work.use_kept, args=("count",)) == 0
        assert traced_on("w1") == 1
        assert rpc.rpc_sync(worker, work.drop) == 1
    assert gone_on("w1")


@in_job
def test_a_reference_under_way_keeps_its_value() -> None:
    for to in ("w1", "w2"):
        for _ in range(5):
            future = rpc.rpc_async(to, work.keep, args=(rpc.remote("w1", work.Traced),))
            gc.collect()
            future.wait()
            assert rpc.rpc_sync(to, work.use_kept, args=("count",)) == 0
            rpc.rpc_sync(to, work.drop)
    assert gone_on("w1")


@in_job
def test_a_local_value_lives_while_others_hold_it() -> None:
    rpc.rpc_sync("w1", work.keep, args=(rpc.RRef(work.Traced()),))
    rpc.rpc_sync("w2", work.keep, args=(rpc.rpc_sync("w1", work.get_kept),))
    gc.collect()
    assert work.traced_alive() == 1
    rpc.rpc_sync("w1", work.drop)
    assert rpc.rpc_sync("w2", work.use_kept, args=("count",)) == 0
    rpc.rpc_sync("w2", work.drop)
    assert work.wait_until_traced(0) == 0


@in_job
def test_a_reference_in_a_cycle_goes_when_the_cycle_is_collected() -> None:
    for worker in names(4):
        rpc.rpc_sync(worker, work.keep_in_cycle, args=(rpc.remote("w1", work.Traced),))
        rpc.rpc_sync(worker, gc.collect)
    assert gone_on("w1")


@in_job
def test_a_destructor_that_lets_go_of_references_reaches_the_end_of_a_chain() -> None:
    chain: Any = None
    for number in range(60):
        chain = rpc.rpc_sync(f"w{number % 4}", work.make_traced, args=(chain,))
    assert [traced_on(worker) for worker in names(4)] == [15] * 4
    del chain
    for worker in names(4):
        assert gone_on(worker)


@in_job
def test_a_destructor_that_lets_go_of_many_references_frees_them_all() -> None:
    rrefs = [rpc.remote(OTHERS[number % 3], work.Traced) for number in range(300)]
    holder = rpc.remote("w1", work.Traced, args=rrefs)
    del rrefs
    assert holder.rpc_sync().count() == 300
    assert traced_on("w2") == 100
    del holder
    for worker in OTHERS:
        assert gone_on(worker)


@in_job
def test_values_that_hold_references_given_later_keep_them() -> None:
    holder = rpc.remote("w1", work.Traced)
    holder.rpc_sync().hold(rpc.remote("w2", work.Traced), rpc.RRef(work.Traced()))
    gc.collect()
    assert (traced_on("w1"), traced_on("w2"), work.traced_alive()) == (1, 1, 1)
    del holder
    assert gone_on("w1")
    assert gone_on("w2")
    assert work.wait_until_traced(0) == 0


@in_job
def test_a_failed_call_lets_go_of_its_references() -> None:
    rref = rpc.remote("w1", work.Traced)
    for to in names(4):
        with pytest.raises(ValueError, match="holds"):
            rpc.rpc_sync(to, work.raise_with, args=(rref,))
        with pytest.raises(ValueError, match="holds"):
            rpc.remote(to, work.raise_with, args=(rref,)).to_here()
        with pytest.raises((TypeError, pickle.PicklingError)):
            rpc.rpc_sync(to, work.gather, args=(rref, threading.Lock()))
        with pytest.raises((TypeError, pickle.PicklingError)):
            rpc.remote(to, work.gather, args=(rref, threading.Lock()))
    del rref
    gc.collect()
    assert gone_on("w1")


# ---- many at once


@in_job
def test_threads_that_make_pass_and_drop_references_leave_nothing() -> None:
    failures: list[BaseException] = []

    def churn(seed: int) -> None:
        rng = random.Random(seed)
        held: list[rpc.RRef] = []
        try:
            for _ in range(150):
                choice = rng.random()
                if choice < 0.4 or not held:
                    held.append(rpc.remote(rng.choice(names(4)), work.Traced, args=held[-2:]))
                elif choice < 0.6:
                    held.append(rpc.rpc_sync(rng.choice(OTHERS), work.echo, args=(rng.choice(held),)))
                elif choice < 0.7:
                    assert rng.choice(held).rpc_sync().count() in (0, 1, 2)
                else:
                    held.pop(rng.randrange(len(held)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    for worker in names(4):
        assert gone_on(worker)
