"""Types of the compiled ``fastref.codec.publishable``."""

from typing import Any

__all__ = ["publishability"]

def publishability(holder: list[Any]) -> str: ...
