"""Types of the compiled ``fastref.runtime.execute``."""

from fastref.runtime.references import ReferenceCaller

__all__ = ["Executor", "Job"]

class Job: ...

class Executor(ReferenceCaller):
    values_published: int

    @property
    def futures_awaited(self) -> int: ...
    def settle_failed(self, index: int, failure: bytes) -> None: ...
