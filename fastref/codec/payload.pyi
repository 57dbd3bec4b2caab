"""Types of the compiled ``fastref.codec.payload``; what these classes do, only compiled modules can ask for."""

from typing import Any

__all__ = ["Carried", "Decoder", "Encoder"]

class Carried:
    @property
    def value(self) -> Any: ...
    @property
    def context(self) -> int: ...
    @property
    def link(self) -> int: ...
    @property
    def tensors(self) -> list[Any]: ...

class Decoder: ...

class Encoder:
    def __init__(self) -> None: ...
