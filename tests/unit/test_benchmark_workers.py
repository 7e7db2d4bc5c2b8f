"""Benchmarks that ask processes in turns: a wrong case and a process that ends are told, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import step
from benchmarks.workers import Worker
from prismatic.util.errors import UsageError


def test_an_unknown_case_is_refused_and_results_stay(tmp_path: Path) -> None:
    results = tmp_path / "step.json"
    results.write_text("{}")
    for cases in ("mini; medium", "mini,mid"):
        with pytest.raises(UsageError, match=r"^--cases: '(medium|mini,mid)' found; accepted: mini; mini, stored"):
            step.main(step.StepConfig(cases=cases, out=str(results)))
    assert results.read_text() == "{}"


def test_a_process_that_ends_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"^loader_worker.py: ended with 1, see above"):
        Worker("loader_worker.py", build=step.ROOT)
    assert "missing 3 required positional arguments" in capfd.readouterr().err
