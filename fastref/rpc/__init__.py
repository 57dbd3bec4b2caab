"""``torch.distributed.rpc``'s names: ``import fastref.rpc as rpc`` is the migration."""

from fastref.api import get_worker_info, init_rpc, is_available, remote, rpc_async, rpc_sync, shutdown
from fastref.options import RpcBackendOptions, WorkerInfo
from fastref.rref import RRef

__all__ = [
    "RRef",
    "RpcBackendOptions",
    "WorkerInfo",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]
