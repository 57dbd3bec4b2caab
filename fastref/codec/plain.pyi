"""Types of the compiled ``fastref.codec.plain``."""

from typing import Any

from fastref.rref import RRef

__all__ = ["decode", "encode"]

def encode(value: Any, references: list[RRef[Any]] | None = None) -> bytes: ...
def decode(data: bytes, references: list[RRef[Any]] | None = None) -> Any: ...
