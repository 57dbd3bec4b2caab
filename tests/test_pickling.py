"""What the fast encoding cannot take: pickle with buffers and references outside, failures, and ``__main__``."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from fastref.codec import mainmodule
from fastref.codec.failures import decode_failure, encode_failure
from fastref.codec.pickling import dumps, loads
from fastref.errors import CallTimeout, FastrefError, ProtocolError, RemoteError, UsageError, WorkerDied

ROOT = Path(__file__).resolve().parent.parent


def there_and_back(value):
    """Pickle and unpickle, with copies of the buffers, as the wire makes them."""
    references: list = []
    data, buffers = dumps(value, references)
    return loads(data, [bytearray(buffer) for buffer in buffers], references)


# Values


def test_identity_and_cycles_survive():
    inner, looped = [1], {}
    looped["me"] = looped
    back = there_and_back([inner, inner, looped, (t := torch.ones(3)), t])
    assert back[0] is back[1] and back[2]["me"] is back[2] and back[3] is back[4]


@pytest.mark.parametrize(
    "value",
    [
        10**1000,
        "\ud800",
        1j,
        {1, 2},
        frozenset("ab"),
        bytearray(b"x"),
        range(4),
        Exception("x"),
        functools.partial(int, base=2),
    ],
    ids=repr,
)
def test_other_values_come_back(value):
    back = there_and_back(value)
    assert type(back) is type(value)
    assert back == value or repr(back) == repr(value)  # exceptions and partials are equal to themselves only


def test_lambdas_and_closures_go_by_value():
    factor = 3
    assert there_and_back(lambda x: x * factor)(5) == 15

    class Local:
        def twice(self, x):
            return 2 * x

    assert there_and_back(Local)().twice(4) == 8


def test_what_cannot_be_pickled_says_what_pickle_says_and_leaves_no_reference():
    class Refuses:
        def __reduce__(self):
            raise TypeError("I do not travel")

    references: list = ["already here"]
    with pytest.raises(TypeError, match="I do not travel"):
        dumps([Refuses()], references)
    assert references == ["already here"]

    class Breaks:
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dumps([Breaks()], references)
    assert references == ["already here"]


def test_a_future_does_not_travel():
    with pytest.raises(RuntimeError, match="Can not pickle torch.futures.Future"):
        dumps(torch.futures.Future(), [])


def test_large_buffers_stay_outside_the_pickle():
    value = {"a": np.arange(100_000.0), "b": torch.arange(100_000), "c": np.asfortranarray(np.ones((300, 200)))}
    data, buffers = dumps(value, [])
    assert len(data) < 2000 and [buffer.nbytes for buffer in buffers] == [800_000, 800_000, 480_000]
    back = loads(data, [bytearray(buffer) for buffer in buffers], [])
    assert all(np.array_equal(back[name], value[name]) for name in value)
    assert back["c"].flags.f_contiguous
    back["a"][0] = back["b"][0] = 7  # writable, as a copy should be
    assert value["a"][0] == 0 and value["b"][0] == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, requires_grad=True),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(8)[::2],
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.eye(3).to_sparse(),
        torch.ones((1,) * 20),
        torch.zeros(3, 0),
        torch.tensor(True),
        torch.ones(3, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
    ],
    ids=[
        "grad",
        "transposed",
        "strided",
        "conjugated",
        "negative",
        "sparse",
        "20d",
        "empty",
        "scalar",
        "bfloat16",
        "parameter",
        "frozen",
    ],
)
def test_every_tensor_comes_back(tensor):
    back = there_and_back(tensor)
    assert type(back) is type(tensor)
    assert (back.dtype, back.shape, back.layout, back.requires_grad) == (
        tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad,
    )  # fmt: skip
    assert torch.equal(back.detach().to_dense().resolve_conj(), tensor.detach().to_dense().resolve_conj())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_a_quantized_tensor_comes_back():
    tensor = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8)
    assert torch.equal(there_and_back(tensor).dequantize(), tensor.dequantize())


def test_a_module_comes_back():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    x = torch.ones(2, 3)
    assert torch.equal(there_and_back(module)(x), module(x))


def test_a_reference_number_outside_a_call_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="outside a call"):
        pickle.loads(b"cfastref.codec.pickling\n_reference\n(I0\ntR.")
    assert loads(b"cfastref.codec.pickling\n_reference\n(I0\ntR.", [], ["the reference"]) == "the reference"


# Failures


def fail(error: BaseException) -> BaseException:
    """What the caller gets to see when a callee raises ``error``."""
    try:
        raise error
    except BaseException as raised:
        return decode_failure(encode_failure(raised, "WorkerInfo(id=1, name=bob)"))


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one, self.two = one, two


class WillNotShow(Exception):
    def __repr__(self):
        raise ValueError("no repr")

    __str__ = __repr__


class WithSlots(Exception):
    __slots__ = ("extra",)


class Meta(type):
    pass


class WithMeta(Exception, metaclass=Meta):
    pass


class NeverAgain(Exception):
    """Pickles, but refuses to be made from its pickle."""

    def __reduce__(self):
        return int, ("not a number",)


class NotEvenItself(Exception):
    def __reduce__(self):
        return int, ("3",)


class Unassignable(Exception):
    def __setattr__(self, name, value):
        raise AttributeError("frozen")


class NotInherited(Exception):
    def __init_subclass__(cls):
        raise RuntimeError("final")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k"),
        OSError(2, "gone", "file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        StopIteration(3),
        ZeroDivisionError(),
        RecursionError("deep"),
        ImportError("no", name="m"),
        AttributeError("a"),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
        BlockingIOError(11, "again", 3),
        WithSlots("s"),
        WithMeta("m"),
        UsageError("u"),
        ProtocolError("p"),
        CallTimeout("late", "bob"),
        WorkerDied("bob", 1, 2),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_is_caught_by_its_own_type_and_as_remote(error):
    got = fail(error)
    assert isinstance(got, RemoteError) and isinstance(got, type(error))
    assert type(got).__name__ == type(error).__name__ and type(got).__module__ == type(error).__module__
    assert str(got).startswith("On WorkerInfo(id=1, name=bob):\n" + repr(error))
    assert "Traceback (most recent call last)" in got.remote_traceback and "in fail" in got.remote_traceback
    assert type(got.__cause__) is type(error) and got.__cause__.args == error.args


def test_an_exception_that_refuses_its_own_arguments_keeps_its_type():
    got = fail(NeedsTwo(1, 2))
    assert isinstance(got, NeedsTwo) and isinstance(got, RemoteError) and "1 and 2" in str(got)


def test_the_number_of_a_system_error_arrives():
    got = fail(FileNotFoundError(2, "gone", "file"))
    assert (got.errno, got.strerror, got.filename) == (2, "gone", "file")


@pytest.mark.parametrize(
    "error",
    [
        WillNotShow("w"),
        NeverAgain("n"),
        NotEvenItself("n"),
        Unassignable("u"),
        NotInherited("n"),
        ExceptionGroup("g", [ValueError(1)]),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_of_any_shape_arrives_as_remote(error):
    got = fail(error)
    assert isinstance(got, RemoteError) and isinstance(got, Exception)
    assert str(got).startswith("On WorkerInfo(id=1, name=bob):\n")
    assert got.remote_traceback and "".join(traceback.format_exception(got))


def test_attributes_of_an_exception_arrive():
    error = ValueError("x")
    error.code = 7
    got = fail(error)
    assert got.code == got.__cause__.code == 7


def test_an_exception_of_a_local_class_arrives_by_value():
    class Local(Exception):
        pass

    got = fail(Local("x"))
    assert isinstance(got, RemoteError) and type(got).__name__ == "Local"


def test_a_failure_two_calls_away_keeps_the_type_that_was_raised_there():
    got = fail(fail(KeyError("far")))
    assert isinstance(got, KeyError) and isinstance(got, RemoteError)
    assert str(got).count("On WorkerInfo") > 1  # both ends of the way are named
    assert type(got.__cause__) is KeyError


def test_a_failure_can_be_pickled_again():
    got = pickle.loads(pickle.dumps(fail(ValueError("x"))))
    assert isinstance(got, ValueError) and isinstance(got, RemoteError)
    assert got.remote_traceback and isinstance(got, FastrefError)


def test_an_endless_text_is_cut():
    data = encode_failure(ValueError("x" * (8 << 20)), "bob")
    assert len(decode_failure(data).remote_traceback) <= 1 << 20


# __main__


def run_main(code: str, tmp_path: Path) -> str:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
    import sys
    sys.path.insert(0, {root!r})
    from fastref.codec import mainmodule

    def top(): pass
    class Top:
        def method(self): pass
    alias = top
    if sys.version_info > (3,):
        def chosen(): pass
    else:
        def chosen(): pass
    def outer():
        def inner(): pass
        return inner
    def rebound(): pass
    first = rebound
    def rebound(): return 2

    if __name__ == "__main__":
        def guarded(): pass
        names = ["top", "Top", "chosen", "guarded", "rebound"]
        print(*[name for name in names if mainmodule.is_shared(globals()[name])])
        print(mainmodule.is_shared(Top.method), mainmodule.is_shared(outer()), mainmodule.is_shared(first))
        print(mainmodule.owns(top), mainmodule.owns(print), mainmodule.find("Top.method") is Top.method)
        print(len(mainmodule.fingerprint()))
"""


def test_what_another_process_of_the_same_file_has_is_shared(tmp_path):
    out = run_main(PROGRAM.format(root=str(ROOT)), tmp_path).splitlines()
    assert out == ["top Top chosen rebound", "True False False", "True False True", "64"]


def test_a_session_without_a_file_shares_nothing():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom fastref.codec import mainmodule\ndef f(): pass\n"
    code += "print(repr(mainmodule.fingerprint()), mainmodule.owns(f), mainmodule.is_shared(f))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "'' True False", done.stderr


def test_a_function_of_main_goes_by_name_only_to_those_who_have_it(monkeypatch):
    main = sys.modules["__main__"]

    def f():
        return "mine"

    f.__module__, f.__qualname__ = "__main__", "f"
    monkeypatch.setattr(main, "f", f, raising=False)
    monkeypatch.setattr(mainmodule, "is_shared", lambda value: value is f)
    by_name, _ = dumps(f, [], shares_main=True)
    by_value, _ = dumps(f, [], shares_main=False)
    assert len(by_name) < 100 < len(by_value)
    assert loads(by_name, [], []) is f
    assert loads(by_value, [], []) is not f and loads(by_value, [], [])() == "mine"
