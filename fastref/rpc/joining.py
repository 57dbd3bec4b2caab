"""Joining a job as programs for torch do: a backend, its options, a store."""

from __future__ import annotations

from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from fastref import api
from fastref.api import Session
from fastref.errors import UsageError
from fastref.options import RpcBackendOptions
from fastref.rpc import api as rpc_api
from fastref.rpc import backend_registry
from fastref.rpc.agent import RpcAgent
from fastref.rpc.backend_registry import BackendType
from fastref.rpc.options import TensorPipeRpcBackendOptions
from fastref.rref import current_wiring

__all__ = ["_init_rpc_backend", "init_rpc"]


def _start(store: Any, name: str, rank: int, world_size: int | None, rpc_backend_options: Any) -> RpcAgent:
    """Join over a store that is there."""
    if not isinstance(rpc_backend_options, RpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`. {rpc_backend_options}")
    api.join(name, rank, world_size, rpc_backend_options, store)
    rpc_api.use_own_pickler()
    return RpcAgent(current_wiring())


def _construct(rpc_timeout: float, init_method: str, **kwargs: Any) -> TensorPipeRpcBackendOptions:
    return TensorPipeRpcBackendOptions(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)


TENSORPIPE = backend_registry.register_backend("TENSORPIPE", _construct, _start)


def init_rpc(
    name: str,
    backend: BackendType | None = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: RpcBackendOptions | None = None,
) -> Session:
    """As ``fastref.init_rpc``, for any backend.

    Parameters
    ----------
    backend : BackendType, optional
        By default the one that the options belong to; ``BackendType.TENSORPIPE`` is fastref.

    Raises
    ------
    TypeError
        Backend or options are none, or do not go together.

    Source
    ------
    ``torch.distributed.rpc.init_rpc``.
    """
    if backend is not None and not isinstance(backend, BackendType):
        raise TypeError("Argument backend must be a member of BackendType")
    if backend is None or backend is TENSORPIPE:
        kind = type(rpc_backend_options)
        if rpc_backend_options is None or kind is RpcBackendOptions or issubclass(kind, TensorPipeRpcBackendOptions):
            pass
        elif not issubclass(kind, RpcBackendOptions):
            raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
        elif backend is TENSORPIPE:
            raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`. {rpc_backend_options}")
        else:
            raise TypeError(f"Could not infer backend for options {rpc_backend_options}")
        session = api.init_rpc(name, None, rank, world_size, rpc_backend_options)
        rpc_api.use_own_pickler()
        return session
    options = rpc_backend_options or backend_registry.construct_rpc_backend_options(backend)
    store, _, _ = next(rendezvous(options.init_method, rank=rank, world_size=world_size or -1))
    _init_rpc_backend(backend, store, name, rank, world_size, options)
    return Session()


def _init_rpc_backend(
    backend: BackendType = TENSORPIPE,
    store: Any = None,
    name: str | None = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: Any = None,
) -> None:
    """Join over a store that is there.

    Raises
    ------
    UsageError
        An argument is of another type, or RPC is already initialized.
    """
    for value, kind in ((backend, BackendType), (store, Store), (name, str), (rank, int)):
        if not isinstance(value, kind):
            raise UsageError(f"Argument {value} must be of type {kind} but got type {type(value)}")
    if world_size is not None and not isinstance(world_size, int):
        raise UsageError(f"Argument {world_size} must be of type {int} but got type {type(world_size)}")
    if current_wiring() is not None:
        raise UsageError("RPC is already initialized")
    agent = backend_registry.init_backend(
        backend, store=store, name=name, rank=rank, world_size=world_size, rpc_backend_options=rpc_backend_options
    )
    if not isinstance(agent, RpcAgent):
        rpc_api._set_and_start_rpc_agent(agent)
