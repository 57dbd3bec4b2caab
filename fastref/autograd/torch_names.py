"""The names of torch that distributed autograd needs and that torch does not promise, all in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["AccumulateGrad", "PRIVATE", "backward_class", "hooks_of", "run_engine"]

PRIVATE = (
    "torch.autograd.Variable._execution_engine.run_backward",
    "torch.autograd.Function._backward_cls",
    "torch.utils.hooks.RemovableHandle.hooks_dict_ref",
)
"""What a test looks for, beside a leaf's ``AccumulateGrad`` with its ``variable``, ``metadata`` and hooks."""

_engine: Any = torch.autograd.Variable._execution_engine

AccumulateGrad: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
"""The class of the nodes at which the graph of a worker ends in its leaf tensors."""

_HOOKS = "fastref.autograd.hooks"


def run_engine(roots: list[GradientEdge], gradients: list[Any], keep: bool, wanted: list[GradientEdge]) -> list[Any]:
    """Run the nodes between ``roots`` and ``wanted``; return the sums of what arrives at each of ``wanted``, or None.

    Nodes that lead to none of ``wanted`` are not run. Hooks of tensors whose gradients are wanted are.
    """
    found = _engine.run_backward(tuple(roots), tuple(gradients), keep, False, tuple(wanted), True, False)
    return list(found)


def backward_class(function: type[torch.autograd.Function]) -> Any:
    """Return the class of the nodes that a ``torch.autograd.Function`` makes."""
    kind: Any = function
    return kind._backward_cls


def hooks_of(node: Any) -> tuple[Any, Any]:
    """Return the dicts of hooks that a program has put before and behind a node; both stay the node's own."""
    known = node.metadata.get(_HOOKS)
    if known is None:
        before, behind = node.register_prehook(_nothing), node.register_hook(_nothing)
        known = node.metadata[_HOOKS] = (before.hooks_dict_ref(), behind.hooks_dict_ref())
        before.remove()
        behind.remove()
    found: tuple[Any, Any] = known
    return found


def _nothing(*_: Any) -> None:
    return None
