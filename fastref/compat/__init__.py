"""fastref in the place of ``torch.distributed.rpc``, for programs that are not to be changed.

``python -m fastref.compat script.py`` does it for a whole program, ``install()`` for one that calls it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

import torch

from fastref import autograd, rpc
from fastref.compat import late
from fastref.errors import UsageError
from fastref.nn import remote_module
from fastref.optim import optimizer
from fastref.rpc import (
    _testing,
    api,
    backend_registry,
    constants,
    functions,
    internal,
    options,
    rref_proxy,
    server_process_global_profiler,
)
from fastref.rpc.absent import Absent, AbsentModule

__all__ = ["install"]

_RPC = "torch.distributed.rpc"

_MODULES: dict[str, ModuleType] = {
    _RPC: rpc,
    f"{_RPC}._testing": _testing,
    f"{_RPC}._testing.faulty_agent_backend_registry": _testing.faulty_agent_backend_registry,
    f"{_RPC}.api": api,
    f"{_RPC}.backend_registry": backend_registry,
    f"{_RPC}.constants": constants,
    f"{_RPC}.functions": functions,
    f"{_RPC}.internal": internal,
    f"{_RPC}.options": options,
    f"{_RPC}.rref_proxy": rref_proxy,
    f"{_RPC}.server_process_global_profiler": server_process_global_profiler,
    "torch.distributed.autograd": autograd,
    "torch.distributed.nn.api.remote_module": remote_module,
    "torch.distributed.optim.optimizer": optimizer,
    # What is the inside of torch's agent.
    f"{_RPC}._utils": AbsentModule(f"{_RPC}._utils"),
}

# Classes that modules of torch take from those above, when they are imported.
_TAKEN: dict[str, dict[str, Any]] = {
    "torch._jit_internal": {"RRef": rpc.RRef, "PyRRef": rpc.RRef},
    "torch.nn.parallel.distributed": {"RRef": rpc.RRef},
    "torch.distributed.optim": {"DistributedOptimizer": optimizer.DistributedOptimizer},
    "torch.distributed.nn": {"RemoteModule": remote_module.RemoteModule},
}


def install() -> None:
    """Put ``fastref.rpc`` in the place of ``torch.distributed.rpc``, here and in all that multiprocessing starts.

    Call it before ``init_rpc``; a second call does nothing. A module that was imported before, by this program or ahead
    of it by the forkserver, has fastref too if it says ``rpc.rpc_sync``; functions that it took by
    ``from torch.distributed.rpc import ...`` raise when they are called.

    Raises
    ------
    UsageError
        This process has joined a job of torch's already.
    """
    late.reach_children()
    if sys.modules.get(_RPC) is rpc:
        return
    if torch._C._distributed_rpc._is_current_rpc_agent_set():
        raise UsageError(
            "fastref cannot take the place of torch.distributed.rpc after torch's init_rpc: install it first"
        )
    for name, module in _MODULES.items():
        before = sys.modules.get(name)
        sys.modules[name] = module
        if before is not None:
            _redirect(before, module)
        parent, _, child = name.rpartition(".")
        if parent not in _MODULES and before is not None:
            setattr(sys.modules[parent], child, module)
    for name, classes in _TAKEN.items():
        if name in sys.modules:
            vars(sys.modules[name]).update(classes)


class _Replaced(ModuleType):
    """A module of torch, for those who hold it from before: it has the names of the one in its place."""

    def __getattribute__(self, name: str) -> Any:
        return getattr(ModuleType.__getattribute__(self, "__dict__")["_in_its_place"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(ModuleType.__getattribute__(self, "__dict__")["_in_its_place"], name, value)


def _redirect(before: ModuleType, module: ModuleType) -> None:
    """Have a module of torch answer for the one in its place, and functions that were taken from it refuse."""
    names = vars(before)
    names["_in_its_place"] = module
    if before.__name__ == _RPC:
        names["dist"] = Absent("init_rpc of torch", _IMPORT_LATER)  # what torch's init_rpc meets over
    elif before.__name__ == f"{_RPC}.api":
        names["_is_current_rpc_agent_set"] = _refuse  # what every function of torch's asks first
    before.__class__ = _Replaced


_IMPORT_LATER = (
    "this function was imported from torch.distributed.rpc before fastref took its place;"
    " call fastref.compat.install() before that import"
)


def _refuse() -> NoReturn:
    raise UsageError(_IMPORT_LATER)
