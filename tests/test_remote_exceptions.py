"""What a function raises elsewhere is raised here: of its type, with its text, and it ends nobody's process."""

from __future__ import annotations

import asyncio
import math
import pickle
import subprocess
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import CallTimeout, FastrefError, RemoteError, UsageError
from tests import failing, work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(4, [{}, {"transport": "tcp"}])


def raised_by(function: Any, *args: Any, to: str = "w1", **kwargs: Any) -> list[BaseException]:
    """Return what a function raises by each kind of call."""
    caught = []
    for attempt in (
        lambda: rpc.rpc_sync(to, function, args=args, kwargs=kwargs),
        lambda: rpc.rpc_async(to, function, args=args, kwargs=kwargs).wait(),
        lambda: rpc.remote(to, function, args=args, kwargs=kwargs).to_here(),
    ):
        try:
            attempt()
        except BaseException as error:
            caught.append(error.with_traceback(None))
        else:
            raise AssertionError(f"{function} returned")
    return caught


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "shown"),
    [
        (torch.add, ("a", 1), {}, "aten::add(str, int): add(): argument 'input' (position 1) must be Tensor, not str"),
        (torch.add, (), {}, "aten::add(): add() received an invalid combination of arguments"),
        (torch.neg, (), {"input": 5}, "aten::neg(input=int): neg(): argument 'input' must be Tensor, not int"),
        (torch.nn.functional.linear, ([],), {}, "aten::linear(list): linear()"),
        (math.sqrt, ("a",), {}, "aten::sqrt(str): must be real number, not str"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@in_job
def test_wrong_arguments_of_an_operator_are_the_runtime_error_that_torch_raises(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: str
) -> None:
    for to in ("w1", "w0"):
        for error in raised_by(operator, *args, to=to, **kwargs):
            assert isinstance(error, RemoteError)
            assert not isinstance(error, TypeError)
            text = str(error.__cause__)
            assert text.startswith("Overloaded torch operator invoked from Python failed to match any schema: " + shown)
    for error in raised_by(len, 5):  # no operator
        assert isinstance(error, TypeError)


BUILT_IN = [
    *(ValueError("text"), KeyError("key"), TypeError("type"), IndexError(1), ZeroDivisionError(), StopIteration(5)),
    *(OSError(2, "No such file", "/nowhere"), FileNotFoundError(2, "gone"), ConnectionResetError("reset")),
    *(TimeoutError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeEncodeError("ascii", "e", 0, 1, "bad")),
    *(NotImplementedError("later"), AttributeError("none"), ImportError("no", name="x"), MemoryError(), EOFError()),
    *(SyntaxError("bad", ("f", 1, 2, "x")), AssertionError(), RecursionError("deep"), ArithmeticError(1, 2, 3)),
    *(Warning("w"), Exception(), asyncio.CancelledError(), subprocess.CalledProcessError(1, "cmd")),
    *(pickle.PicklingError("p"), StopAsyncIteration(), ExceptionGroup("two", [ValueError("one"), KeyError(2)])),
]


@pytest.mark.parametrize("original", BUILT_IN, ids=lambda error: type(error).__name__)
@in_job
def test_a_built_in_exception_is_raised_as_its_own_type(original: BaseException) -> None:
    for to in ("w1", "w0"):
        for error in raised_by(failing.raise_it, original, to=to):
            assert isinstance(error, RemoteError)
            if isinstance(original, Exception):
                assert isinstance(error, type(original))
            assert type(error.__cause__) is type(original)
            assert repr(error.__cause__) == repr(original)
            assert str(error).startswith(f"On WorkerInfo(id={to[1]}, name={to}):\n{original!r}\n")
            assert "Traceback (most recent call last):" in error.remote_traceback


@in_job
def test_attributes_of_an_exception_come_with_it() -> None:
    for error in raised_by(failing.raise_it, OSError(2, "No such file", "/nowhere")):
        assert isinstance(error, FileNotFoundError)
        assert error.__cause__.errno == 2
        assert error.__cause__.filename == "/nowhere"
    for error in raised_by(failing.make_and_raise, "Complete", 7, "why"):
        assert isinstance(error, failing.Complete)
        assert (error.code, error.reason) == (7, "why")
    for error in raised_by(failing.raise_it, StopIteration(5)):
        assert error.__cause__.value == 5


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        ("WithoutArguments", (), {}),
        ("Demanding", (5,), {"reason": "why"}),
        ("Complete", (5, "why"), {}),
        ("Holding", ("text",), {}),
        ("Slotted", ("text", 5), {}),
        ("Speechless", (), {}),
        ("Stubborn", ("text",), {}),
        ("Escaping", ("text",), {}),
    ],
)
@in_job
def test_an_exception_of_any_class_keeps_its_type(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for to in ("w1", "w0"):
        for error in raised_by(failing.make_and_raise, kind, *args, to=to, **kwargs):
            assert isinstance(error, RemoteError)
            assert isinstance(error, getattr(failing, kind)), type(error).__mro__
            assert type(error).__name__ == kind
            assert str(error).startswith(f"On WorkerInfo(id={to[1]}, name={to}):\n")


@in_job
def test_an_exception_that_is_no_exception_to_the_caller_is_a_remote_error() -> None:
    for function, args in ((failing.make_and_raise, ("Own",)), (failing.raise_local, ()), (failing.raise_deep, ())):
        for error in raised_by(function, *args):
            assert isinstance(error, RemoteError)
            assert isinstance(error, Exception)
    assert isinstance(raised_by(failing.raise_local)[0], ValueError)
    assert isinstance(raised_by(failing.raise_deep)[0], RecursionError)


@in_job
def test_both_ways_to_catch_it_work() -> None:
    with pytest.raises(ValueError, match="text"):
        rpc.rpc_sync("w1", failing.outer, args=("text",))
    with pytest.raises(RemoteError, match="text"):
        rpc.rpc_sync("w1", failing.outer, args=("text",))
    with pytest.raises(RuntimeError, match="text"):  # as programs written for torch do
        rpc.rpc_sync("w1", failing.raise_it, args=(KeyError("text"),))
    with pytest.raises(FastrefError, match="text"):
        rpc.rpc_sync("w1", failing.outer, args=("text",))


@in_job
def test_the_remote_traceback_names_the_functions_that_were_running() -> None:
    for error in raised_by(failing.outer, "text"):
        for part in ("in outer", "in inner_function_with_a_name", "failing.py", "ValueError: text"):
            assert part in error.remote_traceback
            assert part in str(error)
        assert error.remote_traceback.startswith("Traceback (most recent call last):\n")
        assert str(error) == f"On WorkerInfo(id=1, name=w1):\nValueError('text')\n{error.remote_traceback}"


@in_job
def test_the_cause_of_the_original_is_told() -> None:
    for error in raised_by(failing.raise_from, "text", "the deeper reason"):
        assert isinstance(error, ValueError)
        assert "KeyError: 'the deeper reason'" in error.remote_traceback
        assert "direct cause" in error.remote_traceback
    for error in raised_by(failing.raise_group):
        assert isinstance(error, ExceptionGroup)
        assert "FileNotFoundError: [Errno 2] other" in error.remote_traceback
        assert isinstance(error.__cause__, ExceptionGroup)


TEXTS = [
    *("h\u00e9llo \N{SNOWMAN} \U0001f600", "C:\\Users\\new\\table", "a\nb\tc\\n", "\x00\x1b[0m", "%s {0} {x}"),
    "RPCErr:1:RPC ran for more than set timeout",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@in_job
def test_texts_arrive_as_they_were(text: str) -> None:
    for error in raised_by(failing.outer, text):
        assert error.__cause__.args == (text,)
        assert f"ValueError: {text}" in str(error)
        assert type(error).__name__ == "ValueError"
        assert not isinstance(error, CallTimeout)


@in_job
def test_a_text_without_end_is_cut() -> None:
    for error in raised_by(failing.outer, "x" * 3_000_000):
        assert isinstance(error, ValueError)
        assert len(str(error)) < 3_000_000


@pytest.mark.parametrize("route", [["w2"], ["w2", "w3"], ["w2", "w1"], ["w2", "w3", "w0", "w1", "w0"]])
@in_job
def test_an_exception_keeps_its_type_through_nested_calls(route: list[str]) -> None:
    for kind, args in (("Complete", (5, "why")), ("Holding", ("text",)), ("WithoutArguments", ())):
        for error in raised_by(failing.raise_through, route, kind, *args):
            assert isinstance(error, getattr(failing, kind))
            assert isinstance(error, RemoteError)
            assert f"On WorkerInfo(id={route[-1][1]}, name={route[-1]})" in str(error)
            assert "On WorkerInfo(id=1, name=w1)" in str(error)
            if kind == "Complete":
                assert (type(error.__cause__), error.__cause__.code) == (failing.Complete, 5)


@in_job
def test_errors_of_our_own_keep_their_type_through_nested_calls() -> None:
    with pytest.raises(CallTimeout) as caught:
        rpc.rpc_sync("w1", rpc.rpc_sync, args=("w2", work.sleep, (0.2,), None, 0.02))
    assert isinstance(caught.value, RemoteError)
    with pytest.raises(UsageError, match="could not find destination name nobody"):
        rpc.rpc_sync("w1", rpc.rpc_sync, args=("nobody", work.nothing))


@in_job
def test_an_exception_can_be_raised_again_pickled_and_shown() -> None:
    for error in raised_by(failing.make_and_raise, "Complete", 5, "why"):
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, RemoteError)
        assert isinstance(copy, failing.Complete)
        assert str(copy) == str(error)
        assert copy.remote_traceback == error.remote_traceback
        assert "code 5: why" in repr(error)
        assert isinstance(rpc.rpc_sync("w2", work.echo, args=(error,)), failing.Complete)


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit(), KeyboardInterrupt(), GeneratorExit()])
@in_job
def test_an_exit_raised_in_a_function_ends_nobody(error: BaseException) -> None:
    for to in ("w1", "w0"):
        for caught in raised_by(failing.raise_it, error, to=to):
            assert isinstance(caught, RemoteError)
            assert not isinstance(caught, type(error))
        assert isinstance(raised_by(failing.exit_the_process, to=to)[0], RemoteError)
        with pytest.raises(RemoteError):
            rpc.RRef(failing.WithoutArguments()).rpc_sync().with_traceback(1)
        for _ in range(20):  # each serving thread is still there
            assert rpc.rpc_sync(to, work.add, args=(1, 2)) == 3


@in_job
def test_a_call_that_failed_changes_nothing_for_the_next() -> None:
    for _ in range(200):
        with pytest.raises(ValueError, match="text"):
            rpc.rpc_sync("w1", failing.outer, args=("text",))
        assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
