"""xoscar: actors in the sub-pools of a pool, awaited; tensors as arrays; one run of the loop for each operation.

Arrays, because tensors over 128 KiB never arrive (xoscar 0.9 with torch 2.13).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend

__all__ = ["XoscarBackend"]


class ArrayThing(work.Thing):
    """A ``work.Thing`` whose tensors come and go as arrays, which share their memory."""

    def echo(self, value: Any) -> Any:
        """Return the argument, which was a tensor here."""
        return torch.from_numpy(value).numpy()

    def fetch(self) -> Any:
        """Return the tensor that it holds."""
        return self.tensor().numpy()


class XoscarPeer:
    """A pool with two sub-pools, each a process."""

    def __init__(self, xoscar: ModuleType) -> None:
        self._xoscar = xoscar
        self._loop = asyncio.new_event_loop()

        async def pass_on(self: Any, thing: Any) -> None:
            await thing.touch()

        # Made here, so that they travel by value: without the library there is nothing to derive from.
        self._thing_type = type("ThingActor", (ArrayThing, xoscar.StatelessActor), {})
        relay_type = type("RelayActor", (xoscar.StatelessActor,), {"pass_on": pass_on})
        self._pool = self._run(xoscar.create_actor_pool("127.0.0.1:0", n_process=2))
        self._owner, third = self._pool.sub_processes
        self._relay = self._run(xoscar.create_actor(relay_type, address=third))

    def create(self, ledger: str) -> Any:
        return self._run(self._xoscar.create_actor(self._thing_type, ledger, address=self._owner))

    def touch(self, thing: Any) -> None:
        self._run(thing.touch())

    def touches(self, thing: Any) -> int:
        return int(self._run(thing.touches()))

    def touch_many(self, thing: Any, count: int) -> None:
        async def gather() -> None:
            await asyncio.gather(*[thing.touch() for _ in range(count)])

        self._run(gather())

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._run(thing.echo(tensor.numpy())))

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        return lambda: torch.from_numpy(self._run(thing.fetch()))

    def pass_on(self, thing: Any) -> None:
        self._run(self._relay.pass_on(thing))

    def release(self, thing: Any) -> None:
        self._run(self._xoscar.destroy_actor(thing))

    def close(self) -> None:
        """End the pool and the loop."""
        self._run(self._pool.stop())
        self._loop.close()

    def _run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(step)


class XoscarBackend(PeerBackend):
    """Worker 0 is the main pool."""

    name = "xoscar"
    package = "xoscar"
    installed_as = "xoscar"

    def connect(self, address: str) -> XoscarPeer:
        self._peer = XoscarPeer(self.module)
        return self._peer

    def disconnect(self) -> None:
        self._peer.close()
