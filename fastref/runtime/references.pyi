"""Types of the compiled ``fastref.runtime.references``."""

from typing import Any

from fastref.rref import RRef
from fastref.runtime.calls import Caller

__all__ = ["ReferenceCaller"]

class ReferenceCaller(Caller):
    fetched_directly: int
    fetched_by_message: int

    def rpc(self, how: int, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> Any: ...
    def new_local(self, rref: RRef[Any], value: Any, type_hint: type | None) -> None: ...
