"""What fastref does on purpose as torch does not. That torch fails each of these, ``make differences`` shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastref.segments import run_root, sweep
from tests import differences

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"


def test_the_page_on_migrating_names_every_difference() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+){4,})`", PAGE.read_text()))
    assert named >= differences.DIFFERENCES.keys()


@pytest.mark.parametrize("name", differences.DIFFERENCES)
def test_differences(name: str, spawn_workers: Callable[..., Any], tmp_path: Path) -> None:
    meeting = str(tmp_path / "meeting")
    workers = spawn_workers(differences.work, [(name, rank, meeting) for rank in range(differences.MEMBERS)])
    if name in differences.KILLS:
        del workers[1]
    workers.join()
    sweep(run_root())  # as the next start does, of what the killed left
