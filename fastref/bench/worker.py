"""One measured process: it answers the requests of the process that started it."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fastref.bench.backends import BACKENDS
from fastref.bench.contract import Measurements
from fastref.bench.timing import Effort
from fastref.errors import FastrefError

__all__ = ["Join", "Leave", "Load", "Measure", "serve"]


@dataclass(frozen=True)
class Load:
    """Import the backend."""

    backend: str


@dataclass(frozen=True)
class Join:
    """Enter the group."""

    rank: int
    world_size: int
    address: str


@dataclass(frozen=True)
class Measure:
    """Run one measurement."""

    what: str
    effort: Effort


@dataclass(frozen=True)
class Leave:
    """Leave the group and end."""


class Worker:
    """Performs requests, in the order load, join, measure ..., leave."""

    def __init__(self) -> None:
        self._backend_name = ""
        self._measurements: Measurements | None = None

    def perform(self, request: object) -> Any:
        """Do what is asked and return the result."""
        match request:
            case Load(backend):
                BACKENDS[backend].load()
                self._backend_name = backend
                return None
            case Join(rank, world_size, address):
                self._measurements = BACKENDS[self._backend_name].join(rank, world_size, address)
                return None
            case Measure(what, effort):
                return getattr(self._measurements, what)(effort)
            case Leave():
                BACKENDS[self._backend_name].leave()
                return None
        raise FastrefError(f"a measured worker was asked for {request!r}")


def serve(requests: Connection) -> None:
    """Answer ``("done", result)`` or ``("failed", traceback)`` to each request until one is ``Leave``.

    Ends the process when the starter hangs up.
    """
    requests.send(("done", None))
    worker = Worker()
    while True:
        try:
            request = requests.recv()
        except EOFError:
            os._exit(1)  # the starter is gone, and with it the reason to leave in order
        try:
            answer = ("done", worker.perform(request))
        except Exception:
            answer = ("failed", traceback.format_exc())
        requests.send(answer)
        if isinstance(request, Leave):
            return
