"""Types of the compiled ``fastref.runtime.execute``."""

from collections.abc import Callable
from typing import Any

from fastref.runtime.references import ReferenceCaller

__all__ = ["Executor", "Job"]

class Job: ...

class Executor(ReferenceCaller):
    around: Callable[[Any, Any, dict], Any] | None

    @property
    def futures_awaited(self) -> int: ...
    def call_function(self, func: Any, args: Any, kwargs: Any) -> Any: ...
    def future_of(self, func: Any, args: Any, kwargs: Any) -> Any: ...
    def give_up_futures(self) -> None: ...
    def settle_failed(self, index: int, failure: bytes) -> None: ...
