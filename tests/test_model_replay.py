"""The shipped reference table does what the model says, step by step, also along the schedules that broke the model."""

from __future__ import annotations

import random

import pytest

from tests.model import rules
from tests.model.explore import explore
from tests.model.replay import Replay
from tests.model.scenarios import SCENARIOS, SHOWN_BY


def walk(name: str, seed: int) -> None:
    """Let anything happen that may, in random order, until nothing more can."""
    choice = random.Random(seed)
    replay = Replay(SCENARIOS[name])
    while actions := replay.enabled():
        replay.step(choice.choice(actions))
    replay.finish(choice)


@pytest.mark.parametrize("rule", rules.RULES)
def test_the_shipped_table_survives_the_schedule_of_each_counterexample(rule: str) -> None:
    scenario = SHOWN_BY[rule]
    schedule = explore(rules.build(scenario, (rule,))).trace
    for seed in range(5):
        replay = Replay(SCENARIOS[scenario])
        replay.follow(schedule)
        replay.finish(random.Random(seed))


@pytest.mark.parametrize("name", SCENARIOS)
def test_random_walks_of_model_and_table_stay_in_step(name: str) -> None:
    for seed in range(50):
        walk(name, seed)


@pytest.mark.slow
@pytest.mark.gates
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_random_walks_of_model_and_table_stay_in_step(name: str) -> None:
    for seed in range(1000, 6000):
        walk(name, seed)
