"""What a program may set: worker names, timeouts, sizes, and their defaults."""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex

from fastref.errors import UsageError

__all__ = [
    "WorkerInfo",
    "RpcBackendOptions",
    "TlsFiles",
    "DEFAULT_RPC_TIMEOUT_SEC",
    "UNSET_RPC_TIMEOUT",
    "check_worker_name",
]

DEFAULT_RPC_TIMEOUT_SEC: float = 60.0
DEFAULT_INIT_METHOD = "env://"
STRICT_VARIABLE = "FASTREF_STRICT"
ARENA_LIMIT_VARIABLE = "FASTREF_ARENA_LIMIT"
INIT_METHOD_VARIABLE = "FASTREF_INIT_METHOD"  # set by fastref.spawn in its children
DEFAULT_NUM_WORKER_THREADS = 16
UNSET_RPC_TIMEOUT: float = -1.0

_AS_TORCH = "__init__(): incompatible constructor arguments: "  # how torch's begin, and what programs look for
_NAME = re.compile(r"[A-Za-z0-9-_:]*")
_SIZE = re.compile(r"([0-9]{1,18})([KMG]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class WorkerInfo:
    """Name and rank of one worker.

    Parameters
    ----------
    name : str
        Unique in the job.
    id : int
        The rank, 0 <= id < world_size.

    Raises
    ------
    TypeError
        When the name is no string or the rank no integer.
    UsageError
        When no worker may be called so.
    """

    name: str
    id: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.id, SupportsIndex):
            raise TypeError(f"{_AS_TORCH}WorkerInfo(name: str, id: int), got {self.name!r}, {self.id!r}")
        check_worker_name(self.name)
        object.__setattr__(self, "id", operator.index(self.id))

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"WorkerInfo(id={self.id}, name={self.name})"


def check_worker_name(name: str) -> str:
    """Return ``name`` if a worker may be called so.

    Raises
    ------
    UsageError
        With torch's text, when the name is empty, too long or has other characters.
    """
    if not isinstance(name, str) or not name or len(name) >= 128 or not _NAME.fullmatch(name):
        raise UsageError(
            "Worker name must match ^[A-Za-z0-9-_:]*$, and must be non-empty and shorter than 128 chars, "
            f"but got {name!r}"
        )
    return name


@dataclass(frozen=True)
class TlsFiles:
    """The files, in PEM, by which workers encrypt what goes between hosts and know each other.

    Parameters
    ----------
    certificate : str or path
        This worker's certificate, with those between it and the authority behind it. It must be good for clients and
        for servers, since a worker is both. Its names do not count: workers are known by address.
    key : str or path
        The private key of the certificate, without a passphrase.
    authority : str or path
        The certificates of the job's own authority. Whoever has a certificate of it is taken for a worker, so it must
        not be one that the whole company, let alone the world, has certificates of.

    Raises
    ------
    TypeError
        When one is no path.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    authority: str | os.PathLike[str]

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "authority"):
            object.__setattr__(self, name, os.fsdecode(getattr(self, name)))


class RpcBackendOptions:
    """How a worker joins and behaves.

    Parameters
    ----------
    rpc_timeout : float
        Seconds that a call may take by default; 0: for ever.
    init_method : str, optional
        Where the workers meet: ``env://``, ``tcp://HOST:PORT``, ``file:///PATH`` or, on one host and without any port,
        ``local://NAME``. By default what ``fastref.spawn`` chose for its group, else ``env://``.
    num_worker_threads : int
        How many functions may run at once here without being blocked in fastref.
    table_bits : int
        How many ranks have a bit in this worker's reference table, 0 to 61; the others go by messages.
    table_capacity : int
        References that others may hold on values of this worker at once, a multiple of 64.
    arena_limit : int or None
        Bytes of shared memory that this worker may use for payloads. None: what ``FASTREF_ARENA_LIMIT`` in the
        environment says, as ``500M`` (K, M, G: powers of 1024), else half of the memory that is available when it
        starts, at most 256 GiB. What cannot be had when it is needed, on the host or in a control group, is a
        ResourceError.
    switch_interval : float or None
        Seconds for ``sys.setswitchinterval``; None leaves it alone. A busy owner answers after up to this long; the
        interpreter's default is 5 ms.
    token : str, optional
        The secret that all workers of the job share, at least 16 characters. None: what ``FASTREF_TOKEN`` in the
        environment says, else the file that ``FASTREF_TOKEN_FILE`` names. Without one no other host is let in.
    tls : TlsFiles, optional
        Encrypt what goes over TCP. All workers of a job do, or none.
    address : str, optional
        Where workers of other hosts reach this one: an address or name of this host, or the name of one of its network
        interfaces. None: what ``FASTREF_ADDRESS``, ``FASTREF_INTERFACE`` or torch's ``TP_SOCKET_IFNAME`` in the
        environment says, else the address from which the store is reached.
    peer_timeout : float
        Seconds after which a worker of another host of which nothing is heard, not even a sign of life, counts as dead.
        A connection that breaks before that is made again meanwhile.
    strict : bool, optional
        Take registered callables, plain data and tensors from other workers, and never a pickle; see
        ``fastref.rpc.register``. All workers of a job do, or none. None: what ``FASTREF_STRICT`` in the environment
        says, 1 or 0, else False.

    Raises
    ------
    TypeError
        When ``rpc_timeout`` or ``num_worker_threads`` is no number, ``init_method``, ``token`` or ``address`` no
        string, or ``tls`` no ``TlsFiles``.
    UsageError
        When a value is out of range.
    """

    runtime_type: type | None = None  # of a worker with these options; None: the ordinary one

    def __init__(
        self,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str | None = None,
        *,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        table_bits: int = 61,
        table_capacity: int = 1 << 18,
        arena_limit: int | None = None,
        switch_interval: float | None = None,
        token: str | None = None,
        tls: TlsFiles | None = None,
        address: str | None = None,
        peer_timeout: float = 15.0,
        strict: bool | None = None,
    ) -> None:
        self.rpc_timeout = rpc_timeout
        if init_method is None:
            init_method = os.environ.get(INIT_METHOD_VARIABLE, DEFAULT_INIT_METHOD)
        if not isinstance(init_method, str):
            raise TypeError(f"{_AS_TORCH}init_method is a string such as env://, got {init_method!r}")
        if not isinstance(num_worker_threads, SupportsIndex):
            raise TypeError(f"{_AS_TORCH}num_worker_threads is a number, got {num_worker_threads!r}")
        if operator.index(num_worker_threads) < 1:
            raise UsageError(f"num_worker_threads is at least 1, got {num_worker_threads!r}")
        if not 0 <= table_bits <= 61:
            raise UsageError(f"table_bits is 0 to 61, got {table_bits!r}")
        if table_capacity < 64 or table_capacity % 64 or table_capacity > 1 << 24:
            raise UsageError(f"table_capacity is a multiple of 64 up to 2**24, got {table_capacity!r}")
        if arena_limit is None:
            arena_limit = _size_in_environment(ARENA_LIMIT_VARIABLE)
        if arena_limit is not None and arena_limit < 0:
            raise UsageError(f"arena_limit is a number of bytes, got {arena_limit!r}")
        if not peer_timeout > 0:
            raise UsageError(f"peer_timeout is a number of seconds, got {peer_timeout!r}")
        if token is not None and not isinstance(token, str):  # and do not show it
            raise TypeError(f"{_AS_TORCH}token is a string, got a {type(token).__name__}")
        if tls is not None and not isinstance(tls, TlsFiles):
            raise TypeError(f"{_AS_TORCH}tls is a TlsFiles, got {tls!r}")
        if address is not None and not isinstance(address, str):
            raise TypeError(f"{_AS_TORCH}address is a string, got {address!r}")
        self.init_method = init_method
        self.num_worker_threads = operator.index(num_worker_threads)
        self.table_bits = table_bits
        self.table_capacity = table_capacity
        self.arena_limit = arena_limit
        self.switch_interval = switch_interval
        self.token = token
        self.tls = tls
        self.address = address
        self.peer_timeout = float(peer_timeout)
        self.strict = _flag_in_environment(STRICT_VARIABLE) if strict is None else bool(strict)

    def __repr__(self) -> str:
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        shown = {"rpc_timeout": self.rpc_timeout, **kept, "token": "..." if self.token is not None else None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def rpc_timeout(self) -> float:
        """Seconds that a call may take by default. What is no such number cannot be set later either."""
        return self._timeout_s

    @rpc_timeout.setter
    def rpc_timeout(self, seconds: float) -> None:
        self._timeout_s = _seconds(seconds)


def _seconds(rpc_timeout: object) -> float:
    """Return the seconds that a program means by whatever torch takes for a number: of numpy, or a tensor, too."""
    if not isinstance(rpc_timeout, SupportsFloat | SupportsIndex):
        raise TypeError(f"{_AS_TORCH}rpc_timeout is a number of seconds, got {rpc_timeout!r}")
    timeout_s = float(rpc_timeout)
    if not timeout_s >= 0:  # what is not a number is none of seconds either
        raise UsageError(f"rpc_timeout is a number of seconds, 0 for ever, got {rpc_timeout!r}")
    return timeout_s


def _flag_in_environment(variable: str) -> bool:
    text = os.environ.get(variable, "").strip()
    if text not in ("", "0", "1"):
        raise UsageError(f"{variable} is 1 or 0, got {text!r}")
    return text == "1"


def _size_in_environment(variable: str) -> int | None:
    """Return the number of bytes that a variable of the environment says; None where it is not set."""
    text = os.environ.get(variable)
    if not text:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{variable} is a number of bytes such as 500M or 2G, got {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]
