"""Train a network whose three stages live on three workers, on micro-batches that follow each other through them.

The leader cuts a batch into micro-batches and starts all of them; a stage gets a reference to what the stage before
it computes, so that activations go from stage to stage and never by way of the leader. While a stage works on one
micro-batch, the stage behind it works on the one before. Gradients come back the same way (``autograd.backward``),
and one ``DistributedOptimizer`` steps all stages where they are. The same program runs over ``fastref`` and over
``torch.distributed``; ``--compare`` runs both and shows them side by side.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from digits import batches, load_images
from launching import Backend, chosen_backends, command_line, launch_each, positive, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from fastref.rpc import RRef

STAGES = 3
SPLITS = (1, 2, 4, 8)
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
DEFAULT_STEPS, QUICK_STEPS = 60, 25
DEFAULT_WIDTH = 512


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same for every backend.

    Parameters
    ----------
    steps : int
        For each number of splits, from the same weights and on the same batches of 256 images.
    width : int
        Hidden units of all layers: how much a stage has to compute, and to send.
    seed : int
        Seeds weights and batches. The number of splits changes nothing but the order in which gradients are summed.
    """

    steps: int
    width: int
    seed: int

    @property
    def workers(self) -> list[str]:
        """Names of all workers, by rank."""
        return ["leader", *(f"stage{index}" for index in range(STAGES))]


class Stage(nn.Module):
    """One of three parts of the network.

    Parameters
    ----------
    backend : Backend
        What carries the references.
    index : int
        Which one.
    width : int
        Hidden units.
    seed : int
        Of the weights.
    """

    def __init__(self, backend: Backend, index: int, width: int, seed: int) -> None:
        super().__init__()
        self._backend = backend
        torch.manual_seed(seed * STAGES + index)
        first = nn.Linear(64 if index == 0 else width, width)
        last = nn.Linear(width, 10 if index == STAGES - 1 else width)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
        for layer in (first, self.layers[2], last):
            nn.init.kaiming_normal_(layer.weight)  # nine layers deep, torch's own start lets next to nothing through
            nn.init.zeros_(layer.bias)
        self._lock = threading.Lock()

    def forward(self, inputs: RRef) -> Tensor:
        """Return what the stage makes of one micro-batch, which a reference stands for."""
        here = inputs.to_here()
        # One micro-batch at a time: two at once would only take turns on the core that the stage has.
        with self._lock:
            return self.layers(here)

    def parameter_rrefs(self) -> list[RRef]:
        """Return references to the parameters."""
        return [self._backend.rpc.RRef(parameter) for parameter in self.parameters()]


class Pipeline:
    """The network, seen from the leader.

    Parameters
    ----------
    backend : Backend
        What carries the references.
    settings : Settings
        Of the run.
    splits : int
        Into how many micro-batches a batch is cut.
    """

    def __init__(self, backend: Backend, settings: Settings, splits: int) -> None:
        self._backend, self._splits = backend, splits
        self._stages = [
            backend.rpc.remote(name, Stage, args=(backend, index, settings.width, settings.seed))
            for index, name in enumerate(settings.workers[1:])
        ]
        parameters = [rref for stage in self._stages for rref in stage.rpc_sync().parameter_rrefs()]
        self._optimizer = backend.optim.DistributedOptimizer(torch.optim.Adam, parameters, lr=LEARNING_RATE)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, of shape (n, 10)."""
        scores = []
        for micro_batch in images.split(-(-len(images) // self._splits)):
            inputs = self._backend.rpc.RRef(micro_batch)
            for stage in self._stages[:-1]:
                inputs = stage.remote().forward(inputs)
            scores.append(self._stages[-1].rpc_async().forward(inputs))
        return torch.cat([future.wait() for future in scores])

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Learn from one batch; return its loss."""
        with self._backend.autograd.context() as context_id:
            loss = cross_entropy(self.forward(images), labels)
            self._backend.autograd.backward(context_id, [loss])
            self._optimizer.step(context_id)
        return loss.item()


def lead(backend: Backend, settings: Settings) -> dict[str, Any]:
    """Train once for each number of splits."""
    from tqdm import tqdm

    images, labels, test_images, test_labels = load_images()
    parts = []
    with tqdm(total=settings.steps * len(SPLITS), desc=f"{backend.name:>7}", unit="step", dynamic_ncols=True) as bar:
        for splits in SPLITS:
            pipeline = Pipeline(backend, settings, splits)
            seconds, losses = [], []
            for _, rows in zip(range(settings.steps), batches(len(labels), BATCH_SIZE, settings.seed), strict=False):
                started = time.perf_counter()
                losses.append(pipeline.step(images[rows], labels[rows]))
                seconds.append(time.perf_counter() - started)
                bar.set_postfix(splits=splits, loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            with torch.no_grad():
                accuracy = float((pipeline.forward(test_images).argmax(dim=1) == test_labels).float().mean())
            # The median: one step that the machine held up says nothing about pipelines.
            part = {"splits": splits, "step_s": statistics.median(seconds), "seconds": sum(seconds), "losses": losses}
            parts.append({**part, "accuracy": accuracy})
    return {"backend": backend.name, "steps": settings.steps, "width": settings.width, "parts": parts}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up by splits, and the time of a step, into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ideal = [STAGES * splits / (splits + STAGES - 1) for splits in SPLITS]
    axes[0].plot(SPLITS, ideal, "k:", linewidth=1, label="a core for each stage, and nothing else to do")
    for run in runs:
        times = [part["step_s"] for part in run["parts"]]
        axes[0].plot(SPLITS, [times[0] / time_s for time_s in times], marker="o", label=run["backend"])
        axes[1].plot(SPLITS, [time_s * 1e3 for time_s in times], marker="o", label=run["backend"])
    axes[0].set(ylabel="times as fast as with one split", xlabel="splits")
    axes[1].set(ylabel="ms per step, median", xlabel="splits", ylim=(0, None))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(SPLITS, [str(splits) for splits in SPLITS])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"A pipeline of {STAGES} stages, {runs[0]['width']} hidden units, handwritten digits")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summary(runs: list[dict[str, Any]]) -> str:
    """Return the table of results."""
    rows: list[tuple[str, str, list[float]]] = []
    for number, splits in enumerate(SPLITS):
        word = "split" if splits == 1 else "splits"
        rows.append((f"ms per step, {splits} {word}", "{:.2f}", [run["parts"][number]["step_s"] * 1e3 for run in runs]))
    for number, splits in enumerate(SPLITS[1:], start=1):
        gains = [run["parts"][0]["step_s"] / run["parts"][number]["step_s"] for run in runs]
        rows.append((f"speed-up by {splits} splits", "{:.2f}", gains))
    rows.append(
        ("test accuracy, the lowest", "{:.1%}", [min(part["accuracy"] for part in run["parts"]) for run in runs])
    )
    rows.append(("seconds, all steps", "{:.2f}", [sum(part["seconds"] for part in run["parts"]) for run in runs]))
    return table([run["backend"] for run in runs], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as values."""
    parser = command_line(__doc__, "build/pipeline")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=positive, default=DEFAULT_STEPS, help="for each number of splits (default %(default)s)"
    )
    length.add_argument(
        "--quick", dest="steps", action="store_const", const=QUICK_STEPS, help=f"the same as --steps {QUICK_STEPS}"
    )
    parser.add_argument("--width", type=positive, default=DEFAULT_WIDTH, help="hidden units (default %(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for; exit with status 1 and the worker's traceback if a worker fails."""
    options = parse_arguments()
    settings = Settings(options.steps, options.width, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    preload = ["sklearn.datasets", "sklearn.model_selection"]
    runs = launch_each(chosen_backends(options), lead, settings.workers, settings, options.deadline, preload)
    picture = options.output / "speedup.png"
    draw(runs, picture)
    print(f"\n{summary(runs)}\n\nCurves: {picture}")


if __name__ == "__main__":
    main()
