"""Passes that begin at the value of a reference, where it lives."""

from __future__ import annotations

import torch

from fastref.autograd.contexts import current_contexts
from fastref.autograd.passes import backward
from fastref.codec.registry import register
from fastref.errors import UsageError
from fastref.rref import RRef

__all__ = ["backward_of"]


def backward_of(rref: RRef, context_id: int, retain_graph: bool) -> None:
    """As ``RRef.backward``."""
    if not rref.is_owner():
        if context_id == -1:
            raise UsageError("User RRefs require 'dist_autograd_ctx_id' to be specified")
        arguments = (rref, context_id, bool(retain_graph))
        current_contexts().call(rref.owner().id, _backward_at_owner, arguments).wait()
        return
    value = rref.local_value()
    if not isinstance(value, torch.Tensor):
        raise UsageError("RRef should contain a tensor for .backward()")
    if context_id == -1:
        torch.autograd.backward(value, retain_graph=retain_graph)
    else:
        backward(context_id, [value], retain_graph)


@register
def _backward_at_owner(rref: RRef, context_id: int, retain_graph: bool) -> None:
    backward_of(rref, context_id, retain_graph)
