"""What an init method says: which job it is, which rank this is, and where the workers meet."""

from __future__ import annotations

import contextlib
import operator
import os
import socket
import time
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlparse, urlunparse

from fastref.errors import RendezvousError, UsageError
from fastref.rendezvous.launchers import launch_settings, run_id, uses_slurm
from fastref.rendezvous.ways import forced_transport

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "LOCAL",
    "check_numbers",
    "claimed_numbers",
    "is_open",
    "job_name",
    "store_host",
    "open_store",
    "plain_number",
    "resolve_member_rank",
    "resolve_rank",
    "scheme_of",
]

LOCAL = "local"
# Waiting for ever is allowed, and a store wants a number.
_LONGEST_STORE_TIMEOUT_S = 7 * 86400.0
# It is only asked what is wrong, and says so at once.
_STORE_SAYS_NO_S = 1.0


def scheme_of(init_method: str) -> str:
    """Return the part before ``://``.

    Raises
    ------
    UsageError
        It is no init method at all, or a local job without a name.
    """
    scheme, separator, rest = init_method.partition("://")
    if not separator or not scheme:
        raise UsageError(
            f"init_method must look like local://NAME, env://, tcp://HOST:PORT or file:///PATH, it is {init_method!r}"
        )
    if scheme == LOCAL and not rest:
        raise UsageError("local:// needs the name of the job: local://NAME")
    return scheme


def job_name(init_method: str) -> str:
    """Return a name for the job that is the same for all of its workers."""
    scheme = scheme_of(init_method)
    if scheme == LOCAL:
        return init_method.partition("://")[2]
    place = init_method.partition("?")[0]
    if scheme == "env":
        settings = launch_settings()
        place = f"env://{settings['MASTER_ADDR']}:{settings['MASTER_PORT']}"
    return f"{place}#{run_id()}" if run_id() else place


def check_numbers(rank: Any, world_size: Any) -> None:
    """Raise ``UsageError`` when a rank or a world size is not even an integer."""
    for what, number in (("rank", rank), ("world_size", world_size)):
        is_left_out = number is None and what == "world_size"  # a rank is left out by -1
        if not is_left_out and (isinstance(number, bool) or not isinstance(number, int)):
            raise UsageError(f"{what} is an integer, got {number!r}")


def plain_number(number: Any) -> Any:
    """Return an integer of another library, such as numpy, as an ``int``, and all else as it is."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        return number
    return operator.index(number)


def claimed_numbers(init_method: str, rank: Any, world_size: Any) -> tuple[int | None, int | None]:
    """Return what can be made of rank and world size where ``resolve_rank`` may raise; None for what cannot be."""
    settings = _settings(init_method)
    numbers = []
    for name, number, least in (("rank", rank, 0), ("world_size", world_size, 1)):
        if number is None or (name == "rank" and number == -1):
            text = settings[name] if settings.get(name, "").isdecimal() else "-1"
            number = int(text)
        usable = isinstance(number, int) and not isinstance(number, bool) and number >= least
        numbers.append(number if usable else None)
    return numbers[0], numbers[1]


def resolve_rank(init_method: str, rank: int = -1, world_size: int | None = None) -> tuple[int, int]:
    """Return rank and world size, from the arguments or from where the init method has them.

    ``local://`` and ``env://`` read ``RANK`` and ``WORLD_SIZE`` for what is missing, ``tcp://`` and
    ``file://`` their query (``?rank=0&world_size=2``). The rank is -1 where a c10d method has none:
    torch says so in its own words.

    Raises
    ------
    UsageError
        The rank of a local job is missing, a rank is negative, or the world size is missing.
    """
    check_numbers(rank, world_size)
    scheme = scheme_of(init_method)
    settings = _settings(init_method)
    if rank == -1:
        rank = _integer("rank", settings.get("rank") or "-1")
    if not world_size:
        world_size = _integer("world_size", settings.get("world_size") or "0")
    if rank < -1 or (rank == -1 and scheme == LOCAL):
        raise UsageError(f"{init_method} needs a rank of 0 or more: pass rank= to init_rpc or set RANK; got {rank}")
    if world_size == 0:
        raise UsageError(
            "world_size is missing: pass 1 or more, or, for a group that workers join and leave, None to init_rpc"
        )
    if world_size < 0:
        raise UsageError(f"world_size must be 1 or more, it is {world_size}")
    return rank, world_size


def is_open(init_method: str, world_size: int | None) -> bool:
    """Return whether a group has no fixed size: no world size is given, neither here nor by the init method."""
    return world_size is None and not _settings(init_method).get("world_size")


def resolve_member_rank(init_method: str, rank: int = -1, *, has_store: bool = False) -> int:
    """Return the rank of a worker of a group without a fixed size, as ``resolve_rank`` does.

    Those who are given a store meet over it: then it does not matter what else the init method lacks.

    Raises
    ------
    UsageError
        The rank of a local job is missing, or it is negative; the method names another host.
    ValueError
        Torch's own, where a c10d method lacks its rank, host or port.
    """
    check_numbers(rank, None)
    if rank == -1:
        rank = _integer("rank", _settings(init_method).get("rank") or "-1")
    scheme = scheme_of(init_method)
    host = None if has_store else _host_of(init_method)
    if (rank == -1 and scheme != LOCAL) or host == "":
        open_store(init_method, rank, -1, _STORE_SAYS_NO_S)
    if rank < 0:
        raise UsageError(f"{init_method} needs a rank of 0 or more: pass rank= to init_rpc or set RANK; got {rank}")
    if host is not None and not _is_this_host(host):
        raise UsageError(
            f"{host!r} of {init_method} is not this host: workers of a group of open size are on one host so far; "
            "those of a job, to whom init_rpc is told a world_size, may be on several"
        )
    if forced_transport() == "tcp":
        raise UsageError(
            "FASTREF_TRANSPORT=tcp: workers of a group of open size (no world_size) use shared memory so far"
        )
    return rank


def _host_of(init_method: str) -> str | None:
    """Return where the store of an init method listens; "": that is missing; None: it has no such place."""
    scheme = scheme_of(init_method)
    if scheme == "env":
        settings = launch_settings()
        return settings["MASTER_ADDR"] if settings["MASTER_PORT"] else ""
    return urlparse(init_method).hostname or "" if scheme == "tcp" else None


def store_host(init_method: str, store: Store | None = None) -> str | None:
    """Return where the store of a job listens, None where that is not known."""
    if store is None:
        return _host_of(init_method) or None
    while store is not None and not isinstance(getattr(store, "host", None), str):
        store = getattr(store, "underlying_store", None)
    return getattr(store, "host", None)


def _is_this_host(host: str) -> bool:
    """Return whether a name or an address is one of this host's: only then a socket can have it."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def open_store(init_method: str, rank: int, world_size: int, timeout_s: float) -> Store:
    """Return the c10d store that torch's own rendezvous finds for an init method.

    Raises
    ------
    RendezvousError
        It cannot be reached or made.
    ValueError
        Torch's own: the init method lacks rank, port, path or environment variables.
    """
    from torch.distributed.rendezvous import rendezvous

    if scheme_of(init_method) == "env" and uses_slurm():
        place = launch_settings()  # torch's own env:// does not know Slurm
        init_method = f"tcp://{place['MASTER_ADDR']}:{place['MASTER_PORT']}"
    scheme = scheme_of(init_method)
    timeout = timedelta(seconds=min(timeout_s, _LONGEST_STORE_TIMEOUT_S))
    parts = urlparse(init_method)
    if scheme == "file" and parts.path:
        _wait_for_directory_of(Path(parts.path), init_method, timeout_s)
    settings = {key: value for key, value in parse_qsl(parts.query) if key not in ("rank", "world_size")}
    if rank >= 0:
        settings["rank"] = str(rank)
    # With the true size a TCP store waits for that many clients, and says neither who is missing nor
    # what else is wrong; without one it is there at once, and the workers seat each other.
    settings["world_size"] = "-1" if scheme in ("env", "tcp") else str(world_size)
    store: Store
    try:
        store, _, _ = next(rendezvous(urlunparse(parts._replace(query=urlencode(settings))), timeout=timeout))
        store.set_timeout(timeout)
    except RuntimeError as error:
        raise RendezvousError(f"rank {rank} found no c10d store by {init_method}: {error}") from error
    return store


def _wait_for_directory_of(file: Path, init_method: str, timeout_s: float) -> None:
    """Wait for the directory, which another worker may be about to make.

    Left to itself a c10d store waits for minutes, deaf to Ctrl-C.
    """
    deadline = time.monotonic() + timeout_s
    while not file.parent.is_dir():
        if time.monotonic() > deadline:
            raise RendezvousError(f"{init_method}: there is no directory {file.parent}")
        time.sleep(0.01)


def _settings(init_method: str) -> dict[str, str]:
    """Return the texts from which rank and world size are read where the arguments lack them."""
    scheme = scheme_of(init_method)
    if scheme == LOCAL:
        return {"rank": os.environ.get("RANK", ""), "world_size": os.environ.get("WORLD_SIZE", "")}
    if scheme == "env":
        settings = launch_settings()
        return {"rank": settings["RANK"], "world_size": settings["WORLD_SIZE"]}
    return dict(parse_qsl(urlparse(init_method).query))


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} must be an integer, it is {text!r}") from None
