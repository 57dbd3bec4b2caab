"""What a program may set: worker names, timeouts, sizes, and their defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastref.errors import UsageError

__all__ = ["WorkerInfo", "RpcBackendOptions", "DEFAULT_RPC_TIMEOUT_SEC", "UNSET_RPC_TIMEOUT", "check_worker_name"]

DEFAULT_RPC_TIMEOUT_SEC: float = 60.0
DEFAULT_INIT_METHOD = "env://"
DEFAULT_NUM_WORKER_THREADS = 16
UNSET_RPC_TIMEOUT: float = -1.0

_NAME = re.compile(r"[A-Za-z0-9-_:]*")


@dataclass(frozen=True)
class WorkerInfo:
    """Name and rank of one worker.

    Parameters
    ----------
    name : str
        Unique in the job.
    id : int
        The rank, 0 <= id < world_size.
    """

    name: str
    id: int

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
            f"Worker name must match ^[A-Za-z0-9-_:]*$, and must be non-empty and shorter than 128 chars, but got {name!r}"
        )
    return name
