"""``multiprocessing.managers``: objects in server processes, called through proxies; tensors as torch pickles them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any

import torch

from fastref.bench import child, work
from fastref.bench.peers.base import PeerBackend

__all__ = ["ManagersBackend"]

LIMIT_S = 3600


class ThingManager(BaseManager):
    """A server process."""


class Relay:
    """Lives in the second server process and calls objects of the first."""

    def pass_on(self, thing: Any) -> None:
        """Call the empty method through a proxy that came as an argument."""
        thing.touch()


ThingManager.register("Thing", work.Thing, exposed=("touch", "touches", "echo", "tensor"))
ThingManager.register("Relay", Relay, exposed=("pass_on",))


class ManagersPeer:
    """Two server processes. A proxy that ends tells its server, which then lets go of the object."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._managers = [ThingManager(ctx=context) for _ in range(2)]
        for manager in self._managers:
            manager.start(child.tether, (os.getpid(), LIMIT_S))
        self._relay: Any = self._managers[1].Relay()  # type: ignore[attr-defined]

    def create(self, ledger: str) -> Any:
        return self._managers[0].Thing(ledger)  # type: ignore[attr-defined]

    def touch(self, thing: Any) -> None:
        thing.touch()

    def touches(self, thing: Any) -> int:
        return int(thing.touches())

    def touch_many(self, thing: Any, count: int) -> None:
        for _ in range(count):  # a proxy waits for each answer
            thing.touch()

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        back: torch.Tensor = thing.echo(tensor)
        return back

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        fetch: Callable[[], torch.Tensor] = thing.tensor
        return fetch

    def pass_on(self, thing: Any) -> None:
        self._relay.pass_on(thing)

    def release(self, thing: Any) -> None:
        """Nothing to say: the proxy ends with the last variable that holds it."""

    def close(self) -> None:
        """End the server processes."""
        for manager in self._managers:
            manager.shutdown()


class ManagersBackend(PeerBackend):
    """Part of the standard library, so always there."""

    name = "managers"
    package = "multiprocessing.managers"
    installed_as = "python"

    def connect(self, address: str) -> ManagersPeer:
        self._peer = ManagersPeer()
        return self._peer

    def disconnect(self) -> None:
        self._peer.close()
