"""An autograd context: what one worker keeps of a distributed graph, and the gradients of its leaf tensors."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from fastref.autograd.torch_names import hooks_of, is_held_once

if TYPE_CHECKING:
    from fastref.autograd.share import Share

__all__ = ["DistAutogradContext"]


class DistAutogradContext:
    """One context on one worker.

    Parameters
    ----------
    context_id : int

    Source
    ------
    ``torch.distributed.autograd.DistAutogradContext``.
    """

    def __init__(self, context_id: int) -> None:
        self._id = context_id
        self.is_released = False
        # Each is changed by single operations, which the interpreter lock makes atomic.
        self.sends: dict[int, Any] = {}
        self.receives: dict[int, Any] = {}
        self.workers: set[int] = set()
        self.shares: dict[tuple[int, int], Share] = {}
        self.ended: set[tuple[int, int]] = set()  # passes that were given up: what comes late of them is refused
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        self._adding = threading.RLock()  # two passes may add to one gradient, in place

    def _context_id(self) -> int:
        """Return the number that names this context in the whole job."""
        return self._id

    def _send_functions(self) -> dict[int, Any]:
        """Return the send nodes, by number."""
        return dict(self.sends)

    def _recv_functions(self) -> dict[int, Any]:
        """Return the receive nodes, by the numbers of the send nodes that they belong to."""
        return dict(self.receives)

    def _known_worker_ids(self) -> set[int]:
        """Return the ranks of the workers that this one has sent the context to."""
        return set(self.workers)

    def accumulate(self, node: Any, found: list[torch.Tensor | None]) -> None:
        """Add the gradient that has come to a leaf tensor's ``AccumulateGrad``; hooks of that node are run.

        ``found``: a list of the one gradient, taken out of it, so that nobody else but autograd may hold it.
        """
        before, behind = hooks_of(node)
        if before:
            found[0] = _before(before, found[0])
        gradient = found[0]
        if gradient is not None:
            del gradient
            self._add(node.variable, found)
        for hook in list(behind.values()):
            hook((), (found[0],))

    def _add(self, leaf: torch.Tensor, found: list[Any]) -> None:
        with self._adding:
            known = self.gradients.get(leaf)
            if known is None:
                self.gradients[leaf] = _own(leaf, found)
            elif known.layout is not torch.strided and found[0].layout is torch.strided:
                self.gradients[leaf] = found[0] + known
            else:
                known += found[0]


def _before(hooks: Any, gradient: torch.Tensor | None) -> torch.Tensor | None:
    for hook in list(hooks.values()):
        changed = hook((gradient,))
        if changed is not None:
            gradient = changed[0] if isinstance(changed, tuple) else changed
    return None if gradient is None else gradient.detach()


def _own(leaf: torch.Tensor, found: list[Any]) -> torch.Tensor:
    """Return the one gradient in a list itself if no other tensor or variable is it and it lies as its leaf does.

    Source: ``AccumulateGrad`` of torch. As there, who holds a view of it may see later sums.
    """
    wanted = None  # where a copy goes, if it is to lie otherwise
    if found[0].layout is not torch.strided:
        fits = found[0].layout is torch.sparse_coo and found[0]._values().is_contiguous()
    elif leaf.layout is not torch.strided or leaf.is_contiguous():
        fits = found[0].is_contiguous()
        wanted = None if fits else torch.empty(found[0].shape, dtype=found[0].dtype, device=found[0].device)
    else:
        wanted = torch.empty_like(leaf, dtype=found[0].dtype, requires_grad=False)
        fits = found[0].stride() == wanted.stride()
    if fits and is_held_once(found):
        own: torch.Tensor = found[0].detach()
        return own
    copy: torch.Tensor = found[0].clone() if wanted is None else wanted.copy_(found[0])
    return copy
