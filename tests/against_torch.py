"""Run the jobs of ``tests.differences`` on torch, where all have to fail: ``python -m tests.against_torch [NAME ...]``.

A job fails by an error, or by not coming to its end. The table says which, and where.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

__all__ = ["main"]

PATIENCE_S = 20  # what takes longer does not end, or only after a minute that torch gives every call
WIDTH = 300  # characters of an error that are shown


def main() -> int:
    """Run all jobs, or those that the command line names; 1 when one does not fail."""
    jobs = _jobs()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.differences", __name__])
    same = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or jobs.DIFFERENCES:
            how = _outcome(name, Path(scratch) / name)
            print(f"{name.replace('_', ' ')}\n    torch: {how or 'does so too'}", flush=True)
            if how is None:
                same.append(name)
    print(f"torch does as fastref: {', '.join(same)}" if same else "torch fails them all")
    return 1 if same else 0


def _jobs() -> Any:
    """Import the jobs, with torch under them."""
    from tests.differences import MODULE_VARIABLE

    os.environ[MODULE_VARIABLE] = "torch.distributed.rpc"  # for the forkserver, and so for the workers
    return importlib.import_module("tests.differences")


def _attempt(name: str, rank: int, meeting: str) -> None:
    """Be a worker, and leave in files what went wrong and where it was when time was up."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # torch tells of its own errors there, at length
    with open(f"{meeting}.stacks{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(PATIENCE_S - 2, file=stacks)
        try:
            importlib.import_module("tests.differences").work(name, rank, meeting)
        except BaseException as error:
            text = " ".join("".join(traceback.format_exception_only(error)).split())
            Path(f"{meeting}.error{rank}").write_text(f"w{rank}, {_place(error)}: {text}"[:WIDTH])
            os._exit(1)


def _place(error: BaseException) -> str:
    """Return the last line of the jobs that an error came through."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith("differences.py")]
    return f"line {lines[-1].lineno}" if lines else "before the job"


def _outcome(name: str, meeting: Path) -> str | None:
    """Return how a job failed, None when it did not."""
    jobs = _jobs()
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=_attempt, args=(name, rank, str(meeting))) for rank in range(jobs.MEMBERS)]
    for worker in workers:
        worker.start()
    telling = workers if name in jobs.WHOLE else workers[:1]  # w1 only serves, and may be killed
    deadline = time.monotonic() + PATIENCE_S
    for worker in telling:
        worker.join(max(deadline - time.monotonic(), 0))
    codes = [worker.exitcode for worker in telling]
    for worker in workers:
        worker.kill()
        worker.join()
    errors = sorted(meeting.parent.glob(f"{name}.error*"))
    if errors:
        return errors[0].read_text()
    if None in codes:
        stacks = Path(f"{meeting}.stacks{codes.index(None)}").read_text()
        places = re.findall(r'differences.py", line (\d+) in (\w+)', stacks.rpartition("Current thread")[2] or stacks)
        return f"not over after {PATIENCE_S} s: " + ", ".join(f"{what}, line {line}" for line, what in places[:2])
    return f"exit codes {codes}" if any(codes) else None


if __name__ == "__main__":
    sys.exit(main())
