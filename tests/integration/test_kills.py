"""A run that is killed at random moments ends as one that is not; benchmarks/kills.py does it more often."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kills import MOMENTS, compare, kill_at_moments


def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(finetune: Callable[..., Path], tmp_path: Path) -> None:
    """In a step, a save, the start-up and a merge; the command is the same every time."""
    flags: dict[str, Any] = {"recipe": "baseline", "max_steps": 8, "save_freq": 2, "lora_dropout": 0.1, "resume": True}
    straight = finetune(**flags, run_root_dir=tmp_path / "straight")

    def start() -> int:
        if process := os.fork():  # No new interpreter, whose imports would take most of the time.
            return process
        status = 1
        try:
            finetune(**flags, run_root_dir=tmp_path / "killed")
            status = 0
        finally:
            os._exit(status)

    moments = list(kill_at_moments(start, tmp_path / "killed" / "run", len(MOMENTS)))
    assert moments == list(MOMENTS)
    differing, compared = compare(straight / "run", tmp_path / "killed" / "run", 8)
    assert compared > 500 and differing == []
    assert not [path for path in (tmp_path / "killed").iterdir() if path.suffix == ".tmp"]
