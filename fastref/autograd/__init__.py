"""``torch.distributed.autograd``'s names: backward passes through calls, over all workers that took part."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from fastref.autograd.contexts import Contexts, current_contexts
from fastref.autograd.passes import backward
from fastref.autograd.record import DistAutogradContext
from fastref.autograd.references import backward_of
from fastref.autograd.torch_names import renew_engine
from fastref.errors import UsageError
from fastref.runtime.post import thread_context

__all__ = ["DistAutogradContext", "attach", "backward", "context", "get_gradients", "is_available"]


class context:
    """Have calls made inside belong together, so that ``backward`` goes through them: ``with context() as number:``.

    It is of the thread that enters it; functions that are called from inside it run in it, wherever they run, and what
    they call too. At the end all workers let go of it, without being waited for.

    Raises
    ------
    UsageError
        The thread is in a context already.

    Source
    ------
    ``torch.distributed.autograd.context``.
    """

    def __enter__(self) -> int:
        self.autograd_context = _new_context()
        return self.autograd_context._context_id()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _contexts().release(self.autograd_context._context_id())


def attach(runtime: Any) -> None:
    """Have a runtime keep autograd contexts."""
    renew_engine()
    runtime.autograd = Contexts(runtime)
    runtime.autograd.backward_of = backward_of


def is_available() -> bool:
    """Return True: distributed autograd is here."""
    return True


_contexts = current_contexts


def get_gradients(context_id: int) -> dict[torch.Tensor, torch.Tensor]:
    """Return the gradients of this worker's leaf tensors that passes in a context have accumulated.

    Raises
    ------
    UsageError
        There is no such context here.

    Source
    ------
    ``torch.distributed.autograd.get_gradients``.
    """
    return dict(_contexts().retrieve(context_id).gradients)


def _new_context() -> DistAutogradContext:
    return _contexts().new()


def _release_context(context_id: int) -> None:
    _contexts().retrieve(context_id)
    _contexts().release(context_id)


def _retrieve_context(context_id: int) -> DistAutogradContext:
    return _contexts().retrieve(context_id)


def _is_valid_context(context_id: int) -> None:
    """Raise when there is no such context here."""
    _contexts().retrieve(context_id)


def _current_context() -> DistAutogradContext:
    """Return the context that the calling thread is in."""
    if not thread_context():
        raise UsageError("Trying to retrieve autograd context, but there's no autograd context for this thread.")
    return _contexts().retrieve(thread_context())


def _get_max_id() -> int:
    """Return the largest number that a context of this worker can have."""
    largest: int = _contexts().largest
    return largest


def _get_debug_info() -> dict[str, int]:
    """Return torch's counters: passes under way on this worker, and contexts that it keeps."""
    return _contexts().counts()


def _init(worker_id: int) -> None:
    """Do nothing: ``init_rpc`` does what torch's programs mean by it."""
