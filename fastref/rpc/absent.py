"""Names of torch that fastref does not have. They can be imported; each says so when it is used."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from fastref.errors import UsageError

__all__ = ["ABSENT", "INSIDE", "Absent", "AbsentModule", "lookup"]

INSIDE = "it is part of torch's own agent, which fastref does without"
_SCRIPT = "references do not travel inside TorchScript; send what `to_here()` returns"
_PROFILER = "`_server_process_global_profile` profiles what others call here"

# By torch's module, what is absent and what to do about it.
ABSENT: dict[str, dict[str, str]] = {
    "torch.distributed.rpc": {
        **dict.fromkeys(
            (
                "_TensorPipeRpcBackendOptionsBase",
                "_cleanup_python_rpc_handler",
                "_invoke_remote_builtin",
                "_invoke_remote_python_udf",
                "_invoke_remote_torchscript",
                "_invoke_rpc_builtin",
                "_invoke_rpc_python_udf",
                "_invoke_rpc_torchscript",
                "_reset_current_rpc_agent",
                "_set_profiler_node_id",
                "_validate_rpc_args",
            ),
            INSIDE,
        ),
        "_disable_jit_rref_pickle": _SCRIPT,
        "_enable_jit_rref_pickle": _SCRIPT,
        "RemoteProfilerManager": _PROFILER,
        "_disable_server_process_global_profiler": _PROFILER,
        "_enable_server_process_global_profiler": _PROFILER,
    },
    "torch.distributed.rpc._utils": {
        "_group_membership_management": INSIDE,
        "_update_group_membership": INSIDE,
    },
}


class Absent:
    """Stands for a function or class that is not there. Nothing is an instance of it, and any use of it raises."""

    def __init__(self, name: str, instead: str) -> None:
        self.__name__ = self.__qualname__ = name
        self._instead = instead

    def __repr__(self) -> str:
        return f"<{self.__name__}, which fastref does not have>"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"fastref does not have {self.__name__}: {self._instead}")

    __call__ = __getitem__ = __enter__ = __exit__ = __iter__ = __mro_entries__ = __reduce_ex__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # asked by those who only look: inspect, asyncio, mock
            raise AttributeError(name)
        self._refuse()

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __subclasscheck__(self, subclass: type) -> bool:
        return False


class AbsentModule(ModuleType):
    """Stands for a module that is not there: its names are ``Absent``, and it is not available."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"{name}, which fastref does not have.")
        self._lookup = lookup(name)

    def __getattr__(self, name: str) -> Any:
        return self._lookup(name)

    @staticmethod
    def is_available() -> bool:
        """Return False."""
        return False


def lookup(module: str) -> Callable[[str], Absent]:
    """Return a function for ``__getattr__`` of what stands in the place of a module of torch."""
    names = ABSENT[module]

    def find(name: str) -> Absent:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
        return Absent(f"{module}.{name}", names[name])

    return find
