"""Types of the compiled ``fastref.bench.bare``."""

from typing_extensions import Buffer

__all__ = ["RECORDS", "BareRing"]

RECORDS: int

class BareRing:
    def __init__(self, ring: Buffer, size_bytes: int) -> None: ...
    def turn(self) -> None: ...
