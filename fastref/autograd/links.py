"""What joins the graphs of two workers: a send node where tensors left, a receive node where they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastref.autograd.torch_names import applier, backward_class
from fastref.errors import UsageError

__all__ = ["Received", "receive_node", "send_node"]


def _refuse(node: Any, *gradients: Any) -> Any:
    raise UsageError(
        "a tensor that came from another worker is in this graph: run the pass by"
        " fastref.autograd.backward(context_id, roots), inside the context in which it came"
    )


def _send(node: Any, *tensors: Any) -> torch.Tensor:
    return torch.empty(0)


def _receive(node: Any, anchor: Any, *tensors: Any) -> Any:
    node.mark_dirty(*tensors)  # the very tensors of the message, wherever they are in it
    return tensors


def _function(name: str, forward: Any) -> Any:
    """Make a function of autograd whose nodes have the names that torch's have."""
    namespace = {"forward": staticmethod(forward), "backward": staticmethod(_refuse), "__module__": __name__}
    return type(f"torch::distributed::autograd::{name}", (torch.autograd.Function,), namespace)


_Receive = _function("RecvRpc", _receive)
_apply_send, _apply_receive = applier(_function("SendRpc", _send)), applier(_Receive)

Received = backward_class(_Receive)
"""The class of receive nodes. A node has ``context_id``, ``rank``, ``link`` and ``count``, how many tensors came."""

_anchor = torch.zeros((), requires_grad=True)  # without an input that wants gradients there would be no node


def send_node(tensors: Sequence[torch.Tensor]) -> Any:
    """Return a node whose ``next_functions`` are where the gradients of ``tensors`` go on, in this order."""
    if torch.is_grad_enabled():
        return _apply_send(*tensors).grad_fn
    with torch.enable_grad():
        return _apply_send(*tensors).grad_fn


def receive_node(context_id: int, rank: int, link: int, tensors: Sequence[torch.Tensor]) -> Any:
    """Make tensors that came from a worker outputs of one node, in place, and return it."""
    if torch.is_grad_enabled():
        _apply_receive(_anchor, *tensors)
    else:
        with torch.enable_grad():
            _apply_receive(_anchor, *tensors)
    node: Any = tensors[0].grad_fn
    node.context_id, node.rank, node.link, node.count = context_id, rank, link, len(tensors)
    return node
