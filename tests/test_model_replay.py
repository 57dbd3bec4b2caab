"""The shipped reference table does what the model says, step by step, also along the schedules that broke the model."""

from __future__ import annotations

import random

import pytest

from tests.model import rules
from tests.model.explore import explore
from tests.model.replay import Replay
from tests.model.scenarios import SCENARIOS, SHOWN_BY

USERS = pytest.mark.parametrize("by_instruction", [False, True], ids=["by call", "by instruction"])


def walk(name: str, seed: int, by_instruction: bool) -> None:
    """Let anything happen that may, in random order, until nothing more can; deaths are rare."""
    choice = random.Random(seed)
    replay = Replay(SCENARIOS[name], by_instruction=by_instruction)
    while actions := replay.enabled():
        weights = [0.1 if replay.model.outside(action) else 1.0 for action in actions]
        replay.step(*choice.choices(actions, weights))
    replay.finish(choice)


@USERS
@pytest.mark.parametrize("rule", rules.RULES)
def test_the_shipped_table_survives_the_schedule_of_each_counterexample(rule: str, by_instruction: bool) -> None:
    scenario = SHOWN_BY[rule]
    schedule = explore(rules.build(scenario, (rule,))).trace
    for seed in range(5):
        replay = Replay(SCENARIOS[scenario], by_instruction=by_instruction)
        replay.follow(schedule)
        replay.finish(random.Random(seed))


@USERS
@pytest.mark.parametrize("name", SCENARIOS)
def test_random_walks_of_model_and_table_stay_in_step(name: str, by_instruction: bool) -> None:
    for seed in range(50):
        walk(name, seed, by_instruction)


@pytest.mark.slow
@pytest.mark.gates
@pytest.mark.timeout(600)
@USERS
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_random_walks_of_model_and_table_stay_in_step(name: str, by_instruction: bool) -> None:
    for seed in range(1000, 3000):
        walk(name, seed, by_instruction)
