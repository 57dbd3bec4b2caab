"""Start a local group of worker processes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from torch.multiprocessing.spawn import start_processes

from fastref.errors import UsageError
from fastref.identity import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, mint
from fastref.options import INIT_METHOD_VARIABLE

__all__ = ["spawn"]


def spawn(fn: Callable[..., Any], nprocs: int = 1, args: Sequence[Any] = (), start_method: str = "spawn") -> None:
    """Run ``fn(rank, *args)`` in ``nprocs`` processes of this host and wait for them.

    In each of them ``RANK`` and ``WORLD_SIZE`` are set, and ``init_rpc(name)`` needs nothing else: by default the group
    meets under a ``local://`` name of its own, without opening a port. ``FASTREF_TOKEN`` is a new token for this group,
    unless the environment here has one, or ``FASTREF_TOKEN_FILE``.

    Parameters
    ----------
    fn : callable
        Found by name in the children.
    nprocs : int
        At least 1.
    args : sequence
        Pickled for each child.
    start_method : str
        "spawn" or "forkserver". A child made by "fork" would share what its parent holds.

    Raises
    ------
    torch.multiprocessing.ProcessRaisedException
        When a child raises, with its traceback; the others are ended.
    torch.multiprocessing.ProcessExitedException
        When a child ends otherwise; the others are ended.
    """
    if nprocs < 1:
        raise UsageError(f"a group has at least 1 process, got {nprocs}")
    if start_method not in ("spawn", "forkserver"):
        raise UsageError(f"start_method is 'spawn' or 'forkserver', got {start_method!r}")
    job = f"local://spawn-{os.getpid()}-{secrets.token_hex(4)}"
    # Said to each child: one that a forkserver starts has the environment in which that server was started.
    given = {name: os.environ[name] for name in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE) if os.environ.get(name)}
    environment = {"WORLD_SIZE": str(nprocs), INIT_METHOD_VARIABLE: job, **(given or {TOKEN_VARIABLE: mint().text()})}
    start_processes(_enter, (fn, environment, tuple(args)), nprocs, start_method=start_method)


def _enter(rank: int, fn: Callable[..., Any], environment: dict[str, str], args: tuple) -> None:
    os.environ.update({"RANK": str(rank), **environment})
    fn(rank, *args)
