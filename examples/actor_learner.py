"""Balance a pole: actors play, one learner chooses for all of them at once and learns (PPO on CartPole-v1).

The policy lives on the learner only. An actor sends what it sees and gets an action back; the learner lets the calls
wait until all actors have asked, and answers all of them from one batch. No thread waits meanwhile: the method is
marked by ``functions.async_execution`` and returns a future. The same program runs over ``fastref`` and over
``torch.distributed``; ``--compare`` runs both and shows them side by side.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import torch
from launching import Backend, chosen_backends, command_line, launch_each, positive, table
from torch import Tensor, nn

from fastref.rpc.functions import async_execution  # the mark that torch's own decorator makes, too

if TYPE_CHECKING:
    from fastref.rpc import RRef

DEFAULT_STEPS = 100_000
QUICK_STEPS = 12_800
ROUNDS = 64  # of choices between two updates
EPOCHS = 6  # over the same 64 rounds
DISCOUNT, ADVANTAGE_DECAY = 0.98, 0.8
CLIP, LEARNING_RATE = 0.2, 2.5e-3  # at the start; both fall to 0 with the steps that are left
LAST_EPISODES = 50
EVALUATIONS = 20
STOP = -1  # instead of an action


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same for every backend.

    Parameters
    ----------
    actors : int
        Processes that play, each with an environment of its own.
    steps : int
        Actions that the learner chooses, over all actors.
    seed : int
        Seeds weights, actions and environments. Two runs with one seed choose the same actions, whatever carries the
        calls: each batch is in the order of the actors, not in that of their calls.
    """

    actors: int
    steps: int
    seed: int

    @property
    def workers(self) -> list[str]:
        """Names of all workers, by rank."""
        return ["learner", *(f"actor{index}" for index in range(self.actors))]


class Policy(nn.Module):
    """Four numbers in; out the preferences for two actions, and how much is still to come."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (n, 2) and values (n,) for observations (n, 4)."""
        return self.actor(observations).log_softmax(dim=-1), self.critic(observations).squeeze(-1)


class Learner:
    """Choose for all actors, and learn from what comes of it.

    Parameters
    ----------
    settings : Settings
        Of the run.
    """

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.policy = Policy()
        self.steps = 0
        self.returns: list[float] = []  # of all episodes that have ended
        self._settings = settings
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self._lock = threading.Lock()
        self._waiting: dict[int, torch.futures.Future[int]] = {}
        self._rewarded = [0.0] * settings.actors  # in the present episode of each actor

        shape = (ROUNDS, settings.actors)
        self._round = 0
        self._observations = torch.zeros(ROUNDS + 1, settings.actors, 4)
        self._actions = torch.zeros(shape, dtype=torch.int64)
        self._log_probabilities, self._values = torch.zeros(shape), torch.zeros(shape)
        self._rewards, self._ended = torch.zeros(shape), torch.zeros(shape)

    @async_execution
    def choose(self, actor: int, observation: Tensor, reward: float, has_ended: bool) -> torch.futures.Future[int]:
        """Return the future action of one actor: 0, 1, or ``STOP``.

        Parameters
        ----------
        actor : int
            Which one.
        observation : Tensor
            What it sees, of shape (4,).
        reward, has_ended : float, bool
            What came of its last action; the observation is of a new episode if the last one has ended.
        """
        future: torch.futures.Future[int] = torch.futures.Future()
        with self._lock:
            self._note(actor, observation, reward, has_ended)
            self._waiting[actor] = future
            if len(self._waiting) < self._settings.actors:
                return future
            # The last one to ask computes, and all others wait for that: nobody can come in between.
            waiting, self._waiting = self._waiting, {}
            actions = self._choose_all()
        for index, waiter in waiting.items():
            waiter.set_result(actions[index])
        return future

    def _note(self, actor: int, observation: Tensor, reward: float, has_ended: bool) -> None:
        self._observations[self._round, actor] = observation
        if self._round:
            self._rewards[self._round - 1, actor] = reward
            self._ended[self._round - 1, actor] = float(has_ended)
        self._rewarded[actor] += reward
        if has_ended:
            self.returns.append(self._rewarded[actor])
            self._rewarded[actor] = 0.0

    def _choose_all(self) -> list[int]:
        if self.steps >= self._settings.steps:
            return [STOP] * self._settings.actors
        if self._round == ROUNDS:
            self._learn()
            self._observations[0] = self._observations[ROUNDS]
            self._round = 0
        with torch.no_grad():
            log_probabilities, values = self.policy(self._observations[self._round])
        actions = torch.multinomial(log_probabilities.exp(), 1)
        self._actions[self._round] = actions.squeeze(1)
        self._log_probabilities[self._round] = log_probabilities.gather(1, actions).squeeze(1)
        self._values[self._round] = values
        self._round += 1
        self.steps += self._settings.actors
        chosen: list[int] = actions.squeeze(1).tolist()
        return chosen

    def _learn(self) -> None:
        """Improve the policy by proximal policy optimization, with generalized advantages."""
        left = 1.0 - self.steps / self._settings.steps
        self._optimizer.param_groups[0]["lr"] = LEARNING_RATE * left
        with torch.no_grad():
            following = self.policy(self._observations[ROUNDS])[1]
        advantages = torch.zeros_like(self._values)
        advantage = torch.zeros_like(following)
        for number in reversed(range(ROUNDS)):
            goes_on = 1.0 - self._ended[number]
            surprise = self._rewards[number] + DISCOUNT * following * goes_on - self._values[number]
            advantage = surprise + DISCOUNT * ADVANTAGE_DECAY * goes_on * advantage
            advantages[number] = advantage
            following = self._values[number]
        targets = (advantages + self._values).flatten()
        advantages = advantages.flatten()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        observations = self._observations[:ROUNDS].flatten(0, 1)
        actions, before = self._actions.flatten().unsqueeze(1), self._log_probabilities.flatten()
        for _ in range(EPOCHS):
            log_probabilities, values = self.policy(observations)
            ratio = (log_probabilities.gather(1, actions).squeeze(1) - before).exp()
            clipped = ratio.clamp(1.0 - CLIP * left, 1.0 + CLIP * left)
            loss = -torch.min(ratio * advantages, clipped * advantages).mean() + (values - targets).square().mean() / 2
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
            self._optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean return of episodes of its own, played by the action that it prefers; at most 500."""
        environment = gymnasium.make("CartPole-v1")
        total = 0.0
        for episode in range(EVALUATIONS):
            observation, _ = environment.reset(seed=10_000 + episode)
            has_ended = False
            while not has_ended:
                action = int(self.policy(torch.from_numpy(observation).unsqueeze(0))[0].argmax())
                observation, reward, terminated, truncated, _ = environment.step(action)
                total += float(reward)
                has_ended = terminated or truncated
        return total / EVALUATIONS


def play(learner: RRef, actor: int, seed: int) -> float:
    """Be an actor until the learner says stop; return the seconds spent waiting for its choices."""
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=seed)
    reward, has_ended, waiting_s = 0.0, False, 0.0
    while True:
        started = time.perf_counter()
        action = learner.rpc_sync().choose(actor, torch.from_numpy(observation), reward, has_ended)
        waiting_s += time.perf_counter() - started
        if action == STOP:
            return waiting_s
        observation, received, terminated, truncated, _ = environment.step(action)
        reward, has_ended = float(received), terminated or truncated
        if has_ended:
            observation, _ = environment.reset()


def lead(backend: Backend, settings: Settings) -> dict[str, Any]:
    """Make the learner here, have the actors play with it, show how it goes."""
    from tqdm import tqdm

    rpc = backend.rpc
    learner = Learner(settings)
    rref = rpc.RRef(learner)
    curve: list[tuple[int, float, float]] = []
    last: deque[float] = deque(maxlen=LAST_EPISODES)

    started = time.perf_counter()
    actors = [
        # timeout=0: as long as it takes. The deadline of the whole run is the launcher's.
        rpc.rpc_async(name, play, args=(rref, index, settings.seed * settings.actors + index), timeout=0)
        for index, name in enumerate(settings.workers[1:])
    ]
    with tqdm(total=settings.steps, desc=f"{backend.name:>7}", unit="step", dynamic_ncols=True) as bar:
        seen = 0
        while not all(actor.done() for actor in actors):
            time.sleep(0.1)
            for actor in actors:
                if actor.done():
                    actor.wait()  # raises here what the actor raised
            finished = learner.returns[seen:]
            seen += len(finished)
            last.extend(finished)
            if last:
                curve.append((learner.steps, time.perf_counter() - started, sum(last) / len(last)))
                bar.set_postfix({"return": f"{curve[-1][-1]:.0f}"}, refresh=False)
            bar.update(learner.steps - bar.n)
    waiting_s = sum(actor.wait() for actor in actors)
    seconds = time.perf_counter() - started
    result = learner.evaluate()
    return {
        "backend": backend.name, "steps": learner.steps, "seconds": seconds, "waiting_s": waiting_s, "return": result,
        "episodes": len(learner.returns), "curve": curve,
    }  # fmt: skip


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the returns of all runs over steps and over seconds into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for run in runs:
        steps, seconds, returns = zip(*run["curve"], strict=True)
        label = f"{run['backend']}: {run['steps'] / run['seconds']:,.0f} steps/s"
        for axis, progress in zip(axes, (steps, seconds), strict=True):
            axis.plot(progress, returns, label=label, linewidth=1.2)
    axes[0].set(ylabel=f"return, mean of {LAST_EPISODES} episodes", xlabel="steps", ylim=(0, 510))
    axes[1].set(xlabel="seconds")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("Actors and a learner, CartPole-v1")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summary(runs: list[dict[str, Any]]) -> str:
    """Return the table of results."""
    rows = [
        ("return of the policy, at most 500", "{:.0f}", [run["return"] for run in runs]),
        ("steps per second", "{:,.0f}", [run["steps"] / run["seconds"] for run in runs]),
        ("seconds", "{:.2f}", [run["seconds"] for run in runs]),
        ("an actor's wait, us/step", "{:,.0f}", [run["waiting_s"] / run["steps"] * 1e6 for run in runs]),
    ]
    return table([run["backend"] for run in runs], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as values."""
    parser = command_line(__doc__, "build/actor_learner")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, default=DEFAULT_STEPS, help="of all actors (default %(default)s)")
    length.add_argument(
        "--quick", dest="steps", action="store_const", const=QUICK_STEPS, help=f"the same as --steps {QUICK_STEPS}"
    )
    parser.add_argument("--actors", type=positive, default=4, help="default %(default)s")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for; exit with status 1 and the worker's traceback if a worker fails."""
    options = parse_arguments()
    settings = Settings(options.actors, options.steps, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = launch_each(chosen_backends(options), lead, settings.workers, settings, options.deadline, ["gymnasium"])
    picture = options.output / "returns.png"
    draw(runs, picture)
    print(f"\n{summary(runs)}\n\nCurves: {picture}")


if __name__ == "__main__":
    main()
