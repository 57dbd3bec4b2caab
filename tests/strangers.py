"""Those who come to a worker's door and are no workers: many a second, of all kinds, from one process."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fastref.errors import IdentityError
from fastref.identity import Handshake, mint
from fastref.identity.handshake import PREFIX
from fastref.rendezvous.stream import parse_endpoint
from tests.pieces import FRAME_MAGIC, frame, head

__all__ = ["KINDS", "knock"]

# Who is not sent away goes by himself after so long.
STAY_S = 1.0
TICK_S = 0.002


class Tripwire:
    """Whoever unpickles this makes a directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def _behind_length(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _frame(data: bytes) -> bytes:
    return frame(1, data)


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "HTTP": lambda bomb: b"GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n",
    "TLS": lambda bomb: bytes.fromhex("160301020001 0001fc0303".replace(" ", "")) + os.urandom(506),
    # What nmap's service detection tries: generic lines, RTSP, RPC, DNS, SMB, an LDAP bind, X11, Kerberos.
    "probe": lambda bomb: random.choice(
        [
            b"\r\n\r\n",
            b"HELP\r\n",
            b"OPTIONS / RTSP/1.0\r\n\r\n",
            bytes.fromhex("80000028 72fe1d13 00000000 00000002 000186a0 0001977c".replace(" ", "")) + bytes(20),
            bytes.fromhex("001e0006 01000001 00000000 00000776 65727369 6f6e0462 696e6400 00100003".replace(" ", "")),
            bytes.fromhex("000000a4ff534d4272000000000801400000000000000000000000000000400600000100"),
            bytes.fromhex("300c020101600702010204008000"),
            bytes.fromhex("6c000b000000000000000000"),
        ]
    ),
    "random": lambda bomb: os.urandom(random.randrange(1, 1 << 16)),
    "pickle": lambda bomb: bomb,
    "pickle behind a length": _behind_length,
    "pickle in a frame": _frame,
    "a claim of 4 GiB": lambda bomb: b"\xff\xff\xff\xff" + bomb,
    "a claim of 2**55": lambda bomb: head(FRAME_MAGIC << 56 | 1 << 55, 1, 0, 0, 6, 0, bomb[:6]) + bomb,
    "a hello and a pickle": lambda bomb: _hello() + PREFIX.pack(b"\xf5frh", 1, 3, 40) + bomb,
    "half a hello": lambda bomb: _hello()[: random.randrange(1, 72)],
    "nothing": lambda bomb: b"",
}
"""What is said at the door; beside these there are those who say nothing and go, reset, or have another token."""


def _hello() -> bytes:
    return _proof().to_send()


def _proof() -> Handshake:
    return Handshake(mint(), asks=True, job="job", epoch=0, version="tcp 1")


class _Stranger:
    def __init__(self, sock: socket.socket, said: bytes, proof: Handshake | None) -> None:
        self.socket, self.said, self.proof = sock, said, proof
        self.deadline_s = time.monotonic() + STAY_S

    def go_on(self) -> bool:
        """Say and hear what there is; False at the end."""
        with contextlib.suppress(BlockingIOError):
            if self.said:
                self.said = self.said[self.socket.send(self.said) :]
            while data := self.socket.recv(
                self.proof.wants if self.proof is not None and self.proof.wants else 1 << 16
            ):
                if self.proof is None:
                    continue
                self.proof.feed(data)  # what a worker says is small enough to come in one piece
                if proof := self.proof.to_send():
                    self.socket.sendall(proof)
            return False
        return True


def _comers(bomb: bytes) -> Iterator[tuple[str, bytes, Handshake | None]]:
    for kind in itertools.cycle([*KINDS, "a wrong token", "gone at once", "reset at once"]):
        proof = _proof() if kind == "a wrong token" else None
        yield kind, proof.to_send() if proof is not None else KINDS.get(kind, lambda bomb: b"")(bomb), proof


def knock(endpoint: str, rate_hz: float, seconds: float, tripwire: str) -> Counter[str]:
    """Come to a door so many times a second; return how often, by kind, and how many were let in, stayed or came late.

    Parameters
    ----------
    endpoint : str
        ``address:port``.
    rate_hz, seconds : float
    tripwire : str
        A directory that whoever unpickles what is said makes.
    """
    target, bomb = parse_endpoint(endpoint), pickle.dumps(Tripwire(tripwire), 5)
    outcomes: Counter[str] = Counter()
    selector = selectors.DefaultSelector()
    comers = _comers(bomb)
    started = time.monotonic()
    come = 0
    while (now := time.monotonic()) < started + seconds or selector.get_map():
        if now < started + seconds:
            due = int((now - started) * rate_hz) + 1
            while come < due:
                come += 1
                kind, said, proof = next(comers)
                outcomes[kind] += 1
                sock = socket.socket()
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(target)
                if kind == "reset at once":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if kind in ("gone at once", "reset at once"):
                    sock.close()
                else:
                    selector.register(sock, selectors.EVENT_READ, _Stranger(sock, said, proof))
        ready = [key.data for key, _ in selector.select(TICK_S)]
        waiting = [key.data for key in selector.get_map().values()]
        for stranger in {*ready, *(one for one in waiting if one.said)}:
            try:
                goes_on = stranger.go_on()
            except (ConnectionError, IdentityError):
                goes_on = False
            if not goes_on:
                outcomes["let in"] += stranger.proof is not None and stranger.proof.done
                stranger.deadline_s = 0.0
        for stranger in waiting:
            if time.monotonic() >= stranger.deadline_s:
                outcomes["stayed"] += stranger.deadline_s > 0
                selector.unregister(stranger.socket)
                stranger.socket.close()
    selector.close()
    outcomes["come"], outcomes["late"] = come, max(0, int(seconds * rate_hz) - come)
    return outcomes
