"""Optimizers, and functions about parameters, that tests have on other workers."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

import fastref.rpc as rpc

_meeting = threading.Event()
_inside = threading.Lock()


class Point(nn.Module):
    """Two parameters, of which the second may be left out of what comes out."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.other = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return x * self.weight.sin() + (self.other.cos() if both else 0.0)


class Refusing(torch.optim.SGD):
    """One that cannot be made of a parameter of three values, nor stepped with one of two."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        if any(p.numel() == 3 for group in self.param_groups for p in group["params"]):
            raise LookupError("three values are too many")

    def step(self, closure: Any = None) -> None:
        if any(p.numel() == 2 for group in self.param_groups for p in group["params"]):
            raise ArithmeticError("two values are too many")
        super().step()


class Meeting(torch.optim.SGD):
    """One whose step ends when another worker's has begun."""

    def __init__(self, params: Any, others: dict[str, str]) -> None:
        super().__init__(params, 0.1)
        self._other = others[rpc.get_worker_info().name]
        _meeting.clear()

    def step(self, closure: Any = None) -> None:
        rpc.rpc_sync(self._other, meet)
        assert _meeting.wait(30.0), "the other optimizer has not begun its step"
        super().step()


class Alone(torch.optim.SGD):
    """One that raises when another thread of its worker is stepping."""

    def step(self, closure: Any = None) -> None:
        assert _inside.acquire(blocking=False), "two steps at once"
        try:
            (parameter,) = self.param_groups[0]["params"]
            before = parameter.detach().clone()
            torch.mm(torch.ones(60, 60), torch.ones(60, 60))
            super().step()
            assert torch.equal(parameter, before - parameter.grad)
        finally:
            _inside.release()


def meet() -> None:
    _meeting.set()


def by_value(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """Return an optimizer that has made groups of its own, in an order of its own."""
    found = list(params)
    return torch.optim.SGD([{"params": [p]} for p in reversed(found)], momentum=0.9, **kwargs)


def set_grad(rref: rpc.RRef, value: Tensor | None) -> None:
    rref.local_value().grad = value


def grad_of(rref: rpc.RRef) -> Tensor | None:
    return rref.local_value().grad


def value_of(rref: rpc.RRef) -> Tensor:
    return rref.local_value().detach().clone()
