"""MPI (mpi4py): buffers sent to a spawned process and received from it, into memory that is warm.

``python -m fastref.bench.peers.mpi`` is that process.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from fastref.bench.peers.bytesfloor import ECHO, FETCH, TOUCH, TOUCHES, BytesFloor, Server
from fastref.bench.work import FETCHED_BYTES

__all__ = ["MpiFloor"]

END = 0
LARGEST_BYTES = 1 << 24


class MpiWire:
    """The parent's end: the operation is the tag."""

    def __init__(self, mpi: ModuleType) -> None:
        self._mpi = mpi
        # The launcher comes with the library and may lie beside the interpreter, off the path.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        self._peer = mpi.COMM_SELF.Spawn(sys.executable, args=["-m", __name__], maxprocs=1)
        import numpy  # only where it is measured

        self._received = numpy.ones(LARGEST_BYTES, dtype="B")

    def ask(self, operation: int, payload: Any) -> Any:
        sizes = {ECHO: len(payload), FETCH: FETCHED_BYTES, TOUCHES: 8}
        answer = self._received[: sizes.get(operation, 0)]
        self._peer.Send([payload, self._mpi.BYTE], dest=0, tag=operation)
        self._peer.Recv([answer, self._mpi.BYTE], source=0)
        return answer

    def touch_many(self, count: int) -> None:
        sent = [self._peer.Isend([b"", self._mpi.BYTE], dest=0, tag=TOUCH) for _ in range(count)]
        for _ in range(count):
            self._peer.Recv([self._received[:0], self._mpi.BYTE], source=0)
        self._mpi.Request.Waitall(sent)

    def close(self) -> None:
        self._peer.Send([b"", self._mpi.BYTE], dest=0, tag=END)
        self._peer.Disconnect()


def serve(mpi: ModuleType) -> None:
    """Answer the process that spawned this one until it has enough."""
    parent, server, status = mpi.Comm.Get_parent(), Server(), mpi.Status()
    import numpy

    buffer = numpy.ones(LARGEST_BYTES, dtype="B")
    while True:
        parent.Recv([buffer, mpi.BYTE], source=0, status=status)
        if (operation := status.Get_tag()) == END:
            break
        answer = server.answer(operation, buffer[: status.Get_count(mpi.BYTE)])
        parent.Send([answer, mpi.BYTE], dest=0)
    parent.Disconnect()


class MpiFloor(BytesFloor):
    """Worker 0 spawns the other process; the library waits by polling."""

    name = "mpi"
    package = "mpi4py.MPI"
    installed_as = "mpi4py mpich"

    def wire(self, address: str) -> MpiWire:
        return MpiWire(self.module)


if __name__ == "__main__":
    serve(importlib.import_module("mpi4py.MPI"))
