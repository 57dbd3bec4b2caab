"""fastref: remote references for Python and PyTorch, fast on one host and hard to break.

``import fastref.rpc as rpc`` has the names of ``torch.distributed.rpc``; this module has the same and what goes beyond.
"""

import logging

from fastref import autograd, debug
from fastref._version import __version__
from fastref.api import Session, get_worker_info, init_rpc, is_available, remote, rpc_async, rpc_sync, shutdown
from fastref.codec.registry import register
from fastref.codec.sharing import share, shared_empty
from fastref.errors import (
    BackwardError,
    CallTimeout,
    FastrefError,
    ForkedProcessError,
    IdentityError,
    IdsExhausted,
    NotInitialized,
    OwnerDied,
    PeerError,
    ProtocolError,
    ReferenceLost,
    RemoteError,
    RendezvousError,
    ResourceError,
    StrictModeError,
    UsageError,
    WorkerDied,
)
from fastref.futures import Future
from fastref.options import RpcBackendOptions, TlsFiles, WorkerInfo
from fastref.rref import RRef
from fastref.spawn import spawn

__all__ = [
    "BackwardError",
    "CallTimeout",
    "FastrefError",
    "ForkedProcessError",
    "Future",
    "IdentityError",
    "IdsExhausted",
    "NotInitialized",
    "OwnerDied",
    "PeerError",
    "ProtocolError",
    "RRef",
    "ReferenceLost",
    "RemoteError",
    "RendezvousError",
    "ResourceError",
    "RpcBackendOptions",
    "Session",
    "StrictModeError",
    "TlsFiles",
    "UsageError",
    "WorkerDied",
    "WorkerInfo",
    "__version__",
    "autograd",
    "debug",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "register",
    "remote",
    "rpc_async",
    "rpc_sync",
    "share",
    "shared_empty",
    "shutdown",
    "spawn",
]

logging.getLogger("fastref").addHandler(logging.NullHandler())  # silent unless the program configures logging
