"""Mistakes at the edge of the API: a typed error with the known text, on the side that can act, and nothing is lost."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import NotInitialized, RemoteError, UsageError
from tests import failing, work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3)

PICKLE_ERRORS = (pickle.PicklingError, TypeError, AttributeError)
CALLS: list[Callable[..., Any]] = [rpc.rpc_sync, rpc.rpc_async, rpc.remote]


def fetch(answer: Any) -> Any:
    """Return the result of any kind of call."""
    if isinstance(answer, rpc.RRef):
        return answer.to_here()
    return answer.wait() if isinstance(answer, torch.futures.Future) else answer


# ---- before init_rpc


def test_nothing_works_before_init_rpc() -> None:
    text = r"RPC has not been initialized. Call torch.distributed.rpc.init_rpc first."
    for attempt in (
        lambda: rpc.rpc_sync("w1", work.nothing),
        lambda: rpc.rpc_async("w1", work.nothing),
        lambda: rpc.remote("w1", work.nothing),
        lambda: rpc.get_worker_info(),
        lambda: rpc.get_worker_info("w1"),
        lambda: rpc._get_debug_info(),
        lambda: rpc.api._all_gather(1),
        lambda: rpc.api._barrier(["w0"]),
        lambda: rpc.api._wait_all_workers(),
    ):
        with pytest.raises(NotInitialized) as caught:
            attempt()
        assert str(caught.value) == text
        assert isinstance(caught.value, RuntimeError)
    with pytest.raises(NotInitialized) as caught:
        rpc.RRef(1)
    assert str(caught.value) == (
        "Current RPC agent is not set! Did you initialize the RPC framework (e.g. by calling `rpc.init_rpc`)?"
    )
    rpc.shutdown()  # leaves nothing, as it joined nothing
    assert rpc.is_available()


BAD_NAMES = ["", "a b", "a/b", "\u00e9", "x" * 128, "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_no_worker_may_have_is_refused(name: Any) -> None:
    with pytest.raises(UsageError) as caught:
        rpc.init_rpc(name, rank=0, world_size=1)
    assert str(caught.value) == (
        f"Worker name must match ^[A-Za-z0-9-_:]*$, and must be non-empty and shorter than 128 chars, but got {name!r}"
    )


@pytest.mark.parametrize("name", [None, 5, b"w"], ids=repr)
def test_a_name_that_is_no_string_is_refused(name: Any) -> None:
    with pytest.raises((TypeError, UsageError), match="name"):
        rpc.init_rpc(name, rank=0, world_size=1)


def test_options_and_backends_of_other_types_are_refused() -> None:
    options: Any = {"rpc_timeout": 5}
    with pytest.raises(TypeError, match="Argument rpc_backend_options must be an instance of RpcBackendOptions"):
        rpc.init_rpc("w0", rank=0, world_size=1, rpc_backend_options=options)
    with pytest.raises(TypeError, match="Argument backend must be a member of BackendType"):
        rpc.init_rpc("w0", backend="other", rank=0, world_size=1)


@pytest.mark.parametrize(
    "options",
    [
        *({"rpc_timeout": -1}, {"rpc_timeout": math.nan}, {"rpc_timeout": -math.inf}, {"num_worker_threads": 0}),
        *({"num_worker_threads": -1}, {"table_bits": 62}, {"table_bits": -1}),
        *({"table_capacity": 1}, {"table_capacity": 100}, {"table_capacity": 1 << 25}, {"arena_limit": -1}),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} is .*got {next(iter(options.values()))!r}"):
        rpc.RpcBackendOptions(**options)


@pytest.mark.parametrize("fields", [("a", "b"), ("a", 1.0), ("a", None), (5, 5), (b"a", 1)], ids=str)
def test_a_worker_info_has_a_name_and_a_rank(fields: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        rpc.WorkerInfo(*fields)
    for rank in (True, np.int64(1)):
        assert repr(rpc.WorkerInfo("a", rank)) == "WorkerInfo(id=1, name=a)"


@pytest.mark.parametrize("kind", [rpc.RpcBackendOptions, rpc.TensorPipeRpcBackendOptions])
@pytest.mark.parametrize(
    "options",
    [
        *({"rpc_timeout": "1"}, {"rpc_timeout": b"1"}, {"rpc_timeout": None}, {"rpc_timeout": timedelta(seconds=1)}),
        *({"rpc_timeout": 1j}, {"init_method": 5}, {"init_method": b"env://"}),
        *({"num_worker_threads": "1"}, {"num_worker_threads": 1.5}, {"num_worker_threads": None}),
    ],
    ids=str,
)
def test_options_of_another_type_are_type_errors_as_torchs_are(kind: type, options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(TypeError, match="incompatible constructor arguments") as caught:
        kind(**options)
    assert f": {name} is a " in str(caught.value)
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("timeout", [timedelta(seconds=1), "1", None, -1, math.nan], ids=repr)
def test_a_timeout_that_is_none_cannot_be_set_later_either(timeout: Any) -> None:
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=5)
    with pytest.raises((TypeError, UsageError), match="rpc_timeout is a number of seconds"):
        options.rpc_timeout = timeout
    assert options.rpc_timeout == 5
    options.rpc_timeout = np.float32(6)  # type: ignore[assignment]
    assert (options.rpc_timeout, type(options.rpc_timeout)) == (6.0, float)


@pytest.mark.parametrize("number", [5, np.float32(5), np.int64(5), torch.tensor(5.0), Fraction(5)], ids=repr)
def test_a_timeout_may_be_a_number_of_any_library(number: Any) -> None:
    options = rpc.RpcBackendOptions(rpc_timeout=number)
    assert (options.rpc_timeout, type(options.rpc_timeout)) == (5.0, float)
    assert type(rpc.RpcBackendOptions(num_worker_threads=np.int64(5)).num_worker_threads) is int


def test_a_rank_and_a_size_may_be_integers_of_any_library() -> None:
    options = rpc.RpcBackendOptions(init_method="local://of-any-library")
    with rpc.init_rpc("w0", rank=np.int64(0), world_size=np.int32(1), rpc_backend_options=options):
        assert type(rpc.get_worker_info().id) is int
        assert rpc.rpc_sync("w0", work.add, args=(1, 2)) == 3
    store = torch.distributed.HashStore()
    rpc._init_rpc_backend(rpc.BackendType.TENSORPIPE, store, "w0", np.int64(0), np.int64(1), options)
    rpc.shutdown()


@pytest.mark.parametrize("rank", ["0", 1.5, -2, np.float64(0), np.bool_(False)])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    with pytest.raises((UsageError, TypeError), match="rank"):
        rpc.init_rpc("w0", rank=rank, world_size=1, rpc_backend_options=rpc.RpcBackendOptions(init_method="local://x"))


@pytest.mark.parametrize("world_size", ["1", 1.5, -1, 0])
def test_a_world_size_that_is_none_is_refused(world_size: Any) -> None:
    options = rpc.RpcBackendOptions(init_method="local://x")
    try:
        with pytest.raises((UsageError, TypeError), match="world_size"):
            rpc.init_rpc("w0", rank=0, world_size=world_size, rpc_backend_options=options)
    finally:
        rpc.shutdown(graceful=False)


@pytest.mark.parametrize("init_method", ["", "nonsense", "local://", "://x"])
def test_an_init_method_that_is_none_is_refused(init_method: str) -> None:
    options = rpc.RpcBackendOptions(init_method=init_method)
    with pytest.raises(UsageError, match="local://NAME"):
        rpc.init_rpc("w0", rank=0, world_size=1, rpc_backend_options=options)


# ---- whom


@pytest.mark.parametrize("to", ["nobody", "", "W1", 3, 7, -1, -3])
@in_job
def test_an_unknown_destination_is_named(to: Any) -> None:
    what = "name" if isinstance(to, str) else "id"
    for call in (*CALLS, lambda to, _: rpc.get_worker_info(to)):
        with pytest.raises(UsageError) as caught:
            call(to, work.nothing)
        assert str(caught.value) == f"name:w0,rank:0 could not find destination {what} {to}"


@pytest.mark.parametrize("rank", [1, True, np.int64(1)], ids=repr)
@in_job
def test_a_worker_is_found_by_an_integer_of_any_library(rank: Any) -> None:
    for find in (rpc.get_worker_info, rpc._get_current_rpc_agent().get_worker_info):
        assert find(rank) == rpc.get_worker_info("w1")


@in_job
def test_a_destination_of_another_job_is_unknown() -> None:
    for call in CALLS:
        with pytest.raises(UsageError, match="could not find destination"):
            call(rpc.WorkerInfo("w9", 1), work.nothing)


@pytest.mark.parametrize("to", [3.5, None, b"w1", ("w1",), [1]], ids=repr)
@in_job
def test_a_destination_of_another_type_is_refused(to: Any) -> None:
    for call in CALLS:
        with pytest.raises(ValueError, match="^Cannot get WorkerInfo from name ") as caught:
            call(to, work.nothing)
        assert str(caught.value) == f"Cannot get WorkerInfo from name {to}"


# ---- what


@pytest.mark.parametrize("function", [5, None, "add", (work.add,)], ids=repr)
@in_job
def test_what_cannot_be_called_is_refused(function: Any) -> None:
    for call in (rpc.rpc_sync, rpc.rpc_async):
        with pytest.raises(TypeError, match=r"^function should be callable\.$"):
            call("w1", function)
    with pytest.raises(TypeError, match="object is not callable") as caught:
        rpc.remote("w1", function).to_here()
    assert isinstance(caught.value, RemoteError)


@in_job
def test_a_function_that_the_callee_lacks_is_an_error_of_its_name() -> None:
    def lacking() -> None: ...

    lacking.__module__, lacking.__qualname__ = work.__name__, "lacking"
    work.lacking = lacking  # type: ignore[attr-defined]
    try:
        for call in CALLS:
            for _ in range(2):
                with pytest.raises(AttributeError, match="'tests.work' has no attribute 'lacking'") as caught:
                    fetch(call("w1", lacking))
                assert "Default RPC pickler does not serialize\n            function code." in str(caught.value)
    finally:
        del work.lacking  # type: ignore[attr-defined]


@in_job
def test_a_module_that_the_callee_lacks_is_an_import_error() -> None:
    import sys
    import types

    module = types.ModuleType("only_here")
    sys.modules["only_here"] = module
    exec("def function(): pass\nclass Class: pass", module.__dict__)
    try:
        for call in CALLS:
            for args in ((module.function,), (work.echo, (module.Class(),))):
                with pytest.raises(ModuleNotFoundError, match="only_here"):
                    fetch(call("w1", *args))
    finally:
        del sys.modules["only_here"]


@pytest.mark.parametrize("args", [5, 1.5, object()], ids=str)
@in_job
def test_arguments_that_are_no_sequence_are_refused(args: Any) -> None:
    for call in CALLS:
        with pytest.raises(TypeError):
            call("w1", work.nothing, args)


@pytest.mark.parametrize("kwargs", [5, [("a", 1)], {1: 2}], ids=str)
@in_job
def test_keywords_that_are_none_are_refused(kwargs: Any) -> None:
    for call in CALLS:
        with pytest.raises(TypeError):
            fetch(call("w1", work.gather, (), kwargs))


@pytest.mark.parametrize("nothing", [None, (), [], 0, False, "", {}], ids=repr)
@in_job
def test_arguments_that_are_false_are_none(nothing: Any) -> None:
    for call in CALLS:
        assert fetch(call("w1", work.gather, nothing, nothing)) == fetch(call("w1", work.gather))


@in_job
def test_arguments_that_do_not_fit_the_function_are_its_type_error() -> None:
    for call in CALLS:
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            fetch(call("w1", work.add, (1,)))
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            fetch(call("w1", work.nothing, (), {"extra": 1}))


@pytest.mark.parametrize("timeout", ["1", None, [1]], ids=repr)
@in_job
def test_a_timeout_that_is_no_number_is_refused(timeout: Any) -> None:
    for call in CALLS:
        with pytest.raises(TypeError):
            call("w1", work.nothing, timeout=timeout)
    rref = rpc.remote("w1", work.Counter)
    for use in (rref.to_here, rref.local_value, lambda timeout: rref.rpc_sync(timeout).get()):
        with pytest.raises(TypeError):
            use(timeout)


# ---- with which values


UNPICKLABLE: list[Callable[[], Any]] = [
    *(failing.make_lock, failing.make_generator, failing.RaisesWhenPickled, lambda: [1, {"a": failing.make_lock()}]),
    *(torch.futures.Future, lambda: {failing.RaisesWhenPickled(): 1}, failing.make_frame),
]


@pytest.mark.parametrize("make", range(len(UNPICKLABLE)))
@in_job
def test_an_argument_that_cannot_be_pickled_is_an_error_of_the_caller(make: int) -> None:
    value = UNPICKLABLE[make]()
    rref, mine = rpc.remote("w1", work.Traced), rpc.RRef(work.Traced())
    for call in CALLS:
        for to in ("w1", "w0"):
            # The references before it were reserved, and are let go of again.
            with pytest.raises((*PICKLE_ERRORS, ZeroDivisionError, RuntimeError)) as caught:
                call(to, work.gather, (rref, mine, value))
            assert not isinstance(caught.value, RemoteError)
    del rref, mine, caught  # whose traceback leads to the arguments
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(0,)) == 0
    assert work.wait_until_traced(0) == 0


@in_job
def test_a_future_cannot_travel() -> None:
    future = rpc.rpc_async("w1", work.nothing)
    for call in CALLS:
        with pytest.raises(RuntimeError, match=r"^Can not pickle torch.futures.Future$"):
            call("w1", work.echo, (future,))
    assert future.wait() is None


@pytest.mark.parametrize("function", [failing.make_lock, failing.make_generator], ids=lambda f: f.__name__)
@in_job
def test_a_result_that_cannot_be_pickled_is_an_error_of_the_call(function: Callable[[], Any]) -> None:
    for to in ("w1", "w0"):
        for call in (rpc.rpc_sync, rpc.rpc_async):
            with pytest.raises(TypeError, match="pickle") as caught:
                fetch(call(to, function))
            assert isinstance(caught.value, RemoteError)
            with pytest.raises(ZeroDivisionError, match="while pickling"):
                fetch(call(to, failing.make, ("RaisesWhenPickled",)))


@in_job
def test_a_value_that_cannot_be_pickled_is_used_where_it_lives() -> None:
    rref = rpc.remote("w1", failing.make_lock)
    with pytest.raises(TypeError, match="pickle") as caught:
        rref.to_here()
    assert isinstance(caught.value, RemoteError)
    assert rref.rpc_sync().locked() is False
    assert rref.rpc_sync().acquire() is True
    assert rref.rpc_sync().locked() is True
    rref = rpc.rpc_sync("w1", failing.keep_lock)
    assert rref.rpc_sync().locked() is False
    assert rpc.rpc_sync("w1", work.drop) == 1


@in_job
def test_an_argument_that_raises_while_it_is_unpickled_is_an_error_of_the_call() -> None:
    rref = rpc.remote("w1", work.Traced)
    for to in ("w1", "w0"):
        for call in CALLS:
            with pytest.raises(ZeroDivisionError, match="while unpickling") as caught:
                fetch(call(to, work.gather, (rref, failing.RaisesWhenUnpickled())))
            assert isinstance(caught.value, RemoteError)
            with pytest.raises(RemoteError):
                fetch(call(to, work.gather, (rref, failing.ExitsWhenUnpickled())))
    del rref, caught
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(0,)) == 0


@in_job
def test_a_result_that_raises_while_it_is_unpickled_is_an_error_of_the_caller() -> None:
    for to, call in [("w1", rpc.rpc_sync), ("w1", rpc.rpc_async), ("w1", rpc.remote), ("w0", rpc.rpc_sync)]:
        with pytest.raises(ZeroDivisionError, match="while unpickling"):
            fetch(call(to, failing.make, ("RaisesWhenUnpickled",)))
        assert rpc.rpc_sync(to, work.add, args=(1, 2)) == 3


@in_job
def test_a_result_that_exits_while_it_is_unpickled_ends_no_serving_thread() -> None:
    for _ in range(3):
        with pytest.raises(BaseException, match="4"):
            rpc.rpc_async("w1", failing.make, args=("ExitsWhenUnpickled",)).wait()
        assert rpc.rpc_async("w1", work.add, args=(1, 2)).wait() == 3


@in_job
def test_bad_input_in_many_threads_loses_nothing() -> None:
    wrong: list[Any] = []

    def try_all() -> None:
        for number in range(60):
            try:
                rpc.rpc_sync("w1", work.gather, (failing.make_lock(),))
            except TypeError:
                pass
            else:
                wrong.append("a lock travelled")
            try:
                rpc.rpc_sync("w1", work.echo, args=(failing.RaisesWhenUnpickled(),))
            except ZeroDivisionError:
                pass
            if rpc.rpc_sync("w1", work.echo, args=(number,)) != number:
                wrong.append(number)

    threads = [threading.Thread(target=try_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
