"""A training step over two workers: the lower layer of a perceptron on one, the upper one and the loss on the other."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastref.bench.caller import CALLEE, Caller
from fastref.bench.timing import Effort, Summary, sample_each
from fastref.errors import FastrefError

__all__ = ["TrainingCaller"]

RATE = 1e-3
SMALL, LARGE = (8, 16), (1024, 4096)  # rows and columns of the activations
_layer: list[torch.Tensor] = []


def make(columns: int, threads: int) -> int:
    """Keep the lower layer here: one weight for each column, so that large activations are cheap to compute.

    Returns
    -------
    int
        With how many threads torch computed before.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _layer[:] = [torch.ones(columns, requires_grad=True)] if columns else []
    return before


def forward(x: torch.Tensor) -> torch.Tensor:
    """Run the lower layer."""
    return torch.relu(x * _layer[0])


def descend(autograd: str, context_id: int) -> None:
    """Step the lower layer by its gradient in a context."""
    found = importlib.import_module(autograd).get_gradients(context_id)
    with torch.no_grad():
        _layer[0] -= RATE * found[_layer[0]]


def weights() -> torch.Tensor:
    """Return the lower layer as it is now."""
    return _layer[0].detach()


class TrainingCaller(Caller):
    """What two workers cost a step of forward pass, backward pass and descent of both layers.

    The same step in one process is subtracted. torch computes with one thread on each.
    """

    def step_small(self, effort: Effort) -> Summary:
        """Microseconds for a step with activations of 512 bytes, beyond those of the same step in one process."""
        return self._step(*SMALL, effort)

    def step_16m(self, effort: Effort) -> Summary:
        """Microseconds for the same with activations of 16 MiB."""
        return self._step(*LARGE, effort)

    def _step(self, rows: int, columns: int, effort: Effort) -> Summary:
        autograd = importlib.import_module(self._rpc.__name__.replace(".rpc", ".autograd"))
        threads = self._rpc.rpc_sync(CALLEE, make, (columns, 1)), make(columns, 1)
        x = torch.rand(rows, columns)
        try:
            upper, alone_upper = (torch.ones(columns, requires_grad=True) for _ in range(2))
            apart = partial(_step_apart, self._rpc, autograd, x, upper)
            alone = partial(_step_alone, x, alone_upper)
            summary = sample_each(lambda: _time_us(apart) - _time_us(alone), effort)
            lower = self._rpc.rpc_sync(CALLEE, weights)
            if not torch.equal(alone_upper, upper) or not torch.equal(_layer[0], lower):
                raise FastrefError("two workers have learned something else than one")
        finally:
            self._rpc.rpc_sync(CALLEE, make, (0, threads[0]))
            make(0, threads[1])
        return summary


def _time_us(step: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - began) / 1e3


def _step_apart(rpc: Any, autograd: Any, x: torch.Tensor, upper: torch.Tensor) -> None:
    with autograd.context() as context_id:
        loss = (rpc.rpc_sync(CALLEE, forward, (x,)) * upper).sum()
        autograd.backward(context_id, [loss])
        done = rpc.rpc_async(CALLEE, descend, (autograd.__name__, context_id))
        with torch.no_grad():
            upper -= RATE * autograd.get_gradients(context_id)[upper]
        done.wait()


def _step_alone(x: torch.Tensor, upper: torch.Tensor) -> None:
    (forward(x) * upper).sum().backward()
    for layer in (upper, _layer[0]):
        if layer.grad is None:
            raise FastrefError("a layer got no gradient")
        with torch.no_grad():
            layer -= RATE * layer.grad
        layer.grad = None
