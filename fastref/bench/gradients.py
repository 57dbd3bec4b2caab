"""What a training step over two workers costs, against torch: ``python -m fastref.bench.gradients``.

One worker has the lower layer of a perceptron, the other the upper one and the loss. A step is the forward pass, the
backward pass and a step of both parameters by their gradients, the lower one's where it lives. The same step in one
process is subtracted on both sides: what is left is what the two workers cost.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import random
import statistics
import time
from typing import Any

import torch

__all__ = ["main", "run"]

SIZES = {"small": (8, 16, 500), "large": (1024, 4096, 15)}  # rows, columns, steps: of large activations 16 MiB
BACKENDS = {
    "fastref": ("fastref.rpc", "fastref.autograd"),
    "torch": ("torch.distributed.rpc", "torch.distributed.autograd"),
}
RATE = 1e-3
_layer: list[torch.Tensor] = []


def make(columns: int) -> None:
    """Keep the lower layer here: one weight for each column, so that large activations are cheap to compute."""
    _layer[:] = [torch.ones(columns, requires_grad=True)]


def forward(x: torch.Tensor) -> torch.Tensor:
    """Run the lower layer."""
    return torch.relu(x * _layer[0])


def descend(autograd: str, context_id: int) -> None:
    """Step the lower layer by its gradient in a context."""
    found = importlib.import_module(autograd).get_gradients(context_id)
    with torch.no_grad():
        _layer[0] -= RATE * found[_layer[0]]


def run(rank: int, backend: str, size: str, port: int, results: Any) -> None:
    """Be one of the two workers."""
    torch.set_num_threads(1)
    rpc, autograd = (importlib.import_module(name) for name in BACKENDS[backend])
    rows, columns, steps = SIZES[size]
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}")
    if backend == "fastref":
        options = rpc.RpcBackendOptions(init_method=f"local://gradients-{port}")
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        rpc.rpc_sync("w1", make, args=(columns,))
        make(columns)
        upper, x = torch.ones(columns, requires_grad=True), torch.rand(rows, columns)
        apart = _median_us(lambda: _step_apart(rpc, autograd, x, upper), steps)
        alone = _median_us(lambda: _step_alone(x, upper), steps)
        results.put((apart, alone))
    rpc.shutdown()


def _step_apart(rpc: Any, autograd: Any, x: torch.Tensor, upper: torch.Tensor) -> None:
    with autograd.context() as context_id:
        loss = (rpc.rpc_sync("w1", forward, args=(x,)) * upper).sum()
        autograd.backward(context_id, [loss])
        done = rpc.rpc_async("w1", descend, args=(autograd.__name__, context_id))
        with torch.no_grad():
            upper -= RATE * autograd.get_gradients(context_id)[upper]
        done.wait()


def _step_alone(x: torch.Tensor, upper: torch.Tensor) -> None:
    (forward(x) * upper).sum().backward()
    for weights in (upper, _layer[0]):
        assert weights.grad is not None
        with torch.no_grad():
            weights -= RATE * weights.grad
        weights.grad = None


def _median_us(step: Any, steps: int) -> float:
    times: list[float] = []
    for number in range(steps + steps // 5):
        started = time.perf_counter()
        step()
        if number >= steps // 5:  # the first ones warm up
            times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print a table of both backends and sizes, medians of three runs that take turns."""
    parser = argparse.ArgumentParser(prog="python -m fastref.bench.gradients", description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'':8}{'backend':>10}{'step':>14}{'alone':>14}{'left':>14}   (us, medians)")
    for size in arguments.sizes:
        left: dict[str, list[tuple[float, float]]] = {}
        for backend in ("torch", "fastref") * 3:
            results = context.SimpleQueue()
            port = random.randint(20_000, 50_000)
            workers = [context.Process(target=run, args=(rank, backend, size, port, results)) for rank in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
                if worker.exitcode:
                    raise SystemExit(f"a worker of {backend} has failed")
            left.setdefault(backend, []).append(results.get())
        for backend, found in left.items():
            apart, alone = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"{size:8}{backend:>10}{apart:14.0f}{alone:14.0f}{apart - alone:14.0f}", flush=True)


if __name__ == "__main__":
    main()
