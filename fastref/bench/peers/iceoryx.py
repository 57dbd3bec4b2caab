"""iceoryx2: requests and responses in shared memory, polled for at both ends; payloads are copied in, read in place."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from fastref.bench.peers.bytesfloor import TOUCH, BytesFloor, Server

__all__ = ["IceoryxFloor"]

HEADER_BYTES = 8  # the operation comes first in a request; keeps what follows aligned
LARGEST_BYTES = (1 << 24) + HEADER_BYTES


class IceoryxWire:
    """A client of the service that the other process offers."""

    def __init__(self, iox: ModuleType, address: str) -> None:
        self._node, service = _service(iox, address)
        self._client = service.client_builder().initial_max_slice_len(LARGEST_BYTES).create()
        self._answered: Any = None

    def ask(self, operation: int, payload: Any) -> Any:
        request = self._client.loan_slice_uninit(HEADER_BYTES + len(payload))
        _fill(_bytes_of(request), operation, payload)
        pending = request.assume_init().send()
        while (response := pending.receive()) is None:
            os.sched_yield()
        # The payload is read where it lies, until the next question.
        self._answered = response
        return _bytes_of(response)[HEADER_BYTES:]

    def touch_many(self, count: int) -> None:
        for _ in range(count):  # more than a few requests in flight are refused
            self.ask(TOUCH, b"")

    def close(self) -> None:
        # Its files in /dev/shm go with these objects, and stay when a process ends that has them.
        del self._answered, self._client, self._node


def _service(iox: ModuleType, address: str) -> tuple[Any, Any]:
    node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
    name = iox.ServiceName.new(f"fastref/{Path(address).name}")
    item = iox.Slice[ctypes.c_uint8]
    return node, node.service_builder(name).request_response(item, item).open_or_create()


def _bytes_of(sample: Any) -> Any:
    import numpy  # only where it is measured

    return numpy.frombuffer(sample.payload().as_memory_view(), dtype="B")


def _fill(memory: Any, operation: int, payload: Any) -> None:
    import numpy

    memory[0] = operation
    memory[HEADER_BYTES:] = numpy.frombuffer(payload, dtype="B") if len(payload) else 0


def _serve(iox: ModuleType, address: str, ready: threading.Event, end: threading.Event) -> None:
    node, service = _service(iox, address)
    port = service.server_builder().initial_max_slice_len(LARGEST_BYTES).create()
    server = Server()
    ready.set()
    while not end.is_set():
        if (request := port.receive()) is None:
            os.sched_yield()
            continue
        memory = _bytes_of(request)
        answer = server.answer(int(memory[0]), memory[HEADER_BYTES:])
        response = request.loan_slice_uninit(HEADER_BYTES + len(answer))
        _fill(_bytes_of(response), 0, answer)
        response.assume_init().send()
        del memory, answer, request, response  # the library takes it back when nobody looks at it


class IceoryxFloor(BytesFloor):
    """Worker 1 serves on a thread that polls."""

    name = "iceoryx2"
    package = "iceoryx2"
    installed_as = "iceoryx2"
    world_size = 2

    def __init__(self) -> None:
        super().__init__()
        self._end = threading.Event()
        self._server: threading.Thread | None = None

    def wire(self, address: str) -> IceoryxWire:
        return IceoryxWire(self.module, address)

    def serve(self, rank: int, address: str) -> None:
        ready = threading.Event()
        arguments = (self.module, address, ready, self._end)
        self._server = threading.Thread(target=_serve, args=arguments, name="server", daemon=True)
        self._server.start()
        ready.wait()

    def disconnect(self) -> None:
        super().disconnect()
        self._end.set()
        if self._server is not None:
            self._server.join()
