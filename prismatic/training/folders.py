"""Where a run's files lie. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

LOG_FILE = "metrics.jsonl"


def checkpoint_folder(run_dir: Path, step: int, *, latest_only: bool) -> Path:
    """Where the checkpoint of `step` goes: beside the run's folder, or in it when only the latest is kept."""
    return run_dir if latest_only else run_dir.with_name(f"{run_dir.name}--{step}_chkpt")


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint folder of a run with the highest step, or None."""
    pattern = re.compile(re.escape(run_dir.name) + r"--(\d+)_chkpt")
    found = {}
    for folder in run_dir.parent.glob("*_chkpt"):
        if named := pattern.fullmatch(folder.name):
            found[int(named.group(1))] = folder
    return found[max(found)] if found else None
