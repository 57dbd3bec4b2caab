"""ZeroMQ (pyzmq): multipart messages over ``ipc://``, large parts not copied, many requests in flight."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from fastref.bench.peers.bytesfloor import TOUCH, BytesFloor, Server

__all__ = ["ZeroMqFloor"]


class ZeroMqWire:
    """A dealer socket to the router of the other process."""

    def __init__(self, zmq: ModuleType, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)

    def ask(self, operation: int, payload: Any) -> Any:
        self._send(operation, payload)
        return self._socket.recv(copy=False).buffer

    def touch_many(self, count: int) -> None:
        for _ in range(count):
            self._send(TOUCH, b"")
        for _ in range(count):
            self._socket.recv()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _send(self, operation: int, payload: Any) -> None:
        self._socket.send_multipart([bytes([operation]), payload], copy=False)


def _serve(socket: Any) -> None:
    server = Server()
    while True:
        asker, operation, payload = socket.recv_multipart(copy=False)
        answer = server.answer(operation.bytes[0], payload)
        socket.send_multipart([asker, answer], copy=False)


class ZeroMqFloor(BytesFloor):
    """Worker 1 serves on a thread."""

    name = "zmq"
    package = "zmq"
    installed_as = "pyzmq"
    world_size = 2

    def wire(self, address: str) -> ZeroMqWire:
        return ZeroMqWire(self.module, self.endpoint(address))

    def serve(self, rank: int, address: str) -> None:
        socket = self.module.Context.instance().socket(self.module.ROUTER)
        socket.bind(self.endpoint(address))
        threading.Thread(target=_serve, args=(socket,), name="server", daemon=True).start()

    def endpoint(self, address: str) -> str:
        """Return where worker 1 is reached."""
        return f"ipc://{Path(address, 'socket')}"
