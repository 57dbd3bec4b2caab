"""The backend FAULTY_TENSORPIPE."""

from __future__ import annotations

from typing import Any

from fastref.rpc._testing.agent import FaultyTensorPipeAgent, FaultyTensorPipeRpcBackendOptions
from fastref.rpc.joining import register_own

__all__: list[str] = []


def _construct(rpc_timeout: float, init_method: str, **kwargs: Any) -> FaultyTensorPipeRpcBackendOptions:
    return FaultyTensorPipeRpcBackendOptions(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)


def _start(store: Any, name: str, rank: int, world_size: int | None, rpc_backend_options: Any) -> FaultyTensorPipeAgent:
    if not isinstance(rpc_backend_options, FaultyTensorPipeRpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `FaultyTensorPipeRpcBackendOptions`. {rpc_backend_options}")
    return FaultyTensorPipeAgent(store, name, rank, world_size, rpc_backend_options)


register_own("FAULTY_TENSORPIPE", _construct, _start, FaultyTensorPipeRpcBackendOptions)
