"""The inline carrier: the bytes travel in the descriptor itself, where no memory can be shared."""

from __future__ import annotations

from fastref.carriers.contract import Carrier

__all__ = ["InlineCarrier"]


class InlineCarrier(Carrier):
    """Carry a buffer as its own descriptor. Nothing is lent, so giving back changes nothing."""

    def lend(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(data)

    def borrow(self, descriptor: bytes) -> memoryview:
        return memoryview(bytearray(descriptor))

    def give_back(self, descriptor: bytes) -> None:
        return None

    @property
    def bytes_lent(self) -> int:
        return 0
