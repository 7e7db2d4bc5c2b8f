"""Finds the checkpoint that a stopped run goes on from, and tells a damaged one by its checksums.

Checksums (CRC-32C) are those of weights and training state. JSON files may be edited by hand, and of a LoRA checkpoint
the merged model may be deleted or merged anew: training does not read it.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from prismatic.checkpoint import layout
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import atomic_write, read_json, temporary_prefix

CHECKSUMS = layout.STATE_FILE.with_name("checksums.json")
_CHUNK = 2**24


def _checksum(file: Path) -> str:
    import google_crc32c

    digest = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest().decode()


def _trained_files(folder: Path) -> list[Path]:
    """Files that a resume reads: weights, without a merged model beside an adapter, and the training state."""
    files = [file for file in folder.rglob("*") if file.suffix in (".pt", ".bin", ".safetensors")]
    merged = layout.weight_files(folder, layout.MODEL_WEIGHTS) if (folder / layout.ADAPTER_CONFIG).is_file() else []
    return sorted(set(files) - set(merged))


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint folder that is complete but for them."""
    sums = {str(file.relative_to(folder)): _checksum(file) for file in _trained_files(folder)}
    atomic_write(folder / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """The first thing wrong with the files that a resume reads, or None; without checksums, whether the state opens."""
    try:
        sums = read_json(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else {}
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{folder / name}: no such file"
            if _checksum(folder / name) != expected:
                return f"{folder / name}: damaged, its checksum is another than at saving"
        if not sums:
            layout.load_training_state(folder, lazily=True)
    except (UsageError, OSError) as error:
        return one_line(error)
    return None


def checkpoints_of(run_dir: Path) -> dict[int, Path]:
    """The checkpoint folders beside a run's folder, by step."""
    folders = {}
    for folder in run_dir.parent.glob("*_chkpt"):
        run, step = layout.split_checkpoint_name(folder.name)
        if run == run_dir.name and step is not None and layout.is_checkpoint(folder):
            folders[step] = folder
    return folders


def remove_older(run_dir: Path, keep: int, also: Collection[int]) -> None:
    """Remove all but the newest `keep` checkpoints of a run and those of the steps `also`."""
    folders = checkpoints_of(run_dir)
    for step in sorted(folders)[:-keep]:
        if step not in also:
            # Renamed first, so that a kill leaves no half a checkpoint under its name.
            gone = folders[step].with_name(f"{temporary_prefix(run_dir)}{step}.gone")
            shutil.rmtree(gone, ignore_errors=True)  # Of a killed process.
            shutil.rmtree(folders[step].rename(gone))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest intact checkpoint of a run, or None if it has none at all. Damaged ones are named on standard error.

    Raises UsageError: all of them are damaged.
    """
    # Killed while the only checkpoint was being replaced: the one before is whole.
    if not layout.is_checkpoint(run_dir):
        # mkdtemp's names have eight random characters.
        for aside in sorted(run_dir.parent.glob(f"{glob.escape(temporary_prefix(run_dir))}????????.old")):
            if layout.is_checkpoint(aside) and not run_dir.exists():
                aside.replace(run_dir)
    folders = checkpoints_of(run_dir)
    candidates = [folders[step] for step in sorted(folders, reverse=True)]
    if layout.is_checkpoint(run_dir):
        candidates.insert(0, run_dir)
    for folder in candidates:
        reason = damage(folder)
        if reason is None:
            return folder
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"left out: {reason}", file=sys.stderr)
    if candidates:
        raise UsageError(f"--resume: no checkpoint of {run_dir} is intact; accepted: another --run_id_override")
    return None


def is_run(folder: Path) -> bool:
    """Tell whether a folder is that of a run that took a step, or of which a checkpoint is left."""
    log = folder / layout.LOG_FILE
    return (log.is_file() and log.stat().st_size > 0) or layout.is_checkpoint(folder) or bool(checkpoints_of(folder))
