"""Whatever nodes do with references, and whoever dies: nothing that can be used is destroyed, and nothing else is kept.

The nodes are real runtimes in one process; the frames between them arrive when the test says so. ``bits`` is how many
of them share tables: the rest go by messages, which channels bring in order and once, or a bad post as it likes. Nodes
of different hosts share nothing at all.
"""

from __future__ import annotations

import gc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.reference_actions import CHOICES, Actions, walk
from tests.reference_world import World

WALKS, STEPS = 500, 50  # for each number of bits and kind of mail: 175,000 steps in all
ACROSS_HOSTS = 200  # for each number of hosts and kind of mail

ACTIONS = [name for name, weight in Actions.weights.items() for _ in range(weight)]


class ReferenceMachine(RuleBasedStateMachine):
    """The same actions, chosen and made small by hypothesis."""

    @initialize(
        count=st.integers(2, 4),
        bits=st.sampled_from([61, 2, 1, 0]),
        bad_mail=st.booleans(),
        hosts=st.sampled_from(["a", "ab", "aabb", "abcd"]),
    )
    def start(self, count: int, bits: int, bad_mail: bool, hosts: str) -> None:
        self.world = World(count, bits, 64, bad_mail, hosts)
        self.actions = Actions(self.world)

    @rule(
        action=st.sampled_from(ACTIONS),
        who=st.integers(0, 3),
        to=st.integers(0, 3),
        choice=st.integers(0, 15),
        variant=st.integers(0, CHOICES - 1),
    )
    def act(self, action: str, who: int, to: int, choice: int, variant: int) -> None:
        self.actions.take(action, who, to, choice, variant)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()


def test_no_short_history_breaks_a_reference() -> None:
    examples = settings(max_examples=100, stateful_step_count=25, derandomize=True)
    run_state_machine_as_test(ReferenceMachine, settings=examples)


@pytest.mark.parametrize("bits", [0, 1, 2, 61])
def test_no_random_history_breaks_a_reference(bits: int) -> None:
    take_walks(bits, bad_mail=False)


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_no_random_history_with_bad_mail_breaks_a_reference(bits: int) -> None:
    take_walks(bits, bad_mail=True)


@pytest.mark.parametrize("bad_mail", [False, True])
@pytest.mark.parametrize("hosts", ["aabb", "abcd"])
def test_no_random_history_across_hosts_breaks_a_reference(hosts: str, bad_mail: bool) -> None:
    take_walks(61, bad_mail, hosts, ACROSS_HOSTS)


def take_walks(bits: int, bad_mail: bool, hosts: str = "a", walks: int = WALKS) -> None:
    for seed in range(walks):
        walk(seed, bits, STEPS, bad_mail, hosts)
        if seed % 20 == 0:
            gc.collect()  # nodes are cycles, and the mappings that a process may have are counted
