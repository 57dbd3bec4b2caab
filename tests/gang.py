"""A program for torchrun: its workers lose the last of them in their first life, and do their work in the second.

Usage: ``torchrun ... -m tests.gang DIRECTORY [stay]``. The last worker of the first life leaves a child behind, of
which torchrun knows nothing, and which comes to join when the others do so in their second. What all of them are told
stands in the directory. The others end when they hear of the death, or stay until torchrun ends them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

import fastref.rpc as rpc
from fastref.errors import RendezvousError, WorkerDied
from tests.puppets import Cell
from tests.watchdog import arm

PATIENCE_S = 60.0
LEFTOVER_S = 1.0


def main() -> None:
    """Be one worker of one life."""
    arm()
    torch.set_num_threads(1)
    directory, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        (directory / f"born-{rank}").touch(exist_ok=False)
    except FileExistsError:
        live(directory, rank, size)
    else:
        die(directory, rank, size)


def die(directory: Path, rank: int, size: int) -> None:
    """Hold a value of everybody, and be killed, or hear of it."""
    last = size - 1
    if rank == last and os.fork() == 0:
        stay_behind(directory, rank)
    join(rank)
    held = [rpc.remote(f"w{other}", Cell, (rank,)) for other in range(size)]
    assert [rref.rpc_sync().get() for rref in held] == [rank] * size
    (directory / f"holding-{rank}").touch()
    if rank == last:
        await_files(directory, "holding-*", size)
        os.kill(os.getpid(), signal.SIGKILL)
    if "stay" not in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may hear of the death, and end all others, sooner
    try:
        rpc.rpc_sync(f"w{last}", time.sleep, (PATIENCE_S,))
    except WorkerDied:
        if "stay" not in sys.argv:
            raise
        time.sleep(PATIENCE_S)


def stay_behind(directory: Path, rank: int) -> NoReturn:
    """Try to take the place of a worker of the second life, which comes later."""
    os.setsid()
    told = "it got in"
    try:
        await_files(directory, "returned-0", 1)
        join(rank, LEFTOVER_S)
    except RendezvousError as error:
        told = str(error)
    except BaseException as error:
        told = repr(error)
    finally:
        (directory / "unfinished").write_text(told)
        (directory / "unfinished").rename(directory / "leftover")
        os._exit(0)


def live(directory: Path, rank: int, size: int) -> None:
    """Hold a value of everybody, say so, and leave."""
    (directory / f"returned-{rank}").touch()
    if rank == size - 1:
        await_files(directory, "leftover", 1)
    join(rank)
    held = [rpc.remote(f"w{other}", Cell, (rank,)) for other in range(size)]
    got = [rref.rpc_sync().get() for rref in held]
    (directory / f"got-{rank}").write_text(f"{got} in start {os.environ['TORCHELASTIC_RESTART_COUNT']}")
    rpc.shutdown()


def join(rank: int, timeout_s: float = PATIENCE_S) -> None:
    """Join as whom torchrun says."""
    rpc.init_rpc(f"w{rank}", rpc_backend_options=rpc.RpcBackendOptions(timeout_s))


def await_files(directory: Path, pattern: str, count: int) -> None:
    """Wait until so many files have come."""
    deadline = time.monotonic() + PATIENCE_S
    while len(list(directory.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {count} files {pattern}: {sorted(os.listdir(directory))}"
        time.sleep(0.02)


if __name__ == "__main__":
    main()
