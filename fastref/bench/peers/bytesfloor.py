"""Floors that carry bytes to another process and back: one thing there, three operations, no objects by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastref.bench import work
from fastref.bench.ledger import Ledger
from fastref.bench.peers.base import PeerBackend

__all__ = ["ECHO", "FETCH", "TOUCH", "TOUCHES", "BytesFloor", "BytesPeer", "Server", "Wire"]

TOUCH, TOUCHES, ECHO, FETCH = range(1, 5)


class Wire(Protocol):
    """How a floor asks the other process."""

    def ask(self, operation: int, payload: Any) -> Any:
        """Send an operation and a buffer; return the buffer that is the answer."""

    def touch_many(self, count: int) -> None:
        """Ask for ``TOUCH`` so many times, many in flight where there is a way."""

    def close(self) -> None:
        """End the other side and let go of the way to it."""


class BytesPeer:
    """A ``Peer`` over a ``Wire``. Its things are all the one thing of the other process."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def create(self, ledger: str) -> None:
        """Nothing: the thing is there already."""

    def touch(self, thing: None) -> None:
        self._wire.ask(TOUCH, b"")

    def touches(self, thing: None) -> int:
        return int.from_bytes(self._wire.ask(TOUCHES, b""), "little")

    def touch_many(self, thing: None, count: int) -> None:
        self._wire.touch_many(count)

    def echo(self, thing: None, tensor: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(self._wire.ask(ECHO, tensor.numpy().view("B")), dtype=tensor.dtype)

    def fetcher(self, thing: None) -> Callable[[], torch.Tensor]:
        return lambda: torch.frombuffer(self._wire.ask(FETCH, b""), dtype=torch.float32)

    def pass_on(self, thing: None) -> None:
        raise NotImplementedError

    def release(self, thing: None) -> None:
        """Nothing: the thing stays."""


class Server:
    """The other process's side, whatever the wire."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._thing = work.Thing(self._ledger.path)

    def answer(self, operation: int, payload: Any) -> Any:
        """Do what was asked; return the buffer to send back."""
        if operation == TOUCH:
            self._thing.touch()
            return b""
        if operation == TOUCHES:
            return self._thing.touches().to_bytes(8, "little")
        if operation == ECHO:
            return payload
        return self._thing.tensor().numpy().view("B")


class BytesFloor(PeerBackend):
    """A floor has no references: nothing is made, passed or let go of."""

    lacks = frozenset({"object_create", "object_pass", "object_release"})

    def __init__(self) -> None:
        super().__init__()
        self._wire: Wire | None = None

    def connect(self, address: str) -> BytesPeer:
        self._wire = self.wire(address)
        return BytesPeer(self._wire)

    def wire(self, address: str) -> Wire:
        """Return the way to the other process."""
        raise NotImplementedError

    def disconnect(self) -> None:
        if self._wire is not None:
            self._wire.close()
