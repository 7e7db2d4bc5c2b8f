"""Where a run's files lie. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from prismatic.util.errors import UsageError

LOG_FILE = "metrics.jsonl"


def checkpoint_folder(run_dir: Path, step: int, *, latest_only: bool) -> Path:
    """Where the checkpoint of `step` goes: beside the run's folder, or in it when only the latest is kept."""
    return run_dir if latest_only else run_dir.with_name(f"{run_dir.name}--{step}_chkpt")


def split_checkpoint_name(name: str) -> tuple[str, int | None]:
    """Run and step of a checkpoint folder's name `{run}--{step}_chkpt`; another name has no step."""
    named = re.search(r"--(\d+)_chkpt$", name)
    return (name[: named.start()], int(named.group(1))) if named else (name, None)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint folder of a run with the highest step, or None."""
    pattern = re.compile(re.escape(run_dir.name) + r"--(\d+)_chkpt")
    found = {}
    for folder in run_dir.parent.glob("*_chkpt"):
        if named := pattern.fullmatch(folder.name):
            found[int(named.group(1))] = folder
    return found[max(found)] if found else None


def component_file(folder: Path, component: str, flag: str = "--vla_path") -> Path | None:
    """The state-dict file `{component}--{step}_checkpoint.pt` of a checkpoint folder, or None.

    Of several, it is the one of the step that the folder is named after (`...--{step}_chkpt`), else `--latest_`.

    Raises:
        UsageError: several, and no telling which is meant; the message begins with `flag`, which named the folder.
    """
    found = {file.name: file for file in sorted(folder.glob(f"{component}--*_checkpoint.pt"))}
    _, step = split_checkpoint_name(folder.resolve().name)
    for tag in ([] if step is None else [str(step)]) + ["latest"]:
        if file := found.get(f"{component}--{tag}_checkpoint.pt"):
            return file
    if len(found) > 1:
        raise UsageError(f"{flag}: {folder} has several files for {component}, keep one of them: {', '.join(found)}")
    return next(iter(found.values()), None)
