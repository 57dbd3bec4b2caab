"""Ray: actors on a local node, called by ``remote`` and waited for by ``get``."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend

__all__ = ["RayBackend"]


class RayPeer:
    """A node of its own; every actor is a process, so making one takes as long as starting a process."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        self._thing_type = ray.remote(num_cpus=0)(work.Thing)

        class Relay:
            def pass_on(self, things: list[Any]) -> None:
                ray.get(things[0].touch.remote())

        self._relay = ray.remote(num_cpus=0)(Relay).remote()

    def create(self, ledger: str) -> Any:
        return self._thing_type.remote(ledger)

    def touch(self, thing: Any) -> None:
        self._ray.get(thing.touch.remote())

    def touches(self, thing: Any) -> int:
        return int(self._ray.get(thing.touches.remote()))

    def touch_many(self, thing: Any, count: int) -> None:
        self._ray.get([thing.touch.remote() for _ in range(count)])

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        back: torch.Tensor = self._ray.get(thing.echo.remote(tensor))
        return back

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        def fetch() -> torch.Tensor:
            tensor: torch.Tensor = self._ray.get(thing.tensor.remote())
            return tensor

        return fetch

    def pass_on(self, thing: Any) -> None:
        self._ray.get(self._relay.pass_on.remote([thing]))

    def release(self, thing: Any) -> None:
        """Nothing to say: the actor ends with the last variable that holds its handle."""


class RayBackend(PeerBackend):
    """Worker 0 is the driver."""

    name = "ray"
    package = "ray"
    installed_as = "ray"

    def connect(self, address: str) -> RayPeer:
        return RayPeer(self.module)

    def disconnect(self) -> None:
        self.module.shutdown()
