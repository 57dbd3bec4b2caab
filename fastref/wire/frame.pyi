"""Types of the compiled ``fastref.wire.frame``."""

from typing import Any

__all__ = ["describe"]

def describe(frame: bytes) -> dict[str, Any]: ...
