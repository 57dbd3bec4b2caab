"""What workers do in tests of distributed autograd."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import torch

import fastref
import fastref.autograd as autograd
import fastref.rpc as rpc
from fastref.rref import current_wiring

_kept: dict[str, Any] = {}


def parameter(label: str, values: list[float]) -> None:
    """Keep a leaf tensor."""
    _kept[label] = torch.tensor(values, dtype=torch.float64, requires_grad=True)


def kept(label: str) -> torch.Tensor:
    return _kept[label]


def times_kept(label: str, value: torch.Tensor) -> torch.Tensor:
    return _kept[label] * value


def gradient(context_id: int, label: str) -> torch.Tensor | None:
    """Return the gradient of what is kept, without the graph that it lies in."""
    found = autograd.get_gradients(context_id).get(_kept[label])
    return None if found is None else found.clone()


def forget() -> None:
    _kept.clear()


def counts() -> dict[str, int]:
    return autograd._get_debug_info()


def wait_until_none(patience_s: float = 20.0) -> None:
    """Wait until this worker keeps no context and has no pass under way."""
    deadline = time.monotonic() + patience_s
    while any(counts().values()):
        assert time.monotonic() < deadline, counts()
        time.sleep(0.002)


def wait_everywhere(*names: str) -> None:
    """As ``wait_until_none``, on this worker and on others."""
    wait_until_none()
    for name in names:
        rpc.rpc_sync(name, wait_until_none)


def add(a: Any, b: Any) -> Any:
    return a + b


def mul(a: Any, b: Any) -> Any:
    return a * b


def echo(value: Any) -> Any:
    return value


def parts(value: Any) -> Any:
    """Return tensors of an argument in another arrangement."""
    return {"sum": value["a"][0] + value["b"], "both": [value["a"][0], (value["b"] * 2,)]}


def through(to: str, function: Any, *arguments: Any) -> Any:
    """Call another worker."""
    return rpc.rpc_sync(to, function, arguments)


def through_futures(names: list[str], value: torch.Tensor) -> torch.Tensor:
    """Call several at once and add what they return."""
    futures = [rpc.rpc_async(name, mul, (value, number + 1)) for number, name in enumerate(names)]
    return sum(future.wait() for future in futures)


@rpc.functions.async_execution
def later(to: str, a: torch.Tensor, b: torch.Tensor) -> Any:
    """Answer when another worker has, and go on from the thread on which that answer comes."""
    return rpc.rpc_async(to, mul, (a, b)).then(lambda done: done.wait() + a)


@rpc.functions.async_execution
def later_twice(first: str, second: str, value: torch.Tensor) -> Any:
    """Call a second worker from the callback of the first call."""
    answer: torch.futures.Future = torch.futures.Future()

    def go_on(done: Any) -> None:
        rpc.rpc_async(second, mul, (done.wait(), value)).then(lambda last: answer.set_result(last.wait()))

    rpc.rpc_async(first, mul, (value, 3)).then(go_on)
    return answer


def of_reference(rref: rpc.RRef, value: torch.Tensor) -> torch.Tensor:
    return rref.to_here() * value


def context_of_thread() -> int:
    return autograd._current_context()._context_id()


def has_context() -> bool:
    try:
        autograd._current_context()
    except RuntimeError:
        return False
    return True


def links(context_id: int) -> tuple[int, int]:
    """How many send and receive nodes a context has here."""
    context = autograd._retrieve_context(context_id)
    return len(context._send_functions()), len(context._recv_functions())


def own_sum(names: list[str], label: str) -> tuple[list[Any], Any]:
    """Run a pass of this worker's own through others; return the gradients of what it and they keep."""
    with autograd.context() as context_id:
        value = _kept[label]
        for name in names:
            value = rpc.rpc_sync(name, times_kept, (label, value))
        autograd.backward(context_id, [value.sum()])
        theirs = [rpc.rpc_sync(name, gradient, (context_id, label)) for name in names]
        return theirs, gradient(context_id, label)


class Layer:
    """A value with a parameter, and methods that are called through references."""

    def __init__(self, values: list[float]) -> None:
        self.weight = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return (self.weight * value).tanh()

    def gradient(self, context_id: int) -> torch.Tensor:
        return autograd.get_gradients(context_id)[self.weight].clone()


class Broken(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise ValueError("a broken gradient")


def broken(value: torch.Tensor) -> torch.Tensor:
    return Broken.apply(value)


class Marker:
    """Dies with the graph that it is part of."""


_markers: list[weakref.ref[Marker]] = []


class Marked(torch.autograd.Function):
    """A node that holds a marker."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.marker = Marker()
        ctx.save_for_backward(value)
        _markers.append(weakref.ref(ctx.marker))
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * 2


def marked(value: torch.Tensor) -> torch.Tensor:
    return Marked.apply(value)


def wait_until_graphs_are_gone(patience_s: float = 20.0) -> int:
    """Wait until no marker lives; return how many there were."""
    deadline = time.monotonic() + patience_s
    while any(marker() is not None for marker in _markers):
        assert time.monotonic() < deadline, sum(marker() is not None for marker in _markers)
        time.sleep(0.002)
    count = len(_markers)
    _markers.clear()
    return count


reached = threading.Event()
go_on = threading.Event()


class Held(torch.autograd.Function):
    """Waits in its backward until it is told to go on."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        reached.set()
        assert go_on.wait(60)
        return gradient


def held(value: torch.Tensor) -> torch.Tensor:
    reached.clear()
    go_on.clear()
    return Held.apply(value)


def wait_until_reached() -> None:
    assert reached.wait(60)


def let_go_on() -> None:
    go_on.set()


def fetched_directly() -> int:
    count: int = current_wiring().fetched_directly
    return count


@fastref.register
def squared_at(to: str, value: torch.Tensor) -> torch.Tensor:
    return value * rpc.rpc_sync(to, doubled, (value,))


@fastref.register
def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2
