"""What goes between hosts: the rows of what is held to TCP, ZeroMQ over it, and plain sockets as the floor.

Over loopback, and between two hosts on one machine.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastref.bench.contract import Backend
from fastref.bench.hosts import ADDRESSES, why_not_two_hosts
from fastref.bench.objects import ObjectCaller
from fastref.bench.peers.base import PeerBackend, wait_for_servers
from fastref.bench.peers.bytesfloor import TOUCH, BytesFloor, Server
from fastref.bench.peers.zeromq import ZeroMqFloor
from fastref.bench.timing import Effort, Summary

__all__ = ["LOOPBACK", "WIRES", "WIRE_ROWS", "WireCaller", "free_port"]

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """Return a port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


class WireCaller(ObjectCaller):
    """The rows of what goes over TCP."""

    def wire_call(self, effort: Effort) -> Summary:
        """Microseconds for an empty method of an object in another process."""
        return self.object_call(effort)

    def wire_rate(self, effort: Effort) -> Summary:
        """Empty methods per second, many in flight."""
        return self.object_rate(effort)

    def wire_echo_64(self, effort: Effort) -> Summary:
        """Microseconds for a method that gets a tensor of 64 B and returns it."""
        return self._object_echo(1 << 6, effort)

    def wire_echo_4k(self, effort: Effort) -> Summary:
        """Microseconds for the same with 4 KiB."""
        return self._object_echo(1 << 12, effort)

    def wire_echo_1m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 1 MiB."""
        return self._object_echo(1 << 20, effort)

    def wire_echo_64m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 64 MiB."""
        return self._object_echo(1 << 26, effort)


WIRE_ROWS = frozenset(name for name in vars(WireCaller) if name.startswith("wire_"))


class _OverTcp(PeerBackend):
    """Worker 1 serves at a port of the loopback or, ``apart``, of another host than that of worker 0."""

    def __init__(self, name: str, apart: bool) -> None:
        super().__init__()
        self.name, self.apart = name, apart
        self.offers = WIRE_ROWS

    def missing(self) -> str | None:
        return super().missing() or (why_not_two_hosts() if self.apart else None)

    def place(self, address: str) -> tuple[str, int]:
        """Return address and port where worker 1 serves."""
        return ADDRESSES[1] if self.apart else LOOPBACK, int(Path(address, "port").read_text())

    @contextmanager
    def address(self) -> Iterator[str]:
        with super().address() as directory:
            Path(directory, "port").write_text(str(free_port()))
            yield directory

    def join(self, rank: int, world_size: int, address: str) -> Any:
        if rank:
            return super().join(rank, world_size, address)
        wait_for_servers(address, world_size - 1)
        return WireCaller(self.connect(address))


class ZeroMqOverTcp(_OverTcp, ZeroMqFloor):
    """As ``ZeroMqFloor``, over TCP."""

    def endpoint(self, address: str) -> str:
        host, port = self.place(address)
        return f"tcp://{host}:{port}"


class SocketWire:
    """One connection; an operation and a length ahead of each payload."""

    _HEAD = struct.Struct("=QQ")

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._rooms: dict[int, bytearray] = {}

    def ask(self, operation: int, payload: Any) -> Any:
        self.send(operation, payload)
        return self.receive()[1]

    def touch_many(self, count: int) -> None:
        for _ in range(count):
            self.send(TOUCH, b"")
        for _ in range(count):
            self.receive()

    def close(self) -> None:
        self._socket.close()

    def send(self, operation: int, payload: Any) -> None:
        rest = memoryview(payload).cast("B")
        head = self._HEAD.pack(operation, len(rest))
        sent = self._socket.sendmsg([head, rest])
        if sent < len(head) + len(rest):
            self._socket.sendall(rest[sent - len(head) :])

    def receive(self) -> tuple[int, memoryview]:
        """Return an operation and its payload, in memory that is used again for the next of that size."""
        operation, size = self._HEAD.unpack(self._fill(memoryview(bytearray(self._HEAD.size))))
        room = self._rooms.setdefault(size, bytearray(size))
        return operation, self._fill(memoryview(room))

    def _fill(self, room: memoryview) -> memoryview:
        rest = room
        while rest:
            got = self._socket.recv_into(rest)
            if not got:
                raise EOFError
            rest = rest[got:]
        return room


class SocketFloor(_OverTcp, BytesFloor):
    """What one plain socket moves, sent and received in turn."""

    package = "socket"
    installed_as = "python"
    world_size = 2

    def wire(self, address: str) -> SocketWire:
        return SocketWire(socket.create_connection(self.place(address)))

    def serve(self, rank: int, address: str) -> None:
        listener = socket.create_server(self.place(address))
        threading.Thread(target=_serve_sockets, args=(listener,), name="server", daemon=True).start()


def _serve_sockets(listener: socket.socket) -> None:
    server, wire = Server(), SocketWire(listener.accept()[0])
    try:
        while True:
            operation, payload = wire.receive()
            wire.send(operation, server.answer(operation, payload))
    except EOFError:
        wire.close()


WIRES: list[Backend] = [
    ZeroMqOverTcp("zmq_tcp", apart=False),
    SocketFloor("sockets", apart=False),
    ZeroMqOverTcp("zmq_veth", apart=True),
    SocketFloor("sockets_veth", apart=True),
]
