"""What a strict job calls, a worker in it that only says that it is strict, and what notices when a pickle is read."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import fastref.rpc as rpc
import fastref.runtime.payloads
from fastref.codec import failures, pickling, registry, script
from fastref.codec.failures import decode_plain_failure
from fastref.codec.plain import encode
from fastref.errors import StrictModeError
from fastref.rpc.functions import async_execution
from fastref.rref import current_wiring
from fastref.runtime.peer import Peer
from fastref.runtime.runtime import Runtime
from fastref.wire import Kind

kept: list[Any] = []


# ---- what may be called


@rpc.register
def echo(value: Any) -> Any:
    return value


@rpc.register
def gather(*args: Any, **kwargs: Any) -> tuple:
    return args, kwargs


@rpc.register(name="a sum")
def add(a: Any, b: Any) -> Any:
    return a + b


@rpc.register
def shapes(tensors: list[torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


@rpc.register
def ones(count: int) -> torch.Tensor:
    return torch.ones(count)


@rpc.register
def total(parts: dict[str, Any]) -> float:
    return float(sum(part.sum() for part in parts.values() if isinstance(part, torch.Tensor)))


@rpc.register
def are_same(one: Any, other: Any) -> bool:
    return one is other


@rpc.register
@async_execution
def add_later(to: str, a: int, b: int) -> torch.futures.Future:
    return rpc.rpc_async(to, add, (a, b)).then(lambda done: done.value() + 1)


@rpc.register
def fetch(rref: rpc.RRef) -> Any:
    return rref.to_here()


@rpc.register
def gather_all(names: list[str], value: Any) -> None:
    rpc.api._all_gather(value, set(names))


@rpc.register
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@rpc.register
def make_object() -> Any:
    return object()


class OwnError(ValueError):
    """Of no class that all workers know."""


@rpc.register
def fail(kind: str, args: list) -> None:
    raise {"OwnError": OwnError, "OSError": OSError, "KeyError": KeyError, "bare": BaseException}[kind](*args)


rpc.register(torch.add)


class Base:
    def inherited(self) -> str:
        return "inherited"

    @rpc.register
    def opened(self) -> str:
        return "opened"


@rpc.register
class Counter(Base):
    limit = 5
    run = os.getcwd

    class Inner:
        pass

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.alias = os.getcwd

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count

    def __len__(self) -> int:
        return self.count

    def _hidden(self) -> None:
        kept.append("hidden")

    @property
    def shown(self) -> Callable:
        kept.append("property")
        return os.getcwd

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    def named(cls) -> str:
        return cls.__name__


def unregistered() -> str:
    kept.append("called")
    return "called"


# ---- noticing


events: list[str] = []


def set_tripwire() -> None:
    """Note from here on in ``events`` whatever reads a pickle in this process, or runs another program."""
    del events[:]
    if getattr(sys, "_fastref_tripwire", False):
        return
    sys._fastref_tripwire = True  # type: ignore[attr-defined]  # a hook stays for ever
    sys.addaudithook(
        lambda event, args: (
            events.append(f"{event} {args!r}")
            if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
            else None
        )
    )
    places: list[tuple[Any, tuple[str, ...]]] = [
        (pickle, ("load", "loads", "Unpickler", "_Unpickler")),
        (pickling, ("loads", "_Unpickler")),
        (fastref.runtime.payloads, ("loads",)),
        (torch, ("load",)),
        (torch.jit, ("load",)),
        (script, ("load_script_module", "find_script_function")),
        (importlib, ("import_module",)),
    ]
    for module, names in places:
        for name in names:
            setattr(module, name, _noting(f"{module.__name__}.{name}", getattr(module, name)))


def _noting(name: str, real: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not (name == "importlib.import_module" and args[0] == "tests.jobs"):  # as the harness does
            events.append(name)
        return real(*args, **kwargs)

    return called


# ---- a worker that is not what it says


class LyingRuntime(Runtime):
    """Says that it is strict, and sends what it likes."""

    def _describe(self, name: str) -> Any:
        return dataclasses.replace(super()._describe(name), strict=True)

    def _build(self, record: Any) -> None:
        super()._build(record)
        self.decode_failure = decode_plain_failure
        failures._load = lambda pickled: None  # what this worker raises it need not be able to read
        self._introduced: dict[Any, int] = {}

    def _intern(self, peer: Peer, call: int, value: Any) -> None:
        module, _, qualname = value.rpartition(".")
        super()._intern(peer, call, (module, qualname))

    def _introduce(self, peer: Peer, func: Any) -> int:
        """Name what is registered, to get in, and anything else by where it is defined, or by value."""
        try:
            name = registry.name_of(func)
        except StrictModeError:
            return int(super()._introduce(peer, func))
        if func not in self._introduced:
            self._introduced[func] = number = 1000 + len(self._introduced)
            payload = encode(name)
            head = HEAD.pack(Kind.INTERN, 0, 0, 0xFFFF, 0, 0, number, len(payload), 0, 0)
            assert peer.channel.send(head + payload)
        return self._introduced[func]


HEAD = struct.Struct("=HHHHQqIIII")  # kind, flags, references, slot, call, deadline, callable, payload, forks, behind


class LyingOptions(rpc.TensorPipeRpcBackendOptions):
    runtime_type = LyingRuntime


class Reduced:
    """Runs a function wherever its pickle is read."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


class ReducedError(Exception):
    """As ``Reduced``, to be raised."""

    def __init__(self, exploit: Any) -> None:
        super().__init__("an exploit")
        self.exploit = exploit

    def __reduce__(self) -> Any:
        return ReducedError, (self.exploit,)


class Bytes:
    """Stands for a pickle that no pickler writes."""

    def __init__(self, data: bytes) -> None:
        self.data = data


_dumps = fastref.runtime.payloads.dumps


@contextmanager
def any_pickles() -> Iterator[None]:
    """Send the bytes of the first ``Bytes`` in place of the pickle of all that it is in."""

    def dumps(value: Any, *more: Any) -> tuple[bytes, list]:
        found = _find(value)
        return _dumps(value, *more) if found is None else (found.data, [])

    fastref.runtime.payloads.dumps = dumps  # type: ignore[attr-defined]
    try:
        yield
    finally:
        fastref.runtime.payloads.dumps = _dumps  # type: ignore[attr-defined]


def _find(value: Any) -> Bytes | None:
    if isinstance(value, Bytes):
        return value
    if isinstance(value, tuple | list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return next((found for part in parts if (found := _find(part)) is not None), None)
    return None


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


EXPLOITS: dict[str, Callable[[str], Any]] = {
    # torch CVE-2024-5480: any function with any arguments; the same hidden in an argument.
    "system": lambda mark: Reduced(os.system, f"touch {mark}"),
    "eval": lambda mark: Reduced(eval, f"open({mark!r}, 'w').close()"),
    "exec": lambda mark: Reduced(exec, f"open({mark!r}, 'w').close()"),
    # torch CVE-2024-48063: a RemoteModule whose __reduce__ is its own; what the real one is unpickled by.
    "remote module": lambda mark: {"module": Reduced(os.system, f"touch {mark}"), "device": "cpu"},
    "remote module's receiver": lambda mark: Bytes(
        b"\x80\x02ctorch.distributed.nn.api.remote_module\n_remote_module_receiver\n(cos\nsystem\n"
        + _text(f"touch {mark}") + b"\x85RtR."
    ),
    "protocol 0": lambda mark: Bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()),
    "stack global": lambda mark: Bytes(
        b"\x80\x04" + _text("posix") + _text("system") + b"\x93" + _text(f"touch {mark}") + b"\x85R."
    ),
    "chain of attributes": lambda mark: Bytes(
        b"\x80\x04" + _text("importlib") + _text("util.sys.modules") + b"\x930" + _text("os") + _text("sys.modules")
        + b"\x930cos\nsystem\n" + _text(f"touch {mark}") + b"\x85R."
    ),
    "build": lambda mark: Bytes(
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\n" + _text("os") + b"\x85R" + _text("system") + b"\x86R"
        + _text(f"touch {mark}") + b"\x85R."
    ),
    "extension registry": lambda mark: Bytes(b"\x80\x02\x82\x01" + _text(f"touch {mark}") + b"\x85R."),
    "import": lambda mark: Bytes(b"\x80\x02ctests.rarely_imported\nwhere\n."),
    "numpy array": lambda mark: np.array([np.float64(1), Reduced(os.system, f"touch {mark}")], dtype=object),
    "torch storage": lambda mark: Bytes(
        b"\x80\x04ctorch.storage\n_load_from_bytes\nB"
        + struct.pack("<I", len(saved := _torch_saved(Reduced(os.system, f"touch {mark}")))) + saved + b"\x85R."
    ),
    "script module": lambda mark: torch.jit.script(torch.nn.Linear(1, 1)),
    "lambda": lambda mark: lambda: os.system(f"touch {mark}"),
    "nonsense": lambda mark: Bytes(b"\x80\x05garbage"),
}  # fmt: skip

# What no deserialization has to do with: any function with any arguments.
FUNCTIONS: dict[str, Callable[[str], tuple]] = {
    "os.system": lambda mark: (os.system, (f"touch {mark}",)),
    "eval": lambda mark: (eval, (f"open({mark!r}, 'w').close()",)),
    "exec": lambda mark: (exec, (f"open({mark!r}, 'w').close()",)),
    "open": lambda mark: (open, (mark, "w")),
    "a class": lambda mark: (io.FileIO, (mark, "w")),
    "an import": lambda mark: (importlib.import_module, ("tests.rarely_imported",)),
    "an unregistered function": lambda mark: (unregistered, ()),
    "a method of a registered class": lambda mark: (Counter._hidden, (None,)),
    "a function of no name": lambda mark: (lambda: os.system(f"touch {mark}"), ()),
}


def _sync(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.rpc_sync(to, echo, (exploit, ballast))


def _async(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.rpc_async(to, echo, ([exploit, ballast],)).wait()


def _remote(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.rpc_sync(to, fetch, (rpc.remote(to, echo, (exploit,), {"more": ballast}),))


def _method(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.remote(to, Counter).rpc_sync().add((exploit, ballast))


def _fetched(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.rpc_sync(to, fetch, (rpc.RRef([exploit, ballast]),))


def _published(to: str, exploit: Any, ballast: bytes) -> Any:
    rref = rpc.RRef([exploit, ballast])
    rref.publish()
    return rpc.rpc_sync(to, fetch, (rref,))


def _gathered(to: str, exploit: Any, ballast: bytes) -> Any:
    return rpc.rpc_sync(to, rpc.api._gather_to_leader, ("an exploit", "w2", [exploit, ballast], {"w2"}))


ATTACKS: dict[str, Callable[[str, Any, bytes], Any]] = {
    "sync": _sync, "async": _async, "remote": _remote, "method": _method, "fetched": _fetched,
    "published": _published, "gathered": _gathered,
}  # fmt: skip


@rpc.register
def attack(to: str, how: str, exploit: str, mark: str, ballast: int) -> tuple[str, str]:
    """On the lying worker: attack another; the class and the text of what came back."""
    with any_pickles():
        return _outcome(lambda: ATTACKS[how](to, EXPLOITS[exploit](mark), bytes(ballast)))


@rpc.register
def attack_by_name(to: str, how: str, function: str, mark: str) -> tuple[str, str]:
    """On the lying worker: have another call a function."""
    func, args = FUNCTIONS[function](mark)
    if how == "remote":
        return _outcome(lambda: rpc.rpc_sync(to, fetch, (rpc.remote(to, func, args),)))
    return _outcome(lambda: rpc.rpc_sync(to, func, args) if how == "sync" else rpc.rpc_async(to, func, args).wait())


@rpc.register
def send_record(to: int, record: bytes, is_call: bool) -> None:
    """On the lying worker: send what no sender of fastref's would."""
    assert current_wiring().peers[to].channel.send(record)
    current_wiring().calls_sent += is_call  # when all are to leave it is asked how many there were


def _outcome(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        return "returned", repr(action())
    except BaseException as error:
        return type(error).__name__, str(error)


@rpc.register
def answer_exploit(exploit: str, mark: str, raised: bool) -> Any:
    """On the lying worker: answer a call, or raise."""
    value = EXPLOITS[exploit](mark)
    if raised:
        raise ReducedError(value)
    return value
