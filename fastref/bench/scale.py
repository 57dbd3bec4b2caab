"""How a job grows: 2 to 64 workers on one host, every one calling every other, over fastref and over torch.

``python -m fastref.bench.scale --help``. What is taken: seconds from the word to join until the last has joined; calls
that fail of all to all; what a worker costs in memory, descriptors and threads; the CPU that one takes while nothing
happens; an empty call between two of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fastref.bench import costs
from fastref.bench.plot import COLORS
from fastref.errors import FastrefError, UsageError

__all__ = ["main", "measure", "plot", "render"]

PATIENCE_S = 180.0
IDLE_S = 3.0
CALLS = 200
COLUMNS = {
    "start": "start, s",
    "failed": "calls failed",
    "memory": "MiB a worker",
    "descriptors": "descriptors",
    "threads": "threads",
    "idle": "idle CPU, %",
    "call": "empty call, us",
}
CURVES = ["start", "memory", "descriptors", "idle", "call"]


def nothing() -> None:
    """Be called."""


def work(requests: Connection, backend: str, rank: int, world_size: int, address: str) -> None:
    """Be one worker: join, call everybody, rest, leave; each on demand."""
    rpc = _load(backend)
    gc.collect()  # what was forked and is touched sooner or later is this worker's own from here on
    requests.send(os.getpid())
    requests.recv()
    try:
        _join(rpc, backend, rank, world_size, address)
        requests.send("joined")
    except Exception as error:  # what a backend cannot do is a figure, not an end
        requests.send(f"{type(error).__name__}: {error}")
        os._exit(0)
    requests.recv()
    failed = 0
    for other in range(world_size):
        try:
            rpc.rpc_sync(f"w{other}", nothing, timeout=30)
        except Exception:
            failed += 1
    requests.send(failed)
    while (request := requests.recv()) != "leave":
        requests.send(_time_calls(rpc, f"w{request}"))
    rpc.shutdown(graceful=False)
    requests.send("left")
    os._exit(0)  # torch may not come to an end by itself


def measure(backend: str, world_size: int) -> dict[str, Any]:
    """Return the figures of one job, by the keys of ``COLUMNS``; ``error`` if it did not come together.

    Raises
    ------
    FastrefError
        When a worker does not answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastref.rpc", "torch.distributed.rpc"])
    with tempfile.TemporaryDirectory() as directory:
        address = f"file://{directory}/meeting"
        pipes, processes = [], []
        try:
            for rank in range(world_size):
                mine, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, backend, rank, world_size, address), daemon=True)
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
            return _figures(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _figures(pipes: Sequence[Connection]) -> dict[str, Any]:
    pids = _answers(pipes)
    before = [costs.memory_bytes(pid) for pid in pids]
    began = time.perf_counter()
    answers = _ask(pipes, "join")
    seconds = time.perf_counter() - began
    if problems := [answer for answer in answers if answer != "joined"]:
        return {"error": f"{len(problems)} of {len(pipes)} workers did not join: {problems[0].splitlines()[0][:120]}"}
    failed = sum(_ask(pipes, "call everybody"))
    grown = [(costs.memory_bytes(pid) - base) / (1 << 20) for pid, base in zip(pids, before, strict=True)]
    time.sleep(1.0)
    used, began = [costs.cpu_seconds(pid) for pid in pids], time.perf_counter()
    time.sleep(IDLE_S)
    elapsed = time.perf_counter() - began
    idle = [100 * (costs.cpu_seconds(pid) - base) / elapsed for pid, base in zip(pids, used, strict=True)]
    figures = {
        "start": seconds,
        "failed": failed,
        "memory": statistics.median(grown),
        "descriptors": statistics.median(map(costs.descriptor_count, pids)),
        "threads": statistics.median(map(costs.thread_count, pids)),
        "idle": statistics.median(idle),
        "call": statistics.median(_ask(pipes[:1], len(pipes) - 1)[0]),
    }
    _ask(pipes, "leave")
    return figures


def _ask(pipes: Sequence[Connection], request: object) -> list[Any]:
    for pipe in pipes:
        pipe.send(request)
    return _answers(pipes)


def _answers(pipes: Sequence[Connection]) -> list[Any]:
    found: dict[Any, Any] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise FastrefError(f"{len(pipes) - len(found)} of {len(pipes)} workers did not answer in {PATIENCE_S:g} s")
        for pipe in ready:
            try:
                found[pipe] = pipe.recv()  # type: ignore[union-attr,call-arg]
            except EOFError:
                found[pipe] = "it ended"
    return [found[pipe] for pipe in pipes]


def _load(backend: str) -> Any:
    if backend == "torch":
        import torch.distributed.rpc as rpc

        return rpc
    import fastref.rpc

    return fastref.rpc


def _join(rpc: Any, backend: str, rank: int, world_size: int, address: str) -> None:
    kind = rpc.TensorPipeRpcBackendOptions if backend == "torch" else rpc.RpcBackendOptions
    options = kind(init_method=address, rpc_timeout=60)
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)


def _time_calls(rpc: Any, to: str) -> list[float]:
    call = functools.partial(rpc.rpc_sync, to, nothing)
    found = []
    for number in range(2 * CALLS):
        began = time.perf_counter_ns()
        call()
        if number >= CALLS:
            found.append((time.perf_counter_ns() - began) / 1000)
    return found


def render(figures: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return a table in Markdown: a line for each backend and number of workers."""
    lines = [f"| backend | workers | {' | '.join(COLUMNS.values())} |", f"|---|--:|{'--:|' * len(COLUMNS)}"]
    for backend, by_size in figures.items():
        for size, row in by_size.items():
            if "error" in row:
                lines.append(f"| {backend} | {size} | {row['error']} |{' |' * (len(COLUMNS) - 1)}")
            else:
                lines.append(f"| {backend} | {size} | {' | '.join(f'{row[key]:.3g}' for key in COLUMNS)} |")
    return "\n".join(lines)


def plot(figures: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw a curve for each backend and column, over the number of workers.

    Raises
    ------
    UsageError
        Without matplotlib.
    """
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib (pip install matplotlib)") from None
    figure = figure_module.Figure(figsize=(13.0, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for backend, by_size in figures.items():
            drawn = {size: row[key] for size, row in by_size.items() if "error" not in row}
            axes.plot(list(drawn), list(drawn.values()), marker="o", label=backend, color=COLORS.get(backend))
        axes.set(xscale="log", yscale="log", xlabel="workers", title=COLUMNS[key])
        sizes = sorted({size for by_size in figures.values() for size in by_size})
        shown = [size for size in sizes if not size & (size - 1)] or sizes  # others would lie over these
        axes.set_xticks(shown, [str(size) for size in shown])
        axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fastref.bench.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", default="2,4,8,16,32,64", help="how many, comma separated (default %(default)s)")
    parser.add_argument("--backends", default="fastref,torch", help="which (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, help="draw the curves (svg, png, pdf; needs matplotlib)")
    chosen = parser.parse_args(arguments)
    figures: dict[str, dict[int, dict[str, Any]]] = {}
    for backend in chosen.backends.split(","):
        figures[backend] = {}
        for size in map(int, chosen.workers.split(",")):
            print(f"{backend}: {size} workers", file=sys.stderr)
            try:
                figures[backend][size] = measure(backend, size)
            except FastrefError as error:
                figures[backend][size] = {"error": str(error)}
    print(render(figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1))
    if chosen.plot is not None:
        plot(figures, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
