"""Functions and classes that tests call on other workers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import fastref.rpc as rpc
from fastref.errors import CallTimeout
from fastref.rref import current_wiring

kept: list[Any] = []
_bound: dict[str, Any] = {}


def nothing() -> None:
    """Return at once."""


def echo(value: Any) -> Any:
    return value


def add(a: Any, b: Any) -> Any:
    return a + b


def gather(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def who_am_i() -> str:
    return rpc.get_worker_info().name


def pid() -> int:
    return os.getpid()


def thread() -> int:
    return threading.get_ident()


def has_imported(module: str) -> bool:
    return module in sys.modules


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def keep(*values: Any) -> int:
    """Hold values until ``drop``."""
    kept.extend(values)
    return len(kept)


def drop() -> int:
    """Let go of what ``keep`` holds, and say how many values that was."""
    count = len(kept)
    kept.clear()
    return count


def get_kept(index: int = -1) -> Any:
    return kept[index]


def use_kept(method: str, *args: Any) -> Any:
    """Call a method of the last value kept, a reference, where its value lives."""
    return getattr(kept[-1].rpc_sync(), method)(*args)


def wait_until_kept(count: int) -> list[Any]:
    """Wait until so many values are held, and return them."""
    while len(kept) < count:
        time.sleep(0.001)
    return list(kept)


def append_all(values: list[Any], more: list[Any]) -> list[Any]:
    """Change an argument, and return it."""
    values.extend(more)
    return values


def rebind(name: str, to: str) -> None:
    """Let a name of this module mean, in this process, what another means; ``unbind`` undoes it."""
    _bound.setdefault(name, globals()[name])
    globals()[name] = globals()[to]


def unbind() -> None:
    globals().update(_bound)
    _bound.clear()


def depth(left: int, targets: list[str]) -> int:
    """Call oneself on the next worker, ``left`` times."""
    if left == 0:
        return 0
    return 1 + rpc.rpc_sync(targets[left % len(targets)], depth, args=(left - 1, targets))


def keep_error_of_slow_call(to: str, seconds: float, is_async: bool) -> None:
    """Make a slow call with the default timeout, and keep what becomes of it."""
    try:
        keep(rpc.rpc_async(to, sleep, (seconds,)).wait() if is_async else rpc.rpc_sync(to, sleep, (seconds,)))
    except CallTimeout as error:
        keep(str(error))


def call_many(to: str, count: int, size: int) -> int:
    """Have ``count`` calls under way at once, and count the right answers."""
    futures = [rpc.rpc_async(to, add, args=(bytes(size), number.to_bytes(4, "big"))) for number in range(count)]
    return sum(future.wait() == bytes(size) + number.to_bytes(4, "big") for number, future in enumerate(futures))


class Counter:
    """Something with a state, to be referred to."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def get(self) -> int:
        return self.value

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def owner(self) -> str:
        return who_am_i()

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def sleep(self, seconds: float) -> float:
        return sleep(seconds)

    def add_value_of(self, rref: rpc.RRef) -> int:
        return self.add(rref.rpc_sync().get())

    def reference(self) -> rpc.RRef:
        return rpc.RRef(self)

    @classmethod
    def of_class(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value

    @staticmethod
    def static(value: int) -> int:
        return value

    def __call__(self, value: int) -> int:
        return self.value + value


class SlowToMake(Counter):
    """A value that takes a while to come into being."""

    def __init__(self, seconds: float, value: int = 0) -> None:
        time.sleep(seconds)
        super().__init__(value)


class Traced:
    """Counts how many of its kind are alive in this process."""

    alive = 0
    _lock = threading.Lock()

    def __init__(self, *held: Any) -> None:
        self.held = list(held)
        with Traced._lock:
            Traced.alive += 1

    def __del__(self) -> None:
        with Traced._lock:
            Traced.alive -= 1

    def hold(self, *values: Any) -> None:
        self.held.extend(values)

    def count(self) -> int:
        return len(self.held)

    def itself(self) -> Traced:
        return self


def traced_alive() -> int:
    return Traced.alive


def wait_until_traced(count: int, patience_s: float = 10.0) -> int:
    """Wait until so many ``Traced`` are left here, and return how many there are."""
    deadline = time.monotonic() + patience_s
    while Traced.alive != count and time.monotonic() < deadline:
        time.sleep(0.002)
    return Traced.alive


class Box:
    """Something that pickle takes apart by its attributes."""

    def __init__(self, content: Any) -> None:
        self.content = content


def look(rref: rpc.RRef) -> tuple[bool, str, Any]:
    """Say what a reference is here: owned or not, whose, and its value."""
    return rref.is_owner(), rref.owner_name(), rref.to_here()


def is_the_object(rref: rpc.RRef) -> bool:
    """Say whether a reference leads to the very object that was kept here."""
    return rref.is_owner() and rref.local_value() is kept[-1] and rref.to_here() is kept[-1]


def make_and_keep(value: Any) -> rpc.RRef:
    """Keep a value here, and return a reference to it."""
    kept.append(value)
    return rpc.RRef(value)


def make_traced(*held: Any) -> rpc.RRef:
    """Return a reference to a new value that nobody else holds."""
    return rpc.RRef(Traced(*held))


def make_on(to: str, function: Callable[..., Any], *args: Any) -> rpc.RRef:
    """Return a reference to what a function makes on another worker."""
    return rpc.remote(to, function, args=args)


def pass_on(rref: rpc.RRef, route: list[str]) -> Any:
    """Send a reference along a route; the last one on it fetches the value."""
    if not route:
        return rref.to_here()
    return rpc.rpc_sync(route[0], pass_on, args=(rref, route[1:]))


def pass_and_return(rref: rpc.RRef, route: list[str]) -> rpc.RRef:
    """Send a reference along a route and back."""
    if not route:
        return rref
    return rpc.rpc_sync(route[0], pass_and_return, args=(rref, route[1:]))


def total(values: list[rpc.RRef]) -> int:
    return sum(rref.to_here() for rref in values)


def fetch_kept() -> Any:
    return kept[-1].to_here()


def keep_in_cycle(rref: rpc.RRef) -> None:
    """Hold a reference where only the cycle collector finds it."""
    cycle: list[Any] = [rref]
    cycle.append(cycle)


def raise_with(value: Any) -> None:
    raise ValueError("holds", value)


def figures(*path: str) -> Any:
    """Return a part of this worker's snapshot."""
    found: Any = current_wiring().snapshot()
    for key in path:
        found = found[key]
    return found


def value_of(rref: rpc.RRef) -> Any:
    return rref.local_value()


def entry_of(rref: rpc.RRef) -> tuple[int, int]:
    """Find the only entry, index and generation, that this process holds on the owner of a reference."""
    holder = current_wiring().peers[rref.owner().id].holder
    (index,) = [index for index in range(4096) if holder.count(index)]
    return index, holder.generation(index)


class Name(str):
    """A string that is not quite a string."""


def sleep_and_echo(seconds: float, value: Any) -> Any:
    time.sleep(seconds)
    return value


def same_memory(a: Any, b: Any) -> bool:
    return a.data_ptr() == b.data_ptr()


def checksum(tensor: Any) -> int:
    return int(tensor.sum())


def checksum_kept() -> int:
    return checksum(kept[-1])


def keep_and_fill(array: Any, value: Any) -> None:
    """Keep an array, and change all of its elements."""
    array[...] = value
    keep(array)
