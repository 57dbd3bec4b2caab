"""Values that the fast encoding cannot take, by pickle protocol 5 with buffers out of band.

References and large buffers stay outside the pickle: a reference is its number in the frame, a buffer its number in the
payload. cloudpickle is asked only for what pickle cannot do, and for objects of a ``__main__`` that the peer lacks.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import cloudpickle
import torch

from fastref.codec import mainmodule
from fastref.codec.script import reduce_script_function, reduce_script_module
from fastref.rref import RRef

__all__ = ["dumps", "loads", "register_reducer"]

KEEPS_GAPS_UNTIL = 16384  # bytes; of a larger view with gaps the elements alone travel
_reducers: dict[type, Callable[[Any], Any]] = {
    torch.jit.ScriptFunction: reduce_script_function,
    torch.jit._script.RecursiveScriptModule: reduce_script_module,
}


def register_reducer(kind: type, reducer: Callable[[Any], Any]) -> None:
    """Have ``reducer`` say how values of exactly this class are pickled in calls. The first one for a class counts."""
    _reducers.setdefault(kind, reducer)


def dumps(value: Any, references: list, shares_main: bool = False) -> tuple[bytes, list[memoryview]]:
    """Pickle a value.

    Parameters
    ----------
    value : object
    references : list
        RRefs met are appended; they are not pickled.
    shares_main : bool
        The receiver runs the same ``__main__`` file, so its functions and classes go by name.

    Returns
    -------
    data : bytes
    buffers : list of memoryview
        Contiguous memory that belongs between the pickle's bytes; ``loads`` wants its copies in this order.

    Raises
    ------
    Whatever ``pickle`` raises for a value that neither it nor cloudpickle can take.
    """
    already = len(references)
    try:
        return _dump(_Pickler, value, references, shares_main)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        del references[already:]
        try:
            return _dump(_CloudPickler, value, references, shares_main)
        except Exception:
            del references[already:]
            raise error from None  # what plain pickle says is what users of torch know
    except BaseException:
        del references[already:]
        raise


def loads(data: bytes | memoryview, buffers: list, references: list) -> Any:
    """Unpickle what ``dumps`` made; ``buffers`` are writable copies of its buffers, ``references`` the frame's."""
    return _Unpickler(io.BytesIO(data), buffers, references).load()


def _dump(kind: type, value: Any, references: list, shares_main: bool) -> tuple[bytes, list[memoryview]]:
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = kind(file, protocol=5, buffer_callback=buffers.append)
    pickler.references, pickler.shares_main = references, shares_main
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


class _Reducing:
    """What both picklers do before their own rules."""

    references: list
    shares_main: bool

    def reduced(self, value: Any) -> Any:
        kind = type(value)
        if kind is RRef:
            self.references.append(value)
            return _reference, (len(self.references) - 1,)
        if kind in _reducers:
            return _reducers[kind](value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return _reduce_tensor(value)
        if (kind is FunctionType or isinstance(value, type)) and mainmodule.owns(value):
            if self.shares_main and mainmodule.is_shared(value):
                return mainmodule.find, (value.__qualname__,)
            if not isinstance(self, _CloudPickler):
                raise pickle.PicklingError(f"{value!r} goes by value: the receiver has another __main__")
        if isinstance(value, torch._C.Future):
            raise RuntimeError("Can not pickle torch.futures.Future")
        return NotImplemented


class _Pickler(_Reducing, pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return self.reduced(value)


class _CloudPickler(_Reducing, cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def reducer_override(self, value: Any) -> Any:
        reduced = self.reduced(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: list, references: list) -> None:
        super().__init__(file, buffers=buffers)
        self.references = references

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reference" and module == __name__:
            return self.references.__getitem__
        return super().find_class(module, name)


def _reference(number: int) -> RRef:
    """Stand in the pickle for a reference of the frame; the unpickler puts its own list in this place."""
    raise pickle.UnpicklingError(f"reference {number} outside a call")


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_cpu:
        return NotImplemented  # torch's own way
    whole, order = _in_memory_order(tensor.detach().resolve_conj().resolve_neg())
    flat = whole.reshape(-1)
    if flat.numel() == 1 and flat.stride(0) != 1:  # contiguous, torch says, whatever the stride of a single element is
        flat = torch.empty(1, dtype=flat.dtype).copy_(flat)
    memory: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    kind = torch.nn.Parameter if type(tensor) is torch.nn.Parameter else None
    strides = _gaps(tensor) if order is None else None
    shape = tuple(whole.shape)
    return _rebuild_tensor, (
        pickle.PickleBuffer(memory),
        whole.dtype,
        shape,
        tensor.requires_grad,
        kind,
        order,
        strides,
    )


def _gaps(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides of a small tensor with gaps between its elements; programs for torch look at them."""
    if tensor.is_contiguous() or not tensor.numel():
        return None
    reach = 1  # elements from the first to the last of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return None  # elements overlap
            reach += stride * (size - 1)
    return tensor.stride() if reach * tensor.element_size() <= KEEPS_GAPS_UNTIL else None


def _in_memory_order(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """Return a contiguous view of a tensor without gaps and the order of its dimensions there, or a contiguous copy."""
    if not tensor.is_contiguous() and tensor.numel():
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        turned = tensor.permute(order)
        if turned.is_contiguous():
            return turned, tuple(order)
    return tensor.contiguous(), None


def _rebuild_tensor(
    memory: Any,
    dtype: torch.dtype,
    shape: tuple,
    requires_grad: bool,
    kind: type[torch.nn.Parameter] | None,
    order: tuple[int, ...] | None,
    strides: tuple[int, ...] | None,
) -> torch.Tensor:
    if len(memory):
        tensor = torch.frombuffer(memory, dtype=dtype).reshape(shape)
    else:
        tensor = torch.empty(shape, dtype=dtype)
    if order is not None:
        tensor = tensor.permute([order.index(dim) for dim in range(len(order))])
    if strides is not None:
        tensor = torch.empty_strided(shape, strides, dtype=dtype).copy_(tensor)
    if kind is not None:
        return kind(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
