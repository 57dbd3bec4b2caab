"""What programs for torch reach for in its ``internal`` module."""

from __future__ import annotations

import enum
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastref.codec.pickling import dumps, loads, register_reducer
from fastref.rref import RRef

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
    """How values become bytes and tensors. Picklers of programs may inherit from it."""

    def _register_reducer(self, obj_class: type, reducer: Callable[[Any], Any]) -> None:
        """Have ``reducer`` say how values of a class travel; the first one for a class counts."""
        register_reducer(obj_class, reducer)

    @classmethod
    def _py_rref_receiver(cls, rref_fork_data: tuple) -> RRef:
        return RRef._deserialize(rref_fork_data)

    def _py_rref_reducer(self, py_rref: RRef) -> tuple:
        return _InternalRPCPickler._py_rref_receiver, (py_rref._serialize(),)

    def _rref_reducer(self, rref: RRef) -> tuple:
        """Say how a reference travels, for picklers of programs."""
        return self._py_rref_reducer(rref)

    def serialize(self, obj: Any) -> tuple[bytes, list[torch.Tensor]]:
        """Return bytes and, as tensors of bytes, the buffers that belong between them.

        References in it are forked, each for one ``deserialize``, on any worker.
        """
        references: list[RRef] = []
        data, buffers = dumps(obj, references)
        forks = [rref._serialize() for rref in references]
        return pickle.dumps((data, forks)), [torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in buffers]

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        """Return what ``serialize`` was given."""
        data, forks = pickle.loads(binary_data)
        return loads(data, [tensor.numpy() for tensor in tensor_table], [RRef._deserialize(fork) for fork in forks])


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
