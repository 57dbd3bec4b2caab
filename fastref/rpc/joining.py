"""Joining a job as programs for torch do: a backend, its options, a store."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
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

__all__ = ["_init_rpc_backend", "init_rpc", "register_own"]


def _start(store: Any, name: str, rank: int, world_size: int | None, rpc_backend_options: Any) -> RpcAgent:
    """Join over a store that is there."""
    if not isinstance(rpc_backend_options, RpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`. {rpc_backend_options}")
    rpc_api.check_pickler(rpc_api._default_pickler, rpc_backend_options.strict)
    api.join(name, rank, world_size, rpc_backend_options, store)
    rpc_api.use_own_pickler()
    return RpcAgent(current_wiring())


def _construct(rpc_timeout: float, init_method: str, **kwargs: Any) -> TensorPipeRpcBackendOptions:
    return TensorPipeRpcBackendOptions(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)


def register_own(
    name: str, construct: Callable[..., Any], start: Callable[..., RpcAgent], options_type: type[RpcBackendOptions]
) -> BackendType:
    """Add a backend that is a way to run fastref: it meets as fastref does, and its options tell it from the others."""
    backend = backend_registry.register_backend(name, construct, start)
    _own[backend] = options_type
    return backend


_own: dict[BackendType, type[RpcBackendOptions]] = {}
TENSORPIPE = register_own("TENSORPIPE", _construct, _start, TensorPipeRpcBackendOptions)


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
    if backend is None or backend in _own:
        options = _own_options(backend, rpc_backend_options) or RpcBackendOptions()
        rpc_api.check_pickler(rpc_api._default_pickler, options.strict)
        session = api.init_rpc(name, None, rank, world_size, options)
        rpc_api.use_own_pickler()
        return session
    options = rpc_backend_options or backend_registry.construct_rpc_backend_options(backend)
    store, _, _ = next(rendezvous(options.init_method, rank=rank, world_size=world_size or -1))
    _init_rpc_backend(backend, store, name, rank, world_size, options)
    return Session()


def _own_options(backend: BackendType | None, options: Any) -> RpcBackendOptions | None:
    """Return the options for one of fastref's own backends, None for the default ones; ``backend`` None is any."""
    if options is None:
        return None if backend in (None, TENSORPIPE) else backend_registry.construct_rpc_backend_options(backend)
    if not isinstance(options, RpcBackendOptions):
        raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
    wanted = tuple(_own.values()) if backend is None else (_own[backend],)
    if isinstance(options, wanted) or (type(options) is RpcBackendOptions and backend in (None, TENSORPIPE)):
        return options
    if backend is None:
        raise TypeError(f"Could not infer backend for options {options}")
    raise TypeError(f"`rpc_backend_options` must be a `{wanted[0].__name__}`. {options}")


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
    size = 0 if world_size is None else world_size
    for value, kind in ((backend, BackendType), (store, Store), (name, str), (rank, Integral), (size, Integral)):
        if not isinstance(value, kind):
            raise UsageError(f"Argument {value} must be of type {kind} but got type {type(value)}")
    if current_wiring() is not None:
        raise UsageError("RPC is already initialized")
    agent = backend_registry.init_backend(
        backend, store=store, name=name, rank=rank, world_size=world_size, rpc_backend_options=rpc_backend_options
    )
    if not isinstance(agent, RpcAgent):
        rpc_api._set_and_start_rpc_agent(agent)
