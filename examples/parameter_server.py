"""Train a digit classifier asynchronously: one parameter server, N trainers, remote references in between.

The model lives in a ``ParameterServer`` object on worker ``ps``. Trainers hold a reference to it; each, at its own
pace, fetches the weights through the reference, computes a gradient on its share of the images, and pushes it back
(Hogwild-style SGD with the update on the server). The same program runs over ``fastref.rpc`` and over
``torch.distributed.rpc``; ``--compare`` runs both and shows them side by side.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import secrets
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from digits import load_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

if TYPE_CHECKING:
    from fastref.rpc import RRef

BACKENDS = {"fastref": "fastref.rpc", "torch": "torch.distributed.rpc"}
DEFAULT_STEPS = 10_000
QUICK_STEPS = 2_000
REPORT_EVERY = 25
DEFAULT_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same for every backend.

    Parameters
    ----------
    trainers : int
        Worker processes that train.
    steps : int
        Gradients that the server applies, whoever sends them: a trainer that is held up holds up nobody else.
    batch_size : int
        Images per gradient.
    learning_rate : float
        Step size of the server's SGD with momentum 0.9.
    seed : int
        Seeds the initial weights and the order of the batches. The order in which gradients reach the server
        is up to the machine, so two runs with one seed are alike, not equal.
    """

    trainers: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    @property
    def workers(self) -> list[str]:
        """Names of all workers, by rank."""
        return ["ps", *(f"trainer{index}" for index in range(self.trainers))]


@dataclass
class Run:
    """What came out of one run.

    Attributes
    ----------
    seconds : float
        From the start of the trainers until the server has applied the last gradient.
    waiting_s : float
        Time that trainers spent waiting for the server, sum over the trainers.
    accuracy : float
        Of the server's final weights on the test images, 0 to 1.
    curve : list of (int, float, float, float)
        Gradients applied so far, seconds, mean of trainer0's last losses, test accuracy.
    """

    backend: str
    settings: Settings
    seconds: float = 0.0
    waiting_s: float = 0.0
    accuracy: float = 0.0
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        """Rate of all trainers together."""
        return self.settings.steps / self.seconds


class ParameterServer:
    """Own the weights and the optimizer; called by all trainers at once.

    Parameters
    ----------
    seed : int
        Seeds the initial weights.
    learning_rate : float
        Step size of SGD with momentum 0.9.
    steps : int
        Gradients to apply; what comes after them is dropped.
    """

    def __init__(self, seed: int, learning_rate: float, steps: int) -> None:
        torch.manual_seed(seed)
        # One flat vector instead of a tensor per layer: one fetch, one push and one optimizer kernel per step.
        self._weights = nn.Parameter(parameters_to_vector(build_model().parameters()).detach())
        self._optimizer = torch.optim.SGD([self._weights], lr=learning_rate, momentum=0.9)
        self._steps = steps
        self._applied = 0
        self._lock = threading.Lock()

    def weights(self) -> Tensor:
        """Return a copy of the weights, one version of them: never half of an update."""
        with self._lock:
            return self._weights.detach().clone()

    def push(self, gradient: Tensor) -> int:
        """Apply one gradient, unless training is over; return how many have been applied so far."""
        with self._lock:
            if self._applied < self._steps:
                self._weights.grad = gradient
                self._optimizer.step()
                self._applied += 1
            return self._applied


class Trainer:
    """Compute gradients on one share of the training images and push them to the server.

    Parameters
    ----------
    server : RRef
        Reference to the ``ParameterServer``.
    settings : Settings
        Of the run.
    index : int
        Which share: every ``settings.trainers``-th image, beginning with this one.

    Raises
    ------
    ValueError
        If the share is smaller than one batch.
    """

    def __init__(self, server: RRef, settings: Settings, index: int) -> None:
        images, labels, _, _ = load_images()
        share = slice(index, None, settings.trainers)
        generator = torch.Generator().manual_seed(settings.seed * settings.trainers + index)
        self._batches = _batches(images[share], labels[share], settings.batch_size, generator)
        self._server = server
        self._pushed: torch.futures.Future[int] | None = None
        self.model = build_model()
        self.applied = 0
        self.waiting_s = 0.0

    def step(self) -> float:
        """Fetch the weights, compute a gradient on the next batch, push it; return the loss."""
        started = time.perf_counter()
        weights = self._server.rpc_sync().weights()
        self.waiting_s += time.perf_counter() - started

        images, labels = next(self._batches)
        vector_to_parameters(weights, self.model.parameters())
        loss = cross_entropy(self.model(images), labels)
        gradient = parameters_to_vector(torch.autograd.grad(loss, tuple(self.model.parameters())))

        # The push travels while the next step fetches and computes. One at a time: the gradients of one trainer
        # stay in order, and none is based on weights that lack more than the trainer's own last gradient.
        self.settle()
        self._pushed = self._server.rpc_async().push(gradient)
        return loss.item()

    def settle(self) -> None:
        """Wait until the server has applied the last gradient."""
        if self._pushed is not None:
            started = time.perf_counter()
            self.applied = self._pushed.wait()
            self._pushed = None
            self.waiting_s += time.perf_counter() - started


def build_model() -> nn.Sequential:
    """Return the classifier: 8 x 8 pixels in, 128 hidden units, 10 classes out; 9,610 weights."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _batches(
    images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches without end, shuffled anew each epoch; an incomplete last batch is left out."""
    if batch_size > len(labels):
        raise ValueError(f"a batch of {batch_size} images does not fit into a share of {len(labels)}")
    epochs = (torch.randperm(len(labels), generator=generator).split(batch_size) for _ in itertools.count())
    return ((images[rows], labels[rows]) for epoch in epochs for rows in epoch if len(rows) == batch_size)


def train(server: RRef, settings: Settings, index: int) -> float:
    """Train on one share until the server has enough; return the seconds spent waiting for the server."""
    trainer = Trainer(server, settings, index)
    while trainer.applied < settings.steps:
        trainer.step()
    trainer.settle()
    return trainer.waiting_s


def lead(rpc: ModuleType, backend: str, settings: Settings) -> Run:
    """Create the server, start the other trainers, train along with them, show how it goes. Runs on trainer0."""
    from tqdm import tqdm

    run = Run(backend, settings)
    _, _, test_images, test_labels = load_images()
    server = rpc.remote("ps", ParameterServer, args=(settings.seed, settings.learning_rate, settings.steps))
    trainer = Trainer(server, settings, index=0)
    # The first fetch waits for the constructor, so that the clock starts with a server that is there.
    server.rpc_sync().weights()

    started = time.perf_counter()
    others = [
        # timeout=0: as long as it takes. The deadline of the whole run is the launcher's.
        rpc.rpc_async(name, train, args=(server, settings, index), timeout=0)
        for index, name in enumerate(settings.workers[2:], start=1)
    ]
    losses: deque[float] = deque(maxlen=REPORT_EVERY)

    def record(applied: int) -> None:
        loss, accuracy = sum(losses) / len(losses), _accuracy(trainer.model, test_images, test_labels)
        run.curve.append((applied, time.perf_counter() - started, loss, accuracy))
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        bar.update(applied - bar.n)

    with tqdm(total=settings.steps, desc=f"{backend:>7}", unit="step", dynamic_ncols=True) as bar:
        for step in itertools.count(1):
            losses.append(trainer.step())
            if trainer.applied >= settings.steps:
                break
            if step % REPORT_EVERY:
                continue
            for other in others:
                if other.done():
                    other.wait()  # raises here what the other trainer raised, instead of after the last step
            record(trainer.applied)
        trainer.settle()
        run.waiting_s = trainer.waiting_s + sum(other.wait() for other in others)
        run.seconds = time.perf_counter() - started
        vector_to_parameters(server.rpc_sync().weights(), trainer.model.parameters())
        record(settings.steps)
    run.accuracy = run.curve[-1][-1]
    return run


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


def work(rank: int, backend: str, directory: str, settings: Settings) -> None:
    """Be one worker, from joining the job to leaving it. trainer0 leaves the result in ``directory``."""
    torch.set_num_threads(1)
    # torch's own start-up warns about how torch calls itself; it says nothing about this program.
    warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
    rpc = importlib.import_module(BACKENDS[backend])
    if backend == "fastref":
        options = rpc.RpcBackendOptions(init_method=f"local://{Path(directory).name}")
    else:
        options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/rendezvous")
    rpc.init_rpc(settings.workers[rank], rank=rank, world_size=len(settings.workers), rpc_backend_options=options)
    if settings.workers[rank] == "trainer0":
        run = lead(rpc, backend, settings)
        Path(directory, "run.json").write_text(json.dumps(asdict(run)))
    # Only after success: a graceful shutdown waits for all workers, and one that failed would not come.
    rpc.shutdown()


def launch(backend: str, settings: Settings, deadline_s: float) -> Run:
    """Run one job in processes of its own.

    Parameters
    ----------
    backend : str
        A key of ``BACKENDS``.
    settings : Settings
        Of the run.
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
    with tempfile.TemporaryDirectory(prefix=f"parameter-server-{secrets.token_hex(4)}-") as directory:
        deadline = time.monotonic() + deadline_s
        context = mp.start_processes(
            work,
            args=(backend, directory, settings),
            nprocs=len(settings.workers),
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
        finally:
            # torch has read the traceback of a failed worker by now, and leaves its file to us.
            for error_file in context.error_files:
                Path(error_file).unlink(missing_ok=True)
        result: dict[str, Any] = json.loads(Path(directory, "run.json").read_text())
    return Run(**{**result, "settings": settings})


def draw(runs: list[Run], path: Path) -> None:
    """Draw loss and accuracy of all runs over steps and over seconds into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.5), sharex="col", sharey="row", layout="constrained")
    for run in runs:
        steps, seconds, losses, accuracies = zip(*run.curve, strict=True)
        label = f"{run.backend}: {run.steps_per_second:,.0f} steps/s, {run.accuracy:.1%}"
        for column, progress in enumerate((steps, seconds)):
            axes[0, column].plot(progress, losses, label=label, linewidth=1.2)
            axes[1, column].plot(progress, accuracies, label=label, linewidth=1.2)
    axes[0, 0].set(ylabel="training loss", yscale="log")
    axes[1, 0].set(ylabel="test accuracy", xlabel="gradients applied", ylim=(0.8, 1.0))
    axes[1, 1].set(xlabel="seconds")
    axes[0, 1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(f"Parameter server, trainers: {runs[0].settings.trainers}, handwritten digits")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summary(runs: list[Run]) -> str:
    """Return the table of results, with the ratio of the first run to the second if there are two."""
    settings = runs[0].settings
    weights = sum(parameter.numel() for parameter in build_model().parameters())
    lines = [
        f"Steps: {settings.steps:,}, trainers: {settings.trainers}, seed: {settings.seed}, torch {torch.__version__},"
        f" {len(os.sched_getaffinity(0))} cores.",
        f"A step: fetch {weights:,} weights ({weights * 4 / 1000:.0f} kB), forward and backward on"
        f" {settings.batch_size} images, push the gradient ({weights * 4 / 1000:.0f} kB).",
        "Seconds run from the start of the trainers to the last gradient applied; they include the evaluation on"
        " trainer0 and leave out the start of the processes.",
        "",
        " " * 30 + "".join(f"{run.backend:>12}" for run in runs) + ("       ratio" if len(runs) == 2 else ""),
    ]
    rows = [
        ("test accuracy", "{:.1%}", [run.accuracy for run in runs]),
        ("steps per second", "{:,.0f}", [run.steps_per_second for run in runs]),
        ("seconds", "{:.2f}", [run.seconds for run in runs]),
        ("waiting for the server, us/step", "{:,.0f}", [run.waiting_s / settings.steps * 1e6 for run in runs]),
    ]
    for title, form, values in rows:
        ratio = f"{values[0] / values[1]:>11.2f}x" if len(values) == 2 else ""
        lines.append(f"{title:<31}" + "".join(f"{form.format(value):>12}" for value in values)[1:] + ratio)
    return "\n".join(lines)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backend", choices=BACKENDS, default="fastref", help="what carries the references")
    which.add_argument("--compare", action="store_true", help="run every backend and show them side by side")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive, default=DEFAULT_STEPS, help="of all trainers (default %(default)s)")
    length.add_argument(
        "--quick", dest="steps", action="store_const", const=QUICK_STEPS, help=f"the same as --steps {QUICK_STEPS}"
    )
    parser.add_argument("--trainers", type=_positive, default=2, help="default %(default)s")
    parser.add_argument("--batch-size", type=_positive, default=32, help="images per step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEFAULT_DEADLINE_S,
        metavar="SECONDS",
        help="end a run that takes longer (default %(default)g)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/parameter_server"), help="directory (default %(default)s)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for; exit with status 1 and the worker's traceback if a worker fails."""
    options = parse_arguments()
    settings = Settings(options.trainers, options.steps, options.batch_size, options.learning_rate, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    # The workers are forked from a process that has imported what takes seconds to import, and nothing else.
    mp.get_context("forkserver").set_forkserver_preload(["torch", "sklearn.datasets", "sklearn.model_selection"])
    runs = []
    for backend in BACKENDS if options.compare else [options.backend]:
        try:
            runs.append(launch(backend, settings, options.deadline))
        except (mp.ProcessRaisedException, mp.ProcessExitedException, TimeoutError) as error:
            sys.exit(f"{backend}: {error}")
    picture = options.output / "curves.png"
    draw(runs, picture)
    print(f"\n{summary(runs)}\n\nCurves: {picture}")


if __name__ == "__main__":
    main()
