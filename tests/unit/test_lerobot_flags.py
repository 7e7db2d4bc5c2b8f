"""Flags of the LeRobot plug-in are taken out of the command line, and nothing happens without them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rocket_align.lerobot import RocketFlags, install, take_flags


def test_flags_are_split_from_lerobots() -> None:
    given = ["--policy.type=pi05", "--rocket.teacher_path=t", "--steps=3", "--rocket.coeff", "0.25"]
    flags, others = take_flags(given)
    assert flags == RocketFlags(teacher_path="t", coeff=0.25) and others == ["--policy.type=pi05", "--steps=3"]
    assert flags.config.num_pairs == 10 and not flags.config.shift
    assert take_flags(others) == (None, others)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rocket.teacher=x"], r"unknown flag \(did you mean --rocket.teacher_path\?\); accepted: teacher_path"),
        (["--rocket.coeff=1"], "--rocket.teacher_path: empty"),
        (["--rocket.teacher_path=t", "--rocket.coeff=much"], "found 'much'; accepted: a number"),
        (["--rocket.teacher_path"], "no value found"),
    ],
)
def test_wrong_flags_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take_flags(given)


def test_other_programs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", "--rocket.nonsense=1"])
    install()
    assert sys.argv == ["lerobot-eval", "--rocket.nonsense=1"]


def test_the_plugins_name_is_what_lerobot_looks_for(repo_root: Path) -> None:
    folder = repo_root / "plugins" / "lerobot_policy_rocket"
    assert 'name = "lerobot_policy_rocket"' in (folder / "pyproject.toml").read_text()
    assert (folder / "lerobot_policy_rocket.py").is_file()
