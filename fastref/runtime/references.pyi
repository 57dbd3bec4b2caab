"""Types of the compiled ``fastref.runtime.references``."""

from typing import Any

from fastref.rref import RRef
from fastref.runtime.calls import Caller

__all__ = ["ReferenceCaller", "use_profiler_flag"]

def use_profiler_flag(address: int) -> None: ...

class ReferenceCaller(Caller):
    fetched_directly: int
    fetched_by_message: int
    profiler: Any

    def rpc(self, how: int, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> Any: ...
    def rpc_unprofiled(self, how: int, to: Any, func: Any, args: tuple, kwargs: Any, timeout: float) -> Any: ...
    def fetch_unprofiled(self, rref: RRef[Any], timeout: float) -> Any: ...
    def new_local(self, rref: RRef[Any], value: Any, type_hint: type | None) -> None: ...
