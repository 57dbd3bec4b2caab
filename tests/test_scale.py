"""The growth of a job is measured by jobs that really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastref.bench import scale
from fastref.errors import FastrefError


def test_a_job_is_measured_whole() -> None:
    figures = scale.measure("fastref", 3)
    assert set(figures) == set(scale.COLUMNS)
    assert figures["failed"] == 0
    assert figures["start"] > 0 < figures["call"]
    assert figures["threads"] >= 3


def test_a_job_that_does_not_come_together_is_a_line_in_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(backend: str, size: int) -> dict[str, float]:
        if size == 3:
            raise FastrefError("3 of 3 workers did not answer in 1 s")
        return dict.fromkeys(scale.COLUMNS, 1.5)

    monkeypatch.setattr(scale, "measure", measured)
    scale.main(["--workers", "2,3", "--backends", "fastref", "--json", str(tmp_path / "figures.json")])
    *_, two, three = capsys.readouterr().out.splitlines()
    assert two.startswith("| fastref | 2 | 1.5 |")
    assert "did not answer" in three
    assert two.count("|") == three.count("|")
    assert json.loads((tmp_path / "figures.json").read_text())["fastref"]["2"]["call"] == 1.5
