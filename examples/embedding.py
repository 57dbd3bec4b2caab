"""Train an embedding table that lives on one worker together with dense layers that live on others.

The table is a ``RemoteModule`` around ``nn.EmbeddingBag``: too large for every trainer to have one, in earnest. Each
trainer looks up its batch there, goes on with dense layers of its own, sends gradients back (``autograd.backward``)
and has one ``DistributedOptimizer`` step the rows of the table and its own layers, at its own pace. From time to time
the leader replaces the trainers' dense layers by their mean. The same program runs over ``fastref`` and over
``torch.distributed``; ``--compare`` runs both and shows them side by side.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from digits import batches, load_images
from launching import Backend, chosen_backends, command_line, launch_each, positive, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

if TYPE_CHECKING:
    from fastref.nn import RemoteModule

SHADES = 4  # of a pixel, from white to black
WORDS = 64 * SHADES**3  # one for each pixel, its shade, and those of the pixels right of it and below it
DIMENSION, HIDDEN = 32, 64
BATCH_SIZE = 32
LEARNING_RATE = 0.1
ROUND = 25  # steps of each trainer, between two means of the dense layers
DEFAULT_STEPS, QUICK_STEPS = 4_000, 1_600


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same for every backend.

    Parameters
    ----------
    trainers : int
        Workers with dense layers, each with a share of the images.
    steps : int
        Of all trainers together, rounded up to whole rounds of 25 each.
    seed : int
        Seeds weights and batches. Trainers reach the table in any order, so runs are alike, not equal.
    """

    trainers: int
    steps: int
    seed: int

    @property
    def workers(self) -> list[str]:
        """Names of all workers, by rank."""
        return ["leader", "table", *(f"trainer{index}" for index in range(self.trainers))]


class Trainer:
    """Dense layers, and a share of the images.

    Parameters
    ----------
    backend : Backend
        What carries the references.
    words : RemoteModule
        The table.
    settings : Settings
        Of the run.
    index : int
        Which share: every ``settings.trainers``-th image, beginning with this one.
    """

    def __init__(self, backend: Backend, words: RemoteModule, settings: Settings, index: int) -> None:
        images, labels, _, _ = load_images()
        self._images, self._labels = images[index :: settings.trainers], labels[index :: settings.trainers]
        self._batches = batches(len(self._labels), BATCH_SIZE, settings.seed * settings.trainers + index)
        self._backend, self._words = backend, words
        self._dense = build_dense(settings.seed)
        parameters = [*words.remote_parameters(), *map(backend.rpc.RRef, self._dense.parameters())]
        self._optimizer = backend.optim.DistributedOptimizer(torch.optim.SGD, parameters, lr=LEARNING_RATE)

    def train(self, steps: int) -> list[float]:
        """Make some steps; return their losses."""
        return [self._step(next(self._batches)) for _ in range(steps)]

    def _step(self, rows: Tensor) -> float:
        words, offsets = bags(self._images[rows])
        with self._backend.autograd.context() as context_id:
            loss = cross_entropy(self._dense(self._words.forward(words, offsets)), self._labels[rows])
            self._backend.autograd.backward(context_id, [loss])
            self._optimizer.step(context_id)
        return loss.item()

    def dense_state(self) -> dict[str, Tensor]:
        """Return the weights of the dense layers."""
        return {name: value.clone() for name, value in self._dense.state_dict().items()}

    def load_dense(self, state: dict[str, Tensor]) -> None:
        """Go on from other weights."""
        self._dense.load_state_dict(state)


def build_dense(seed: int) -> nn.Sequential:
    """Return what turns an embedding into scores of ten digits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DIMENSION, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def bags(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images as bags of words: one for each pixel, by its place and the shades there, right of it and below it.

    Returns
    -------
    words, offsets : Tensor
        As ``nn.EmbeddingBag`` takes them: the words of all bags, and where each bag begins. int64. White places have
        no word.
    """
    shades = (images * (SHADES - 1)).round().to(torch.int64).view(-1, 8, 8)
    right, below = pad(shades, (0, 1))[:, :, 1:], pad(shades, (0, 0, 0, 1))[:, 1:]
    patterns = ((shades * SHADES + right) * SHADES + below).flatten(1)
    image, pixel = patterns.nonzero(as_tuple=True)
    counts = torch.bincount(image, minlength=len(images))
    return pixel * SHADES**3 + patterns[image, pixel], counts.cumsum(0) - counts


def make_words(seed: int) -> nn.EmbeddingBag:
    """Return the table. Runs on the worker where it is to live."""
    torch.manual_seed(seed)
    # sparse: a gradient has the rows that were looked up, not all of them.
    words = nn.EmbeddingBag(WORDS, DIMENSION, mode="sum", sparse=True)
    nn.init.normal_(words.weight, std=0.01)  # a word that training has not seen says next to nothing
    return words


def lead(backend: Backend, settings: Settings) -> dict[str, Any]:
    """Make the table and the trainers where they are to live, have them train, show how it goes."""
    from tqdm import tqdm

    words = backend.nn.RemoteModule("table/cpu", make_words, args=(settings.seed,))
    trainers = [
        backend.rpc.remote(name, Trainer, args=(backend, words, settings, index))
        for index, name in enumerate(settings.workers[2:])
    ]
    dense = build_dense(settings.seed)
    _, _, test_images, test_labels = load_images()
    test_bags = bags(test_images)
    for trainer in trainers:
        trainer.rpc_sync().dense_state()  # they are all there when the clock starts
    curve: list[tuple[int, float, float, float]] = []
    training_s = 0.0
    done = 0
    with tqdm(total=settings.steps, desc=f"{backend.name:>7}", unit="step", dynamic_ncols=True) as bar:
        while done < settings.steps:
            started = time.perf_counter()
            rounds = [trainer.rpc_async().train(ROUND) for trainer in trainers]
            losses = list(itertools.chain.from_iterable(round_.wait() for round_ in rounds))
            states = [trainer.rpc_sync().dense_state() for trainer in trainers]
            mean = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
            for future in [trainer.rpc_async().load_dense(mean) for trainer in trainers]:
                future.wait()
            training_s += time.perf_counter() - started
            done += len(losses)

            dense.load_state_dict(mean)
            with torch.no_grad():
                scores = dense(words.forward(*test_bags))
            accuracy = float((scores.argmax(dim=1) == test_labels).float().mean())
            loss = sum(losses) / len(losses)
            curve.append((done, training_s, loss, accuracy))
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
            bar.update(len(losses))
    return {"backend": backend.name, "steps": done, "seconds": training_s, "accuracy": curve[-1][-1], "curve": curve}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the accuracy of all runs over steps and over seconds into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for run in runs:
        steps, seconds, _, accuracies = zip(*run["curve"], strict=True)
        label = f"{run['backend']}: {run['steps'] / run['seconds']:,.0f} steps/s"
        for axis, progress in zip(axes, (steps, seconds), strict=True):
            axis.plot(progress, accuracies, label=label, linewidth=1.2)
    axes[0].set(ylabel="test accuracy", xlabel="steps", ylim=(0.5, 1.0))
    axes[1].set(xlabel="seconds")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("An embedding table on one worker, dense layers on others, handwritten digits")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summary(runs: list[dict[str, Any]]) -> str:
    """Return the table of results."""
    rows = [
        ("test accuracy", "{:.1%}", [run["accuracy"] for run in runs]),
        ("steps per second", "{:,.0f}", [run["steps"] / run["seconds"] for run in runs]),
        ("seconds", "{:.2f}", [run["seconds"] for run in runs]),
    ]
    return table([run["backend"] for run in runs], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as values."""
    parser = command_line(__doc__, "build/embedding")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="of all trainers (default %(default)s)")
    length.add_argument(
        "--quick", dest="steps", action="store_const", const=QUICK_STEPS, help=f"the same as --steps {QUICK_STEPS}"
    )
    parser.add_argument("--trainers", type=positive, default=2, help="default %(default)s")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for; exit with status 1 and the worker's traceback if a worker fails."""
    options = parse_arguments()
    settings = Settings(options.trainers, options.steps, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    preload = ["sklearn.datasets", "sklearn.model_selection"]
    runs = launch_each(chosen_backends(options), lead, settings.workers, settings, options.deadline, preload)
    picture = options.output / "curves.png"
    draw(runs, picture)
    print(f"\n{summary(runs)}\n\nCurves: {picture}")


if __name__ == "__main__":
    main()
