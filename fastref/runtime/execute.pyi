"""Types of the compiled ``fastref.runtime.execute``."""

from typing import Any

from fastref.runtime.references import ReferenceCaller

__all__ = ["Executor", "Job"]

class Job: ...

class Executor(ReferenceCaller):
    values_published: int

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def blocks(self) -> dict[int, int]: ...
    def settle_failed(self, index: int, failure: bytes) -> None: ...
