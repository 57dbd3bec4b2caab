"""Types of the compiled ``fastref.bench.counting``."""

from collections.abc import Callable

__all__ = ["CAN_COUNT", "count", "is_counted"]

CAN_COUNT: bool

def is_counted() -> bool: ...
def count(name: str, operation: Callable[[], object]) -> None: ...
