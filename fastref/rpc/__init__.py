"""``torch.distributed.rpc``'s names: ``import fastref.rpc as rpc`` is the migration."""

from typing import TYPE_CHECKING

from fastref.api import get_worker_info, is_available, remote, rpc_async, rpc_sync
from fastref.codec.registry import register
from fastref.options import RpcBackendOptions, WorkerInfo
from fastref.rpc import (
    absent,
    api,
    backend_registry,
    constants,
    functions,
    internal,
    options,
    server_process_global_profiler,
)
from fastref.rpc.agent import RpcAgent, TensorPipeAgent
from fastref.rpc.api import AllGatherStates, get_rpc_timeout, method_factory, new_method, shutdown
from fastref.rpc.api import _delete_all_user_and_unforked_owner_rrefs as _delete_all_user_and_unforked_owner_rrefs
from fastref.rpc.api import _destroy_rref_context as _destroy_rref_context
from fastref.rpc.api import _get_current_rpc_agent as _get_current_rpc_agent
from fastref.rpc.api import _is_current_rpc_agent_set as _is_current_rpc_agent_set
from fastref.rpc.api import _set_and_start_rpc_agent as _set_and_start_rpc_agent
from fastref.rpc.api import _set_rpc_timeout as _set_rpc_timeout
from fastref.rpc.api import _wait_all as _wait_all
from fastref.rpc.backend_registry import (
    BackendType,
    BackendValue,
    backend_registered,
    construct_rpc_backend_options,
    init_backend,
    register_backend,
)
from fastref.rpc.debugging import _get_debug_info as _get_debug_info
from fastref.rpc.debugging import _rref_context_get_debug_info as _rref_context_get_debug_info
from fastref.rpc.debugging import enable_gil_profiling
from fastref.rpc.joining import _init_rpc_backend as _init_rpc_backend
from fastref.rpc.joining import init_rpc
from fastref.rpc.options import TensorPipeRpcBackendOptions
from fastref.rpc.server_process_global_profiler import (
    _server_process_global_profile as _server_process_global_profile,
)
from fastref.rref import RRef

PyRRef = RRef
_DEFAULT_INIT_METHOD = constants.DEFAULT_INIT_METHOD
_DEFAULT_NUM_WORKER_THREADS = constants.DEFAULT_NUM_WORKER_THREADS
_DEFAULT_RPC_TIMEOUT_SEC = constants.DEFAULT_RPC_TIMEOUT_SEC
_UNSET_RPC_TIMEOUT = constants.UNSET_RPC_TIMEOUT
_is_tensorpipe_available = True  # programs ask before they name its options

if not TYPE_CHECKING:  # to a type checker it would say that every name is there
    __getattr__ = absent.lookup("torch.distributed.rpc")

__all__ = [
    "AllGatherStates",
    "BackendType",
    "BackendValue",
    "PyRRef",
    "RRef",
    "RpcAgent",
    "RpcBackendOptions",
    "TensorPipeAgent",
    "TensorPipeRpcBackendOptions",
    "WorkerInfo",
    "api",
    "backend_registered",
    "backend_registry",
    "construct_rpc_backend_options",
    "constants",
    "enable_gil_profiling",
    "functions",
    "get_rpc_timeout",
    "get_worker_info",
    "init_backend",
    "init_rpc",
    "internal",
    "is_available",
    "method_factory",
    "new_method",
    "options",
    "register",
    "register_backend",
    "remote",
    "rpc_async",
    "rpc_sync",
    "server_process_global_profiler",
    "shutdown",
]
