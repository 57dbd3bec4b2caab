"""fastref in the place of ``torch.distributed.rpc``, for programs that are not to be changed."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from fastref import rpc
from fastref.rpc import (
    api,
    backend_registry,
    constants,
    functions,
    internal,
    options,
    rref_proxy,
    server_process_global_profiler,
)

__all__ = ["install"]

_MODULES: dict[str, ModuleType] = {
    "": rpc,
    ".api": api,
    ".backend_registry": backend_registry,
    ".constants": constants,
    ".functions": functions,
    ".internal": internal,
    ".options": options,
    ".rref_proxy": rref_proxy,
    ".server_process_global_profiler": server_process_global_profiler,
}


def install() -> None:
    """Put ``fastref.rpc`` in the place of ``torch.distributed.rpc``, in this process. Idempotent.

    Modules that were imported before keep what they took from torch.
    """
    for name, module in _MODULES.items():
        sys.modules[f"torch.distributed.rpc{name}"] = module
    torch.distributed.rpc = rpc
