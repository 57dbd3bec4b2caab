"""The contract that every carrier keeps, and that one suite of tests checks."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Carrier"]


class Carrier(ABC):
    """Carry one large buffer to a peer. Any thread may call any method."""

    @abstractmethod
    def lend(self, data: bytes | bytearray | memoryview) -> bytes:
        """Put a copy of ``data`` where the peer can read it; return the descriptor.

        Raises
        ------
        ResourceError
            When there is no room; nothing is lent then.
        """

    @abstractmethod
    def borrow(self, descriptor: bytes) -> memoryview:
        """Return what a descriptor names, before it is given back.

        The bytes are the borrower's own: he may write them and nobody else sees it, and they last as long as a view of
        them, whatever becomes of the place.

        Raises
        ------
        ProtocolError
            When the descriptor names nothing that can be read.
        """

    @abstractmethod
    def give_back(self, descriptor: bytes) -> None:
        """Say that the peer has the descriptor; the place may be used again when nothing borrowed from it is left.

        Raises
        ------
        UsageError
            When the descriptor is not lent.
        """

    @property
    @abstractmethod
    def bytes_lent(self) -> int:
        """Bytes lent now, or still borrowed."""
