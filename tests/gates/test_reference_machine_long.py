"""A million random steps: nothing that can be used is destroyed, and nothing else is kept."""

from __future__ import annotations

import pytest

from tests.reference_actions import walk

pytestmark = [pytest.mark.gates, pytest.mark.slow, pytest.mark.timeout(600)]

WALKS, STEPS = 2500, 100  # for each number of bits


@pytest.mark.parametrize("bits", [0, 1, 2, 61])
def test_a_quarter_of_a_million_random_steps_break_no_reference(bits: int) -> None:
    for seed in range(1_000_000, 1_000_000 + WALKS):
        walk(seed, bits, STEPS)
