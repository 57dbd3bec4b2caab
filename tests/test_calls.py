"""Calls between workers: whom, what, with which values, for how long, how deep and how many at once."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import math
import operator
import random
import threading
import types
from contextlib import suppress
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import CallTimeout
from tests import work
from tests.jobs import in_job, job_fixtures, names

# Everything here has to work with a single thread too.
jobs, job = job_fixtures(3, [{}, {"num_worker_threads": 1}, {"transport": "tcp"}])


# ---- whom


@in_job
def test_a_worker_is_called_by_name_by_rank_or_by_its_info() -> None:
    for to in ("w2", 2, rpc.get_worker_info("w2"), rpc.WorkerInfo("w2", 2)):
        assert rpc.rpc_sync(to, work.who_am_i) == "w2"
        assert rpc.rpc_async(to, work.who_am_i).wait() == "w2"
        assert rpc.remote(to, work.who_am_i).to_here() == "w2"


@in_job
def test_a_worker_can_call_itself() -> None:
    for to in ("w0", 0, rpc.get_worker_info()):
        assert rpc.rpc_sync(to, work.who_am_i) == "w0"
        assert rpc.rpc_async(to, work.who_am_i).wait() == "w0"
        assert rpc.remote(to, work.who_am_i).to_here() == "w0"
    assert rpc.rpc_sync(0, work.thread) != work.thread()


@in_job
def test_worker_infos_tell_name_and_rank() -> None:
    assert rpc.get_worker_info() == rpc.get_worker_info("w0") == rpc.get_worker_info(0) == rpc.WorkerInfo("w0", 0)
    info = rpc.get_worker_info("w1")
    assert (info.name, info.id, repr(info)) == ("w1", 1, "WorkerInfo(id=1, name=w1)")
    assert hash(info) == 1
    assert rpc.rpc_sync(1, work.echo, args=(info,)) == info
    assert rpc.rpc_sync(True, work.who_am_i) == rpc.get_worker_info(True).name == "w1"  # a bool is an int in Python
    assert rpc.rpc_sync(1, rpc.get_worker_info) == info


# ---- what


@in_job
def test_arguments_arrive_by_position_and_by_name() -> None:
    for how in (
        rpc.rpc_sync,
        lambda *a, **k: rpc.rpc_async(*a, **k).wait(),
        lambda *a, **k: rpc.remote(*a, **k).to_here(),
    ):
        assert how("w1", work.gather) == ((), {})
        assert how("w1", work.gather, (1, 2)) == ((1, 2), {})
        assert how("w1", work.gather, [1, 2], {"a": 3}) == ((1, 2), {"a": 3})
        assert how("w1", work.gather, None, {"a": None}) == ((), {"a": None})
        assert how("w1", work.gather, (None,), {}) == ((None,), {})


@in_job
def test_any_mapping_may_hold_the_arguments_by_name() -> None:
    inner = {"a": 1}
    for kwargs in (
        collections.OrderedDict(inner),
        collections.defaultdict(int, inner),
        collections.UserDict(inner),
        collections.ChainMap(inner),
        types.MappingProxyType(inner),
    ):
        assert rpc.rpc_sync("w1", work.gather, (), kwargs) == ((), inner)
        assert rpc.rpc_async("w1", work.gather, (), kwargs).wait() == ((), inner)
        assert rpc.remote("w1", work.gather, (), kwargs).to_here() == ((), inner)
    for wrong in ([("a", 1)], 3):
        with pytest.raises(TypeError, match="must be a mapping"):
            rpc.rpc_sync("w1", work.gather, (), wrong)  # type: ignore[arg-type]  # that is the point


@in_job
def test_whatever_can_be_called_can_be_called_elsewhere() -> None:
    offset = 7

    def closure(value: int) -> int:
        return value + offset

    def recursive(value: int) -> int:
        return 1 if value == 0 else value * recursive(value - 1)

    callables: list[tuple[Any, tuple[Any, ...], Any]] = [
        (len, ([1, 2],), 2),
        (operator.add, (1, 2), 3),
        (math.gcd, (12, 18), 6),
        (str.upper, ("a",), "A"),
        ("-".join, (["a", "b"],), "a-b"),
        ([1, 2, 2].count, (2,), 2),
        (dict, ([("a", 1)],), {"a": 1}),
        (fractions.Fraction, (1, 2), fractions.Fraction(1, 2)),
        (functools.partial(work.gather, 1, a=2), (3,), ((1, 3), {"a": 2})),
        (work.Counter(5), (1,), 6),
        (work.Counter(5).add, (2,), 7),
        (work.Counter.of_class, (1,), ("Counter", 1)),
        (work.Counter.static, (1,), 1),
        (lambda value: value * 2, (4,), 8),
        (closure, (1,), 8),
        (recursive, (5,), 120),
    ]
    for function, args, expected in callables:
        for _ in range(2):
            assert rpc.rpc_sync("w1", function, args=args) == expected, function
            assert rpc.rpc_async("w1", function, args=args).wait() == expected, function
            assert rpc.remote("w1", function, args=args).to_here() == expected, function


@in_job
def test_a_function_of_torch_can_be_called() -> None:
    for to in ("w1", "w0"):
        assert torch.equal(rpc.rpc_sync(to, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
        assert torch.equal(rpc.rpc_sync(to, torch.ones, args=(2, 3)), torch.ones(2, 3))
        assert torch.equal(rpc.rpc_sync(to, torch.Tensor.sum, args=(torch.ones(2),)), torch.tensor(2.0))


@in_job
def test_a_module_that_the_callee_has_not_imported_is_imported_there() -> None:
    import tests.rarely_imported as module

    assert rpc.rpc_sync("w1", work.has_imported, args=(module.__name__,)) is False
    assert rpc.rpc_sync("w1", module.where) == "w1"


@in_job
def test_a_name_bound_again_on_the_callee_is_looked_up_again() -> None:
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
    rpc.rpc_sync("w1", work.rebind, args=("add", "gather"))
    try:
        assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == ((1, 2), {})
        assert rpc.remote("w1", work.add, args=(1, 2)).to_here() == ((1, 2), {})
    finally:
        rpc.rpc_sync("w1", work.unbind)
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3


@in_job
def test_a_name_bound_again_on_the_caller_means_the_new_function() -> None:
    original = work.add
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
    work.rebind("add", "gather")
    try:
        assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == ((1, 2), {})
        assert rpc.rpc_sync("w1", original, args=(1, 2)) == 3
    finally:
        work.unbind()
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3


# ---- with which values


class Colour(enum.Enum):
    RED = 1


class Text(str):
    pass


class Numbers(list):
    pass


@dataclasses.dataclass
class Point:
    x: float
    y: Any = None


Pair = collections.namedtuple("Pair", "left right")

VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**63 - 1, 2**63, -(2**63) - 1, 2**200, 0.0, -0.0, 1e308, math.inf),
    *(1j, "", "a", "h\u00e9llo \N{SNOWMAN} \U0001f600", "\x00", "\ud800", "C:\\Users\\n", "x" * 100_000),
    *(b"", b"\x00\xff", b"x" * 223, b"x" * 224, b"x" * 225, b"x" * 4095, b"x" * 4097, b"x" * 65537, b"x" * 3_000_001),
    *((), (1,), ((),), ("a", (1, (2.5, None))), [], [[]], [1, "a", None, [2]], {}, {"a": {"b": [1]}}),
    *({1: 2, None: (3,)}, set(), {1, 2}, frozenset("ab"), bytearray(b"ab"), range(3), slice(1, 2), Ellipsis),
    *(NotImplemented, int, len, Colour.RED, Colour, Text("a"), Numbers([1]), Point(1.5), Point(1, [Point(2)])),
    *(Pair(1, "a"), work.add, work.Counter, collections.OrderedDict(b=1, a=2), collections.Counter("aab")),
    *(collections.deque([1], maxlen=2), decimal.Decimal("1.10"), datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)),
    *(fractions.Fraction(1, 3), torch.float32, torch.Size([1, 2]), list(range(10_000)), ("x" * 300,) * 300),
]


@in_job
def test_every_value_comes_back_equal_and_of_its_type() -> None:
    for to in ("w1", "w0"):
        for value in VALUES:
            for answer in (
                rpc.rpc_sync(to, work.echo, args=(value,)),
                rpc.remote(to, work.echo, args=(value,)).to_here(),
            ):
                assert answer == value, repr(value)[:80]
                assert type(answer) is type(value)
            assert list(map(type, rpc.rpc_sync(to, work.gather, args=(value, [value]))[0])) == [type(value), list]


@in_job
def test_what_is_equal_to_nothing_travels_too() -> None:
    answer = rpc.rpc_sync("w1", work.echo, args=([math.nan, -0.0],))
    assert math.isnan(answer[0])
    assert math.copysign(1, answer[1]) == -1


@in_job
def test_the_order_of_a_dictionary_is_kept() -> None:
    keys = random.sample(range(1000), 1000)
    assert list(rpc.rpc_sync("w1", work.echo, args=(dict.fromkeys(keys),))) == keys


@in_job
def test_one_object_met_twice_stays_one_object() -> None:
    inner = [1]
    for shared in (inner, {"a": inner}, Point(1), torch.ones(3), torch.ones(3000)):
        first, second = rpc.rpc_sync("w1", work.echo, args=([shared, shared],))
        assert first is second
        assert rpc.rpc_sync("w1", operator.is_, args=(shared, shared)) is True
        assert rpc.rpc_sync("w1", operator.is_, args=(shared, Point(1))) is False


@in_job
def test_a_value_that_contains_itself_travels() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    answer = rpc.rpc_sync("w1", work.echo, args=(ring,))
    assert answer[0] == 1
    assert answer[1] is answer


@pytest.mark.parametrize("depth", [10, 16, 17, 100, 300])
@in_job
def test_deeply_nested_values_travel(depth: int) -> None:
    for wrap in (lambda value: [value], lambda value: (0, value), lambda value: {"a": value}):
        value: Any = "core"
        for _ in range(depth):
            value = wrap(value)
        assert rpc.rpc_sync("w1", work.echo, args=(value,)) == value
        assert rpc.remote("w1", work.echo, args=(value,)).to_here() == value


@in_job
def test_arguments_and_results_are_copies() -> None:
    mine = [1]
    assert rpc.rpc_sync("w1", work.append_all, args=(mine, [2])) == [1, 2]
    assert rpc.rpc_sync("w0", work.append_all, args=(mine, [2])) == [1, 2]
    assert mine == [1]
    rpc.rpc_sync("w1", work.keep, args=([1],))
    rpc.rpc_sync("w1", work.get_kept).append(2)
    assert rpc.rpc_sync("w1", work.get_kept) == [1]
    assert rpc.rpc_sync("w1", work.drop) == 1


@in_job
def test_arguments_are_taken_when_the_call_is_made() -> None:
    mine = [1]
    future = rpc.rpc_async("w1", work.echo, args=(mine,))
    reference = rpc.remote("w1", work.echo, args=(mine,))
    mine.append(2)
    assert future.wait() == reference.to_here() == [1]


# ---- for how long


@in_job
def test_a_call_that_takes_too_long_says_which_and_how_long_it_waited() -> None:
    text = (
        r"RPCErr:1:RPC ran for more than set timeout \(50 ms\) and will now be marked with an error: "
        "sleep on worker 'w1'"
    )
    with pytest.raises(CallTimeout, match=text) as caught:
        rpc.rpc_sync("w1", work.sleep, args=(0.3,), timeout=0.05)
    assert caught.value.worker == "w1"
    with pytest.raises(RuntimeError, match=text):
        rpc.rpc_async("w1", work.sleep, args=(0.3,), timeout=0.05).wait()
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3


@in_job
def test_a_late_answer_reaches_nobody() -> None:
    for number in range(20):
        with suppress(CallTimeout):  # a machine under load may be late itself
            rpc.rpc_sync("w1", work.sleep, args=(0.02,), timeout=0.001)
        assert rpc.rpc_sync("w1", work.echo, args=(number,)) == number


@in_job
def test_a_negative_timeout_is_over_at_once() -> None:
    with pytest.raises(CallTimeout, match=r"more than set timeout \(-5000 ms\)"):
        rpc.rpc_sync("w1", work.sleep, args=(0.1,), timeout=-5)


@in_job
@pytest.mark.parametrize("timeout", [math.inf, 1e30, 1e10])
def test_a_timeout_beyond_all_clocks_is_none(timeout: float) -> None:
    assert rpc.rpc_sync("w1", work.sleep, (0.05,), timeout=timeout) == 0.05
    assert rpc.rpc_async("w1", work.sleep, (0.05,), timeout=timeout).wait() == 0.05
    assert rpc.remote("w1", work.sleep, (0.05,), timeout=timeout).to_here(timeout) == 0.05
    assert rpc.remote("w0", work.sleep, (0.05,), timeout=timeout).local_value(timeout) == 0.05


@in_job
@pytest.mark.parametrize(("timeout", "shown"), [(-1e30, "-1000000"), (-math.inf, "-inf"), (math.nan, "nan")])
def test_a_timeout_that_is_no_length_of_time_is_over_at_once(timeout: float, shown: str) -> None:
    with pytest.raises(CallTimeout, match=f"set timeout \\({shown}.* ms\\)"):
        rpc.rpc_sync("w1", work.sleep, (0.1,), timeout=timeout)


@in_job
def test_a_call_without_a_limit_waits() -> None:
    assert rpc.rpc_sync("w1", work.sleep, args=(0.3,), timeout=0) == 0.3
    assert rpc.rpc_async("w1", work.sleep, args=(0.3,), timeout=0).wait() == 0.3


@pytest.mark.parametrize("is_async", [False, True])
@in_job
def test_a_nested_call_ends_with_the_call_around_it_and_says_so(is_async: bool) -> None:
    with suppress(CallTimeout):  # both end at one moment
        rpc.rpc_sync("w1", work.keep_error_of_slow_call, args=("w2", 1.5, is_async), timeout=0.2)
    # The inner call has the default timeout, a minute, yet is over before its function is.
    (outcome,) = rpc.rpc_sync("w1", work.wait_until_kept, args=(1,))
    assert isinstance(outcome, str)
    assert "RPC ran for more than set timeout (that of the call it was made in)" in outcome
    assert rpc.rpc_sync("w1", work.drop) == 1


# ---- how deep


@in_job
def test_nested_calls_go_to_any_depth() -> None:
    assert rpc.rpc_sync("w1", work.depth, args=(200, names(3))) == 200
    assert rpc.rpc_sync("w1", work.depth, args=(50, ["w1"])) == 50


@in_job
def test_many_nested_calls_at_once_do_not_wait_for_each_other() -> None:
    futures = [rpc.rpc_async(f"w{i % 3}", work.depth, args=(20, names(3))) for i in range(12)]
    assert [future.wait() for future in futures] == [20] * 12


# ---- how many at once


@in_job
def test_answers_reach_the_thread_that_asked() -> None:
    wrong: list[Any] = []

    def ask(number: int) -> None:
        to = f"w{1 + number % 2}"
        for step in range(1000):
            mine = (number, step)
            answer = rpc.rpc_sync(to, work.echo, args=(mine,))
            if answer != mine:
                wrong.append((mine, answer))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@in_job
def test_more_threads_than_response_slots_all_get_their_answers() -> None:
    right: list[int] = []

    def ask(number: int) -> None:
        right.append(rpc.rpc_sync("w1", work.echo, args=(number,)) == number)

    gate = rpc.rpc_async("w1", work.sleep, args=(0.2,))
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.wait() == 0.2
    assert right == [True] * 150


@in_job
def test_workers_that_flood_each_other_all_finish() -> None:
    futures = [
        rpc.rpc_async(f"w{caller}", work.call_many, args=(f"w{callee}", 300, size))
        for caller in range(3)
        for callee in range(3)
        for size in (10, 3000, 20_000)
    ]
    assert [future.wait() for future in futures] == [300] * 27
