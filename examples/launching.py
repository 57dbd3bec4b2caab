"""What the examples have in common: choosing what carries the references, and starting and ending the workers."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing as mp

PACKAGES = {"fastref": "fastref", "torch": "torch.distributed"}
DEFAULT_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Backend:
    """What carries the references: the same four modules in either package."""

    name: str

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{PACKAGES[self.name]}.{name}")

    @property
    def rpc(self) -> ModuleType:
        """Calls and references."""
        return self._module("rpc")

    @property
    def autograd(self) -> ModuleType:
        """Gradients across workers."""
        return self._module("autograd")

    @property
    def optim(self) -> ModuleType:
        """``DistributedOptimizer``."""
        return self._module("optim")

    @property
    def nn(self) -> ModuleType:
        """``RemoteModule``."""
        return self._module("nn")


Lead = Callable[[Backend, Any], dict[str, Any]]


def _work(rank: int, lead: Lead, backend: Backend, directory: str, workers: Sequence[str], settings: Any) -> None:
    """Be one worker, from joining the job to leaving it. The first one leads, and leaves its result behind."""
    torch.set_num_threads(1)
    # What torch's own modules say of themselves when they start; it says nothing about this program.
    warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
    rpc = backend.rpc
    if backend.name == "fastref":
        options = rpc.RpcBackendOptions(init_method=f"local://{Path(directory).name}")
    else:
        options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/rendezvous")
    rpc.init_rpc(workers[rank], rank=rank, world_size=len(workers), rpc_backend_options=options)
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps(lead(backend, settings)))
    # Only after success: a graceful shutdown waits for all workers, and one that failed would not come.
    rpc.shutdown()


def launch(
    lead: Lead, workers: Sequence[str], backend: str, settings: Any, deadline_s: float = DEFAULT_DEADLINE_S
) -> dict[str, Any]:
    """Run one job in processes of its own, and return what its first worker returned.

    Parameters
    ----------
    lead : callable
        ``lead(backend, settings)`` runs on the first worker, while the others serve its calls. What it returns has to
        go through JSON.
    workers : sequence of str
        Their names.
    backend : str
        A key of ``PACKAGES``.
    settings : object
        Of the run; it can be pickled.
    deadline_s : float
        Seconds for everything, the start of the processes included.

    Raises
    ------
    torch.multiprocessing.ProcessRaisedException
        With the traceback of the worker that raised; the others have been ended.
    torch.multiprocessing.ProcessExitedException
        If a worker was killed or exited.
    TimeoutError
        If the job has not ended by the deadline; its processes have been killed.
    """
    with tempfile.TemporaryDirectory(prefix=f"example-{secrets.token_hex(4)}-") as directory:
        deadline = time.monotonic() + deadline_s
        context = mp.start_processes(
            _work,
            args=(lead, Backend(backend), directory, list(workers), settings),
            nprocs=len(workers),
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    for process in context.processes:
                        process.kill()
                    raise TimeoutError(f"the workers have not finished within {deadline_s:g} s")
        except mp.ProcessRaisedException as error:
            # At the end of the pipeline, torch's agent at times waits for an answer that does not come. The result is
            # there by then, and what is wrong is printed.
            if backend != "torch" or "Wait timeout" not in str(error) or not Path(directory, "result.json").exists():
                raise
            print(f"torch: the workers did not leave in order: {error}", file=sys.stderr)
        finally:
            # torch has read the traceback of a failed worker by now, and leaves its file to us.
            for error_file in context.error_files:
                Path(error_file).unlink(missing_ok=True)
        result: dict[str, Any] = json.loads(Path(directory, "result.json").read_text())
    return result


def launch_each(
    backends: Iterable[str],
    lead: Lead,
    workers: Sequence[str],
    settings: Any,
    deadline_s: float,
    preload: Sequence[str],
) -> list[dict[str, Any]]:
    """Run the same job over each backend; end the program with status 1 and the cause when one fails.

    Parameters
    ----------
    preload : sequence of str
        Modules that take long to import. The workers are forked from a process that has imported them.
    """
    mp.get_context("forkserver").set_forkserver_preload(["torch", *preload])
    results = []
    for backend in backends:
        try:
            results.append(launch(lead, workers, backend, settings, deadline_s))
        except (mp.ProcessRaisedException, mp.ProcessExitedException, TimeoutError) as error:
            sys.exit(f"{backend}: {error}")
    return results


def command_line(description: str | None, output: str) -> argparse.ArgumentParser:
    """Return a parser with what all examples can be told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backend", choices=PACKAGES, default="fastref", help="what carries the references")
    which.add_argument("--compare", action="store_true", help="run every backend and show them side by side")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEFAULT_DEADLINE_S,
        metavar="SECONDS",
        help="end a run that takes longer (default %(default)g)",
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="directory (default %(default)s)")
    return parser


def chosen_backends(options: argparse.Namespace) -> list[str]:
    """Return the backends that the command line asks for."""
    return list(PACKAGES) if options.compare else [options.backend]


def positive(text: str) -> int:
    """Return an argument that is a number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def table(names: Sequence[str], rows: Iterable[tuple[str, str, Sequence[float]]]) -> str:
    """Return results side by side, with the ratio of the first to the second if there are two.

    Parameters
    ----------
    names : sequence of str
        Of the columns.
    rows : iterable of (str, str, sequence of float)
        Title, format and a value for each column.
    """
    lines = [" " * 34 + "".join(f"{name:>12}" for name in names) + ("       ratio" if len(names) == 2 else "")]
    for title, form, values in rows:
        ratio = f"{values[0] / values[1]:>11.2f}x" if len(values) == 2 else ""
        lines.append(f"{title:<34}" + "".join(f"{form.format(value):>12}" for value in values) + ratio)
    return "\n".join([*lines, "", f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores"])
