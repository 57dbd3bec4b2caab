"""dask.distributed: actors on the workers of a local cluster, called through futures."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend

__all__ = ["DaskBackend"]


class DaskPeer:
    """A cluster of two worker processes, threads one each."""

    def __init__(self, distributed: ModuleType) -> None:
        self._cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        )
        self._client = distributed.Client(self._cluster)
        self._client.wait_for_workers(2)
        self._owner, self._third = list(self._client.scheduler_info()["workers"])

    def create(self, ledger: str) -> Any:
        return self._client.submit(work.Thing, ledger, actor=True, pure=False, workers=[self._owner]).result()

    def touch(self, thing: Any) -> None:
        thing.touch().result()

    def touches(self, thing: Any) -> int:
        return int(thing.touches().result())

    def touch_many(self, thing: Any, count: int) -> None:
        for answer in [thing.touch() for _ in range(count)]:
            answer.result()

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        back: torch.Tensor = thing.echo(tensor).result()
        return back

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        def fetch() -> torch.Tensor:
            tensor: torch.Tensor = thing.tensor().result()
            return tensor

        return fetch

    def pass_on(self, thing: Any) -> None:
        self._client.submit(_touch_through, thing, pure=False, workers=[self._third]).result()

    def release(self, thing: Any) -> None:
        """Nothing to say: the actor ends with the last variable that holds it."""

    def close(self) -> None:
        """End client and cluster."""
        self._client.close()
        self._cluster.close()


def _touch_through(thing: Any) -> None:
    thing.touch().result()


class DaskBackend(PeerBackend):
    """Client, scheduler and nannies' parent are worker 0."""

    name = "dask"
    package = "distributed"
    installed_as = "distributed"

    def connect(self, address: str) -> DaskPeer:
        self._peer = DaskPeer(self.module)
        return self._peer

    def disconnect(self) -> None:
        self._peer.close()
