"""The registered confirmation: its verdict follows from the numbers, in either direction, and from all seeds alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.reproduce import __main__ as command
from experiments.reproduce import confirm
from experiments.reproduce.jobs import ROOT

SEEDS = confirm.REGIME.seeds


def write(folder: Path, arm: str, seed: int, *, depth: float, error: float) -> None:
    record: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "code": {"commit": "abc"},
        "validation": {"val/action_loss": error},
        "reach": [{"miss": 0.02}, {"miss": 0.04}],
        "readout": {"depth": [[9.0], [depth - 0.1], [depth + 0.1]], "pose": [[9.0], [0.5], [0.5]]},
    }
    path = folder / confirm.REGIME.name / f"{arm}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def verdicts(folder: Path) -> dict[str, str]:
    table = confirm.write_verdict(folder)
    assert table is not None
    assert table.rows[0][3] in (folder / confirm.REGIME.name / "verdict.md").read_text()
    return {row[0].partition(" ")[0]: row[-1] for row in table.rows}


def test_the_verdict_goes_whichever_way_the_numbers_go(tmp_path: Path) -> None:
    for number, seed in enumerate(SEEDS):
        write(tmp_path, "baseline", seed, depth=0.1 + 0.01 * number, error=0.2)
        write(tmp_path, "rocket", seed, depth=0.3, error=0.21 + 0.001 * number)
    assert verdicts(tmp_path) == {
        "depth": "better with ROCKET",
        "held-out": "worse with ROCKET",
        "first": "not tested",
        "camera": "not tested",
    }
    write(tmp_path, "rocket", SEEDS[0], depth=-0.9, error=0.1)
    # One seed of eight the other way, by far: p of the sign flips is above the threshold for both.
    assert {verdicts(tmp_path)[name] for name in ("depth", "held-out")} == {"no difference shown"}


def test_one_seed_less_is_not_complete(tmp_path: Path) -> None:
    assert confirm.write_verdict(tmp_path) is None
    for seed in (*SEEDS[1:], 7, 8):
        write(tmp_path, "baseline", seed, depth=0.1, error=0.2)
        write(tmp_path, "rocket", seed, depth=0.3, error=0.1)
    assert verdicts(tmp_path)["depth"] == "not complete"


def test_arms_differ_by_the_alignment_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["confirm", "--dry_run", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [sum(name in line for line in lines) for name in ("collect", "teacher_data", "finetune.py")] == [1, 1, 16]
    assert sum("--scene moved" in line for line in lines) == 1 + 1 + 16  # Of reach too; readout has the frames.
    first, second = (line for line in lines if "finetune.py" in line and "--seed 103" in line)
    assert first.replace("baseline", "rocket") == second


def test_the_page_says_what_is_run() -> None:
    page = (ROOT / "docs" / "confirmation.md").read_text()
    assert f"{SEEDS[0]} to {SEEDS[-1]}" in page and str(confirm.THRESHOLD) in page
    assert all(measure.name in page for measure in confirm.MEASURES)
    assert f"{confirm.REGIME.train['max_steps']} steps of {confirm.REGIME.train['batch_size']}" in page
