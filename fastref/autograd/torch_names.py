"""The names of torch that distributed autograd needs and that torch does not promise, all in one place."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = [
    "PRIVATE",
    "AccumulateGrad",
    "applier",
    "backward_class",
    "has_tensor_hooks",
    "hooks_of",
    "is_held_once",
    "is_profiled",
    "renew_engine",
    "run_engine",
    "run_node",
]

PRIVATE = (
    "torch.autograd.Variable._execution_engine.is_checkpoint_valid",
    "torch.autograd.Variable._execution_engine.run_backward",
    "torch.autograd.Function._backward_cls",
    "torch._C._FunctionBase.apply",
    "torch.autograd._profiler_enabled",
    "torch.Tensor._backward_hooks",
    "torch.Tensor._use_count",
)
"""What a test looks for, beside nodes with ``metadata``, ``_input_metadata`` and hooks in dicts that handles know."""

_autograd: Any = torch.autograd  # whose stubs say nothing of what it takes from C++
_base: Any = torch._C._FunctionBase
_engine = _autograd.Variable._execution_engine

AccumulateGrad: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)
"""The class of the nodes at which the graph of a worker ends in its leaf tensors."""

_HOOKS = "fastref.autograd.hooks"


def renew_engine() -> None:
    """Have torch make its engine anew now if this process was forked since it was made.

    It does so on first use otherwise, where two threads may be at it at once: passes begin without the interpreter
    lock, which torch takes for held there. What is asked here is asked under it.
    """
    _engine.is_checkpoint_valid()


def run_engine(roots: list[GradientEdge], gradients: list[Any], keep: bool, wanted: list[GradientEdge]) -> list[Any]:
    """Run the nodes between ``roots`` and ``wanted``; return the sums of what arrives at each of ``wanted``, or None.

    Nodes that lead to none of ``wanted`` are not run. Hooks of tensors whose gradients are wanted are.
    """
    found = _engine.run_backward(tuple(roots), tuple(gradients), keep, False, tuple(wanted), True, False)
    return list(found)


class _Enough(Exception):
    """A node has run, and what it leads to shall not."""


def run_node(node: Any, edges: list[GradientEdge], gradients: list[Any], keep: bool) -> tuple[Any, ...]:
    """Run one node, hooks and all; return what it gives to each of its ``next_functions``, or None.

    What it has saved is not freed, whatever ``keep`` says: the engine does that behind its hooks, and is stopped there.
    """
    found: list[tuple[Any, ...]] = []
    thread = threading.get_ident()
    is_here = all(about.device.type == "cpu" for about in node._input_metadata)  # where it runs is this thread

    def stop(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if not is_here or threading.get_ident() == thread:  # else another pass runs it
            found.append(inputs)
            raise _Enough

    handle = node.register_hook(stop)
    try:
        _engine.run_backward(tuple(edges), tuple(gradients), keep, False, (), True, True)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def backward_class(function: type[torch.autograd.Function]) -> Any:
    """Return the class of the nodes that a ``torch.autograd.Function`` makes."""
    kind: Any = function
    return kind._backward_cls


def applier(function: type[torch.autograd.Function]) -> Any:
    """Return ``function.apply`` as it is without the transforms of ``torch.func``, a few microseconds shorter."""
    return _base.__dict__["apply"].__get__(None, function)


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


def has_tensor_hooks(node: Any) -> bool:
    """Tell whether hooks of a leaf tensor run before its ``AccumulateGrad`` does."""
    return bool(node.variable._backward_hooks)


def is_held_once(found: list[Any]) -> bool:
    """Tell whether the tensor in a list is held by that list and by nothing else, in Python or below."""
    return sys.getrefcount(found[0]) == 2 and found[0]._use_count() == 1


def is_profiled() -> bool:
    """Tell whether a profiler of torch is on in the calling thread."""
    enabled: bool = _autograd._profiler_enabled()
    return enabled


def _nothing(*_: Any) -> None:
    return None
