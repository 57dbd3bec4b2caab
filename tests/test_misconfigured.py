"""A job that cannot start: every worker learns why, at once, and can start another afterwards."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from tests.misconfigured import CASES, METHODS, Case, Part, check, free_port, play
from tests.puppets import Ended, Troupe, troupe_fixture  # noqa: F401

# One or two of a kind; the gate plays all of them over every init method.
OFTEN = [
    *("same_name", "same_rank", "missing_rank", "no_world", "name_too_long", "full_shm", "full_shm_of_the_coordinator"),
    *("no_memory_for_a_ring", "killed_while_joining", "coordinator_killed_while_joining", "unknown_scheme"),
    *("old_worker_in_a_running_job", "run_directory_open_to_others", "run_directory_of_another_user", "never_full"),
]


@pytest.fixture
def place(troupe: Troupe, tmp_path: Path) -> tuple[str, int, Path]:
    """Return job name, port and directory, for an init method of any kind."""
    return troupe.job, free_port(), tmp_path


def prepared(case: Case, directory: Path) -> Case:
    """Make the run directories that a case wants, and name them."""
    if "FOREIGN" in str(case.parts) and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    for name, mode, owner in (("OPEN", 0o750, -1), ("FOREIGN", 0o700, 12345)):
        made = directory / name
        made.mkdir()
        made.chmod(mode)
        if owner >= 0 and os.geteuid() == 0:
            os.chown(made, owner, -1)
    return dataclasses.replace(case, parts=[_placed(part, directory) for part in case.parts])


def _placed(part: Part, directory: Path) -> Part:
    quirks = tuple(
        (quirk, tuple(str(directory / one) if one in ("OPEN", "FOREIGN") else one for one in arguments))
        for quirk, arguments in part.quirks
    )
    return dataclasses.replace(part, quirks=quirks)


@pytest.mark.parametrize("name", OFTEN)
def test_everybody_learns_what_is_wrong(
    troupe: Troupe, place: tuple[str, int, Path], tmp_path: Path, name: str
) -> None:
    case = prepared(CASES[name], tmp_path)
    _, outcomes = play(troupe, case.parts, case.methods[0], place)
    check(case, outcomes)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["missing_rank", "arena_beyond_the_system"])
def test_everybody_learns_it_by_any_init_method(
    troupe: Troupe, place: tuple[str, int, Path], name: str, method: str
) -> None:
    _, outcomes = play(troupe, CASES[name].parts, method, place)
    check(CASES[name], outcomes)
