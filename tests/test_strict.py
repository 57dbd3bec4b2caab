"""Strict jobs: only what is registered is called, only plain data and tensors travel, and no pickle is ever read.

w2 is a worker that says that it is strict and is not: what it sends is what a hostile member of a job could.
"""

from __future__ import annotations

import copyreg
import functools
import os
import pickle
import re
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref.codec import pickling, registry
from fastref.codec.failures import decode_plain_failure
from fastref.codec.plain import decode, encode
from fastref.errors import CallTimeout, ProtocolError, RemoteError, StrictModeError, UsageError, WorkerDied
from fastref.rpc.internal import _InternalRPCPickler
from fastref.rref import RRefProxy, current_wiring
from fastref.wire import Kind
from tests import strict_work
from tests.jobs import in_job, job_fixtures
from tests.strict_work import ATTACKS, EXPLOITS, FUNCTIONS

LIAR = {"kind": strict_work.LyingOptions, "strict": False}
jobs, job = job_fixtures(3, [{"strict": True, "last": LIAR}, {"strict": True, "transport": "tcp", "last": LIAR}])


# ---- what goes


PLAIN: list[Callable[[], Any]] = [
    *(
        lambda: None,
        lambda: True,
        lambda: -(1 << 63) - 1,
        lambda: 1 << 1000,
        lambda: 2.5,
        lambda: 1j,
        lambda: "é\ud800",
    ),
    *(lambda: b"b" * 300_000, lambda: bytearray(b"ab"), lambda: (1, (2, [3])), lambda: {1, "a", (2, frozenset({3}))}),
    *(lambda: [[number] for number in range(5000)], lambda: {"a": {(1, None): ["b"]}}, lambda: torch.float8_e5m2),
    *(lambda: torch.Size([2, 3]), lambda: torch.device("cuda:1"), lambda: rpc.WorkerInfo("w7", 7)),
    *(lambda: OrderedDict(a=1, b=[2]), lambda: ["x" * 5000] * 2),
]


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_plain_data_is_what_it_was(number: int) -> None:
    value = PLAIN[number]()
    again = decode(encode(value))
    assert type(again) is type(value) and again == value


@in_job
def test_plain_data_travels_and_keeps_what_it_is() -> None:
    for make in PLAIN:
        value = make()
        again = rpc.rpc_sync("w1", strict_work.echo, (value,))
        assert type(again) is type(value) and again == value
    loop: list = [1]
    loop.append(loop)
    again = rpc.rpc_sync("w1", strict_work.echo, (loop,))
    assert again[1] is again
    same = [1]
    assert rpc.rpc_sync("w1", strict_work.are_same, (same, same))


@in_job
def test_tensors_travel() -> None:
    base = torch.arange(200_000.0)
    model = torch.nn.BatchNorm1d(3)
    model.bias = model.weight  # one parameter under two names
    values = [base, base[::2], base[:10], torch.zeros(0, 3), torch.tensor([1 + 2j]).conj(), model.weight]
    for value in values:
        again = rpc.rpc_sync("w1", strict_work.echo, (value,))
        assert type(again) is type(value) and again.requires_grad == value.requires_grad
        assert torch.equal(again, value)
    # Those that share memory arrive apart, and one that is met twice is one.
    one, other, first = rpc.rpc_sync("w1", strict_work.echo, ([base[:3], base[1:4], base],))
    assert torch.equal(other, base[1:4]) and torch.equal(first, base)
    one[1] = 100
    assert other[0] == 1
    state = rpc.rpc_sync("w1", strict_work.echo, (model.state_dict(),))
    assert type(state) is OrderedDict and state._metadata == model.state_dict()._metadata
    torch.nn.BatchNorm1d(3).load_state_dict(state)
    assert rpc.rpc_sync("w1", strict_work.shapes, ([base] * 40,)) == [base.shape] * 40
    with pytest.raises(StrictModeError, match=r"argument 1: a tensor in memory that several write \(send tensor.clone"):
        rpc.rpc_sync("w1", strict_work.echo, (fastref.shared_empty(3),))


@in_job
def test_a_large_tensor_is_handed_on_among_plain_data() -> None:
    forwarded = current_wiring().blocks_forwarded
    tensor = rpc.rpc_sync("w1", strict_work.ones, (1 << 20,))
    assert rpc.rpc_sync("w2", strict_work.total, ({"a set": {1}, "large": tensor},)) == 1 << 20
    assert current_wiring().blocks_forwarded - forwarded == (not current_wiring().peers[2].is_far)


@in_job
def test_references_travel_among_plain_data() -> None:
    value = [{"a set": {1}}, list(range(50))]
    mine, theirs = rpc.RRef(value), rpc.remote("w1", strict_work.echo, (value,))
    assert theirs.to_here() == value
    for rref in (mine, theirs):
        found = rpc.rpc_sync("w1", strict_work.echo, ({"refs": (rref, {3})},))["refs"][0]
        assert found.rref_id() == rref.rref_id()
        assert rpc.rpc_sync("w1", strict_work.fetch, (rref,)) == value
    mine.publish()
    assert rpc.rpc_sync("w1", strict_work.fetch, (mine,)) == value
    again = rpc.RRef._deserialize(theirs._serialize())
    assert again.to_here() == value


@in_job
def test_what_is_registered_is_called() -> None:
    assert rpc.rpc_sync("w1", strict_work.add, (1,), {"b": 2}) == 3
    assert rpc.rpc_async("w0", strict_work.add, ("a", "b")).wait() == "ab"
    assert rpc.rpc_sync("w1", strict_work.add_later, ("w0", 1, 2)) == 4
    assert rpc.rpc_sync("w1", torch.add, (torch.ones(2), 1)).tolist() == [2, 2]
    assert rpc.rpc_sync("w1", strict_work.gather, (1,), {"k": {2}}) == ((1,), {"k": {2}})


@in_job
def test_public_methods_of_registered_classes_are_called() -> None:
    for to in ("w0", "w1"):
        counter = rpc.remote(to, strict_work.Counter, (1,))
        assert counter.rpc_sync().add(2) == 3
        assert counter.rpc_async().double(4).wait() == 8
        assert counter.remote().named().to_here() == "Counter"
        assert counter.rpc_sync().__len__() == 3
        assert counter.rpc_sync().opened() == "opened"


HIDDEN = [
    *("inherited", "_hidden", "shown", "run", "alias", "limit", "count", "Inner", "missing", "", "add.__globals__"),
    *("__init__", "__class__", "__reduce_ex__", "__getattribute__", "__dict__", "__init_subclass__", "__setattr__"),
]


@in_job
def test_no_other_methods_are_called() -> None:
    for to in ("w0", "w1"):
        counter = rpc.remote(to, strict_work.Counter, (1,))
        for name in HIDDEN:
            with pytest.raises(StrictModeError, match="is no method of tests.strict_work.Counter that other workers"):
                RRefProxy.__getattr__(counter.rpc_sync(), name)()  # a proxy has some of them itself
        for value in ([1], torch.ones(1), strict_work.unregistered):
            with pytest.raises(StrictModeError, match="is no method of"):
                rpc.RRef(value).rpc_sync().append(2)
    assert strict_work.kept == []


REFUSED: list[tuple[tuple, dict, str]] = [
    ((object(),), {}, "argument 1: an object of class builtins.object is no plain data"),
    ((1, {"x": [0, strict_work.Base()]}), {}, "argument 2, key 'x', item 1: an object of class tests.strict_work.Base"),
    ((), {"k": (os.system,)}, "keyword argument 'k', item 0: an object of class builtins.builtin_function_or_method"),
    (({strict_work.OwnError: 1},), {}, "argument 1, a key: the class tests.strict_work.OwnError"),
    ((torch.zeros(2).to_sparse(),), {}, "argument 1: a tensor of kind torch.sparse_coo"),
    ((torch.zeros(2).numpy(),), {}, "argument 1: an object of class numpy.ndarray"),
]


@in_job
def test_what_is_not_plain_is_refused_where_it_would_be_sent() -> None:
    for args, kwargs, text in REFUSED:
        for call in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
            with pytest.raises(StrictModeError) as caught:
                call("w1", strict_work.gather, args, kwargs)
            assert str(caught.value).startswith(text) and not isinstance(caught.value, RemoteError)
    counter = rpc.remote("w1", strict_work.Counter)
    with pytest.raises(StrictModeError, match="^argument 2, item 1: an object of class builtins.object"):
        counter.rpc_sync().add(1, [0, object()])
    with pytest.raises(StrictModeError, match="^keyword argument 'amount': an object of class builtins.object"):
        counter.rpc_async().add(amount=object())
    sent = current_wiring().calls_sent
    with pytest.raises(StrictModeError, match="^argument 1, item 0.* inside of itself, is no plain data"):
        deep: list = []
        for _ in range(1000):
            deep = [deep]
        rpc.rpc_sync("w1", strict_work.echo, (deep,))
    for call in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
        for function in (strict_work.unregistered, len, strict_work.Base, lambda: 1):
            with pytest.raises(StrictModeError, match="is not registered, and a strict job calls nothing else"):
                call("w1", function)
    assert current_wiring().calls_sent == sent
    del caught


@in_job
def test_a_result_that_is_not_plain_is_an_error_of_the_call() -> None:
    rref = rpc.remote("w1", strict_work.make_object)
    with pytest.raises(StrictModeError, match="the result: the class builtins.object is no plain data"):
        rref._get_type()
    for use in (lambda: rpc.rpc_sync("w1", strict_work.make_object), rref.to_here):
        with pytest.raises(StrictModeError, match="the result: an object of class builtins.object") as caught:
            use()
        assert isinstance(caught.value, RemoteError)


@in_job
def test_exceptions_are_of_the_nearest_class_that_all_know() -> None:
    def raised(*what: Any) -> RemoteError:
        with pytest.raises(RemoteError) as caught:
            rpc.rpc_sync("w1", strict_work.fail, what)
        assert "On WorkerInfo(id=1, name=w1):\n" in str(caught.value)
        assert "in fail" in caught.value.remote_traceback
        return caught.value

    own = raised("OwnError", ["text"])
    assert isinstance(own, ValueError) and own.__cause__ is None and "OwnError('text')" in str(own)
    missing: Any = raised("OSError", [2, "gone", "a file"])
    assert isinstance(missing, FileNotFoundError) and (missing.errno, missing.filename) == (2, "a file")
    key = raised("KeyError", [("a", 1)])
    assert isinstance(key.__cause__, KeyError) and key.__cause__.args == (("a", 1),)
    assert isinstance(raised("KeyError", [{1}]), KeyError)
    assert isinstance(raised("KeyError", ["\ud800"]), KeyError)
    assert type(raised("bare", [])) is RemoteError
    with pytest.raises(KeyError):
        rpc.remote("w1", strict_work.fail, ("KeyError", [1])).to_here()
    with pytest.raises(WorkerDied) as caught:
        raise decode_plain_failure(current_wiring().encode_failure(WorkerDied("w9", 9, 99), "w1"))
    assert (caught.value.worker, caught.value.rank, caught.value.pid) == ("w9", 9, 99)


@in_job
def test_collectives_and_profilers_work_and_picklers_are_refused() -> None:
    names = {"w0", "w1"}
    thread = threading.Thread(target=rpc.rpc_sync, args=("w1", strict_work.gather_all, (sorted(names), {1})))
    thread.start()
    assert rpc.api._all_gather({0}, names) == {"w0": {0}, "w1": {1}}
    thread.join()
    with torch.autograd.profiler.profile():
        assert rpc.rpc_sync("w1", strict_work.add, (1, 2)) == 3
        assert rpc.rpc_async("w1", strict_work.add, (1, 2)).wait() == 3
        assert rpc.remote("w1", strict_work.Counter).rpc_sync().add(1) == 1
    with pytest.raises(StrictModeError, match="a strict job pickles nothing"):
        with rpc.api._use_rpc_pickler(_InternalRPCPickler()):
            pass
    with pytest.raises(CallTimeout):
        rpc.rpc_sync("w1", strict_work.sleep, (0.2,), timeout=0.01)


# ---- attacks of w2 on w0


# What reads pickles, imports by name or runs text; in a strict job nothing that a peer sends leads there.
DANGEROUS = re.compile(
    r"(?<!json\.)\bloads\(|\bUnpickler\b|\bimport_module\(|\b__import__\(|\b(?:jit|torch)\.load\("
    r"|(?<!\.)(?<!def )\beval\(|\bexec\("
)
KNOWN = {
    *("codec/pickling.py", "codec/failures.py", "codec/lookup.py", "codec/script.py", "runtime/payloads.pyx"),
    "rpc/internal.py",  # what programs hand it, and picklers of programs
}


def test_every_place_that_reads_a_pickle_is_known() -> None:
    package = Path(fastref.__file__).parent
    found = {
        str(source.relative_to(package))
        for source in (*package.rglob("*.py"), *package.rglob("*.pyx"))
        if DANGEROUS.search(source.read_text())
    }
    assert {name for name in found if not name.startswith(("bench/", "cli/", "compat/"))} == KNOWN


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return str(tmp_path / "mark")


@pytest.mark.parametrize("name", EXPLOITS)
def test_the_exploits_work_where_pickles_are_read(name: str, mark: str) -> None:
    exploit = EXPLOITS[name](mark)
    data = exploit.data if isinstance(exploit, strict_work.Bytes) else pickling.dumps(exploit, [])[0]
    sys.modules.pop("tests.rarely_imported", None)
    copyreg.add_extension("posix", "system", 1)
    try:
        done = pickling.loads(data, [], [])
        if name == "lambda":
            done()
    except (pickle.UnpicklingError, TypeError) as error:  # behind the place where it has run
        assert name in ("nonsense", "remote module's receiver", "chain of attributes"), error
    finally:
        copyreg.remove_extension("posix", "system", 1)
    if name == "import":
        assert sys.modules.pop("tests.rarely_imported")
    elif name == "script module":
        assert isinstance(done, torch.jit.ScriptModule)
    else:
        assert os.path.exists(mark) == (name != "nonsense")


@in_job
def test_the_tripwire_notices() -> None:
    strict_work.set_tripwire()
    pickle.loads(pickle.dumps(strict_work.Counter))
    assert [event.partition(" ")[0] for event in strict_work.events] == ["pickle.loads", "pickle.find_class"]
    pickling.loads(pickling.dumps(strict_work.Counter(), [])[0], [], [])
    assert "fastref.codec.pickling._Unpickler" in strict_work.events
    strict_work.set_tripwire()


def attacked(mark: str, outcomes: dict[Any, tuple[str, str]], told: str) -> None:
    """Check what came of attacks: nothing ran, no pickle was read, the attacker was told, and this worker serves."""
    assert {what: outcome for what, outcome in outcomes.items() if outcome[0] != "StrictModeError"} == {}
    assert {what: text for what, (_, text) in outcomes.items() if told not in text} == {}
    assert strict_work.events == []
    assert not os.path.exists(mark)
    assert "tests.rarely_imported" not in sys.modules
    assert strict_work.kept == []
    assert rpc.rpc_sync("w1", strict_work.echo, ("alive",)) == "alive"


@pytest.mark.parametrize("how", ATTACKS)
@in_job
def test_no_pickle_of_another_worker_is_read(how: str, mark: str) -> None:
    strict_work.set_tripwire()
    outcomes = {
        (exploit, ballast): rpc.rpc_sync("w2", strict_work.attack, ("w0", how, exploit, mark, ballast))
        for exploit in EXPLOITS
        for ballast in (0, 10_000, 500_000)
    }
    attacked(mark, outcomes, "is strict and does not read")


@in_job
def test_no_function_is_called_that_is_not_registered(mark: str) -> None:
    strict_work.set_tripwire()
    outcomes = {
        (function, how): rpc.rpc_sync("w2", strict_work.attack_by_name, ("w0", how, function, mark))
        for function in FUNCTIONS
        for how in ("sync", "async", "remote")
    }
    attacked(mark, outcomes, "strict")


@in_job
def test_answers_are_not_unpickled_either(mark: str) -> None:
    strict_work.set_tripwire()
    outcomes = {}
    for exploit in EXPLOITS:
        for raised in (False, True):
            if isinstance(EXPLOITS[exploit](mark), strict_work.Bytes):
                continue
            for use in (
                lambda call: rpc.rpc_sync("w2", *call),
                lambda call: rpc.rpc_async("w2", *call).wait(),
                lambda call: rpc.remote("w2", *call).to_here(),
            ):
                with pytest.raises(
                    StrictModeError, match="this worker is strict|is strict and does not read"
                ) as caught:
                    use((strict_work.answer_exploit, (exploit, mark, raised)))
                assert not isinstance(caught.value, RemoteError)
                outcomes[exploit, raised, len(outcomes)] = "StrictModeError", str(caught.value)
    attacked(mark, outcomes, "")


PICKLED, ERROR, ENCODED_PLAIN = 1, 4, 16


def record(kind: Kind, flags: int, payload: bytes, number: int = 0) -> bytes:
    return strict_work.HEAD.pack(kind, flags, 0, 0xFFFF, 7, 0, number, len(payload), 0, 0) + payload


@in_job
def test_a_record_that_no_sender_would_write_runs_nothing(mark: str) -> None:
    strict_work.set_tripwire()
    exploit = b"cos\nsystem\n(S'touch " + mark.encode() + b"'\ntR."
    pickled = struct.pack("=QQ", 0, len(exploit)) + exploit
    call = encode(("eval", ("1",), None))
    for flags in (0, PICKLED, PICKLED | ERROR, PICKLED | ENCODED_PLAIN, ENCODED_PLAIN, ERROR):
        for kind in (Kind.PYTHON_CALL, Kind.PYTHON_RET):
            for payload in (exploit, pickled, call, b""):
                rpc.rpc_sync("w2", strict_work.send_record, (0, record(kind, flags, payload), kind == Kind.PYTHON_CALL))
    rpc.rpc_sync("w2", strict_work.send_record, (0, record(Kind.INTERN, 0, encode(("os", "system")), 9), False))
    rpc.rpc_sync("w2", strict_work.send_record, (0, record(Kind.PYTHON_CALL, 0, encode((("true",), None)), 9), True))
    assert rpc.rpc_sync("w2", strict_work.echo, ("behind them",)) == "behind them"
    attacked(mark, {}, "")


# ---- what is not plain, one by one


@pytest.mark.parametrize(
    "data",
    [
        b"", b"?", b"m\0\0\0\0", b"l\xff\xff\xff\xff", b"S\1\0\0\0l\0\0\0\0", b"d\1\0\0\0l\0\0\0\0N", b"q\1\0\0\0N",
        b"y\3\0\0\0abc", b"v\3\0\0\0abc", b"wNN", b"u\1\0\0\0\xff", b"I\xff\0\0\0", b"l\1\0\0\0" * 300 + b"N", b"NN",
        b"l\2\0\0\0t\1\0\0\0Nd\1\0\0\0m\1\0\0\0N",
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_what_no_encoder_writes_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_an_exception_that_is_no_plain_data_is_refused() -> None:
    for data in (b"", b"garbage", b"\x80\x05.", encode([1, 2]), encode((1, 2, 3, [], (), ()))):
        assert type(decode_plain_failure(data)) is StrictModeError
    odd = encode(("w1", "shown", "trace", "UnicodeDecodeError", (1,), {"__class__": 1, "args": 2}))
    error = decode_plain_failure(odd)
    assert isinstance(error, UnicodeDecodeError) and error.__cause__ is None
    assert type(decode_plain_failure(encode(("w1", "", "", "os.system", ("true",), {})))) is RemoteError


def test_what_is_registered_has_one_name() -> None:
    def function() -> None: ...

    name = registry.name_of(rpc.register(function))
    assert name == f"{__name__}.test_what_is_registered_has_one_name.<locals>.function"
    first = function

    def function() -> None: ...  # type: ignore[no-redef]  # as a module does that is loaded again

    rpc.register(function)
    assert registry.by_name[name] is function
    with pytest.raises(StrictModeError):
        registry.name_of(first)
    with pytest.raises(UsageError, match="is registered as .* already"):
        rpc.register(len, name)
    with pytest.raises(UsageError, match="has no name of its own"):
        rpc.register(functools.partial(len))
    for wrong, named in ((5, None), (len, 5), (len, "")):
        with pytest.raises(TypeError):
            rpc.register(wrong, named)  # type: ignore[call-overload]
    del registry.by_name[name]


def test_the_environment_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, strict in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FASTREF_STRICT", text)
        assert rpc.TensorPipeRpcBackendOptions().strict is strict
    monkeypatch.setenv("FASTREF_STRICT", "1")
    assert rpc.RpcBackendOptions(strict=False).strict is False
    monkeypatch.setenv("FASTREF_STRICT", "yes")
    with pytest.raises(UsageError, match="FASTREF_STRICT is 1 or 0, got 'yes'"):
        rpc.RpcBackendOptions()


def test_a_pickler_of_the_program_keeps_it_from_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    options = rpc.RpcBackendOptions(init_method="local://strict-pickler", strict=True)
    with rpc.api._use_rpc_pickler(_InternalRPCPickler()):
        with pytest.raises(StrictModeError, match="a strict job pickles nothing"):
            rpc.init_rpc("w0", rank=0, world_size=1, rpc_backend_options=options)
    assert current_wiring() is None
