"""Monarch: actors in processes of this host, their endpoints called one at a time or many."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend

__all__ = ["MonarchBackend"]


class MonarchPeer:
    """Two meshes of one process each."""

    def __init__(self, monarch: ModuleType) -> None:
        def pass_on(self: Any, thing: Any) -> None:
            thing.touch.call_one().get()

        # Made here, so that they travel by value: without the library there is nothing to derive from.
        methods = {name: monarch.endpoint(getattr(work.Thing, name)) for name in ("touch", "touches", "echo", "tensor")}
        self._thing_type = type("ThingActor", (work.Thing, monarch.Actor), methods)
        relay_type = type("RelayActor", (monarch.Actor,), {"pass_on": monarch.endpoint(pass_on)})
        host = monarch.this_host()
        self._owner, third = (host.spawn_procs(per_host={"processes": 1}) for _ in range(2))
        self._relay = third.spawn("relay", relay_type)
        self._created = 0

    def create(self, ledger: str) -> Any:
        self._created += 1
        return self._owner.spawn(f"thing{self._created}", self._thing_type, ledger)

    def touch(self, thing: Any) -> None:
        thing.touch.call_one().get()

    def touches(self, thing: Any) -> int:
        return int(thing.touches.call_one().get())

    def touch_many(self, thing: Any, count: int) -> None:
        for answer in [thing.touch.call_one() for _ in range(count)]:
            answer.get()

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        back: torch.Tensor = thing.echo.call_one(tensor).get()
        return back

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        def fetch() -> torch.Tensor:
            tensor: torch.Tensor = thing.tensor.call_one().get()
            return tensor

        return fetch

    def pass_on(self, thing: Any) -> None:
        self._relay.pass_on.call_one(thing).get()

    def release(self, thing: Any) -> None:
        thing.stop("released").get()


class MonarchBackend(PeerBackend):
    """Worker 0 is the client."""

    name = "monarch"
    package = "monarch.actor"
    installed_as = "torchmonarch"

    def connect(self, address: str) -> MonarchPeer:
        return MonarchPeer(self.module)

    def disconnect(self) -> None:
        self.module.shutdown_context().get()
