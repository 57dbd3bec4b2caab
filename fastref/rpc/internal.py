"""What programs for torch reach for in its ``internal`` module."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastref.codec.pickling import dumps, loads, register_reducer

__all__ = ["PythonUDF", "RPCExecMode", "RemoteException", "deserialize", "serialize"]


class RPCExecMode(enum.Enum):
    """The kinds of calls, as profiles name them."""

    SYNC = "sync"
    ASYNC = "async"
    ASYNC_JIT = "async_jit"
    REMOTE = "remote"


class PythonUDF(NamedTuple):
    """A call: function, positional and keyword arguments."""

    func: Any
    args: Any
    kwargs: Any


class RemoteException(NamedTuple):
    """What a function raised: text and type."""

    msg: str
    exception_type: type


class _InternalRPCPickler:
    """How values become bytes and tensors."""

    def _register_reducer(self, obj_class: type, reducer: Callable[[Any], Any]) -> None:
        """Have ``reducer`` say how values of a class travel; the first one for a class counts."""
        register_reducer(obj_class, reducer)

    def serialize(self, obj: Any) -> tuple[bytes, list[torch.Tensor]]:
        """Return bytes and, as tensors of bytes, the buffers that belong between them.

        Raises
        ------
        UsageError
            When it has references, which travel in calls only.
        """
        references: list = []
        data, buffers = dumps(obj, references)
        for rref in references:
            rref._serialize()  # after shutdown it says so
            rref.__reduce__()
        return data, [torch.frombuffer(bytearray(buffer), dtype=torch.uint8) for buffer in buffers]

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        """Return what ``serialize`` was given."""
        return loads(binary_data, [tensor.numpy() for tensor in tensor_table], [])


_internal_rpc_pickler = _InternalRPCPickler()


def serialize(obj: Any) -> tuple[bytes, list[torch.Tensor]]:
    """Return an object as bytes and tensors."""
    return _internal_rpc_pickler.serialize(obj)


def deserialize(binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
    """Return the object that ``serialize`` was given."""
    return _internal_rpc_pickler.deserialize(binary_data, tensor_table)


def _build_rpc_profiling_key(
    exec_type: RPCExecMode, func_name: str, current_worker_name: str, dst_worker_name: str
) -> str:
    """Return the name under which profiles show a call."""
    return f"rpc_{exec_type.value}#{func_name}({current_worker_name} -> {dst_worker_name})"
