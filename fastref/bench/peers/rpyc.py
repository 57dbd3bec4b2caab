"""rpyc: a service in each process, objects called through netrefs; tensors as bytes, by value; unix sockets."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.peers.base import PeerBackend, from_bytes, to_bytes

__all__ = ["RpycBackend"]

CONFIGURATION = {"allow_public_attrs": True, "sync_request_timeout": None}


class Servant:
    """The root object of a service."""

    def create(self, ledger: str) -> Any:
        """Make an object; the answer is a reference to it."""
        return RpycThing(ledger)

    def pass_on(self, thing: Any) -> None:
        """Call the empty method of an object that lives elsewhere."""
        thing.touch()


class RpycThing(work.Thing):
    """A ``work.Thing`` whose tensors come and go as bytes."""

    def echo(self, value: bytes) -> bytes:
        """Return the argument, which was a tensor here."""
        return to_bytes(from_bytes(value, torch.int32))

    def fetch(self) -> bytes:
        """Return the tensor that it holds."""
        return to_bytes(self.tensor())


class RpycPeer:
    """Connections to workers 1 and 2.

    A third process calls an object by way of the process that passed the reference: references of rpyc belong to a
    connection.
    """

    def __init__(self, rpyc: ModuleType, address: str) -> None:
        self._rpyc = rpyc
        connect = importlib.import_module("rpyc.utils.factory").unix_connect
        self._owner, self._third = (connect(_socket(address, rank), config=CONFIGURATION) for rank in (1, 2))

    def create(self, ledger: str) -> Any:
        return self._owner.root.create(ledger)

    def touch(self, thing: Any) -> None:
        thing.touch()

    def touches(self, thing: Any) -> int:
        return int(thing.touches())

    def touch_many(self, thing: Any, count: int) -> None:
        touch = self._rpyc.async_(thing.touch)
        for answer in [touch() for _ in range(count)]:
            answer.wait()

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        return from_bytes(thing.echo(to_bytes(tensor)), tensor.dtype)

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        return lambda: from_bytes(thing.fetch(), torch.float32)

    def pass_on(self, thing: Any) -> None:
        self._third.root.pass_on(thing)

    def release(self, thing: Any) -> None:
        """Nothing to say: the netref ends with the last variable that holds it."""

    def close(self) -> None:
        """Close the connections."""
        self._owner.close()
        self._third.close()


class RpycBackend(PeerBackend):
    """Workers 1 and 2 serve, each connection on a thread."""

    name = "rpyc"
    package = "rpyc"
    installed_as = "rpyc"
    world_size = 3

    def __init__(self) -> None:
        super().__init__()
        self._peer: RpycPeer | None = None

    def load(self) -> None:
        super().load()
        # It would compress what is over 3,000 bytes, which no socket of one host is worth.
        importlib.import_module("rpyc.core.channel").Channel.COMPRESSION_THRESHOLD = sys.maxsize

    def connect(self, address: str) -> RpycPeer:
        self._peer = RpycPeer(self.module, address)
        return self._peer

    def serve(self, rank: int, address: str) -> None:
        server_type = importlib.import_module("rpyc.utils.server").ThreadedServer
        service = type("ServantService", (Servant, self.module.Service), {})
        server = server_type(service, socket_path=_socket(address, rank), protocol_config=CONFIGURATION)
        threading.Thread(target=server.start, name="server", daemon=True).start()

    def disconnect(self) -> None:
        if self._peer is not None:
            self._peer.close()


def _socket(address: str, rank: int) -> str:
    return str(Path(address, f"socket-{rank}"))
