"""The confirmation: one regime, two arms, seeds that nothing was developed on, and tests that were written down before.

docs/confirmation.md says what is tested and why. `python -m experiments.reproduce confirm` runs what is missing and
writes the verdict; it goes on where it was stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.report import Table, markdown_table
from experiments.reproduce.jobs import ROOT, Chain, Job, as_arguments
from experiments.reproduce.profiles import MINI
from experiments.reproduce.records import FORMAT_VERSION, RESULTS, Record, portable, training_curves
from experiments.reproduce.seeds import paired_by_seed
from experiments.reproduce.stages import StudyPaths, collect_job, train_job
from experiments.reproduce.studies import BASELINE, ROCKET, Arm
from prismatic.checkpoint.layout import LOG_FILE, read_record
from prismatic.training.metrics import read_log
from prismatic.util.files import atomic_write, read_json

ARMS = (BASELINE, ROCKET)
LATE_STEPS = (500, 600)
# Two hypotheses share an error of 0.05.
THRESHOLD = 0.025
REGIME = replace(
    MINI,
    name="confirmation",
    train={
        "num_images_in_input": 1,
        "use_proprio": True,
        "use_lora": False,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "scheduler": "CosineAnnealingLR",
        "lr_warmup_steps": 30,
        "max_steps": LATE_STEPS[-1],
        "save_freq": LATE_STEPS[-1],
        "max_grad_norm": 1.0,
        "num_workers": 0,
        "use_val_set": True,
        "val_fraction": 0.5,
        "val_freq": LATE_STEPS[-1],
        "val_time_limit": 3600,
    },
    final_step=LATE_STEPS[-1],
    curve_steps=LATE_STEPS,
    seeds=tuple(range(100, 108)),
    suites=(),
    plus_suite="",
    collect={**MINI.collect, "tasks": "7", "episodes": 60, "seed": 100, "scene": "moved"},
    reach={**MINI.reach, "task_ids": "7", "scene": "moved", "num_trials_per_task": 20},
)
_FRAMES = {"tasks": "libero_object:7;libero_object:9", "episodes": 20, "frames": 10, "seed": 100, "scene": "moved"}


@dataclass(frozen=True)
class Measure:
    """One number of a trained policy.

    Attributes:
        read: takes it from a result file.
        sign: +1 where more is better, -1 where less is.
        tested: one of the hypotheses, else only reported.
    """

    name: str
    read: Callable[[Record], float | None]
    sign: int
    tested: bool = False


def _mean_of_states(name: str) -> Callable[[Record], float | None]:
    """Mean over all states but the embeddings, of the third-person view."""
    return lambda record: statistics.mean(views[0] for views in record["readout"][name][1:])


def _miss_cm(record: Record) -> float | None:
    misses = [part["miss"] for part in record["reach"]]
    return None if None in misses else 100 * statistics.mean(misses)


DEPTH = Measure("depth in the tokens (R2 above the place)", _mean_of_states("depth"), +1, tested=True)
ERROR = Measure("held-out action error (L1)", lambda record: record["validation"]["val/action_loss"], -1, tested=True)
REACH = Measure("first closing beside the object (cm)", _miss_cm, -1)
POSE = Measure("camera pose in the tokens (R2)", _mean_of_states("pose"), +1)
MEASURES = (DEPTH, ERROR, REACH, POSE)


def make_paths(out: Path, seeds: Sequence[int] = ()) -> StudyPaths:
    """Folders of the regime; other seeds than the registered ones are for trying it out."""
    profile = replace(
        REGIME,
        vla_path=str(ROOT / REGIME.vla_path),
        teacher_path=str(ROOT / REGIME.teacher_path),
        seeds=tuple(seeds) or REGIME.seeds,
    )
    return StudyPaths(profile, out.resolve(), out.resolve() / "data")


def frames_job(paths: StudyPaths, further: Mapping[str, object] | None = None) -> Job:
    """Frames with geometry, which every policy's tokens are read on; `further` flags are put over the regime's."""
    folder = paths.out / "frames"
    flags = {"out": folder, **_FRAMES, **(further or {})}
    return Job(
        "frames", ("-m", "experiments.mini.make.teacher_data", *as_arguments(flags)), folder / "libero_object-9.npz"
    )


def measure_jobs(paths: StudyPaths, arm: Arm, seed: int) -> tuple[Job, ...]:
    """Measure where the late checkpoints close the hand, and what the last one's tokens tell."""
    folder = paths.out / "measures" / paths.run_id(arm, seed)
    late = ",".join(str(paths.checkpoint(arm, seed, step)) for step in LATE_STEPS)
    reach = {"checkpoint": late, **paths.profile.reach, "out_dir": folder}
    last = paths.checkpoint(arm, seed, LATE_STEPS[-1])
    readout = {"checkpoint": last, "frames_dir": paths.out / "frames", "out_dir": folder}
    return tuple(
        Job(f"{name}-{paths.run_id(arm, seed)}", ("vla-scripts/analyze.py", name, *as_arguments(flags)), result)
        for name, flags, result in (
            ("reach", reach, folder / "reach.json"),
            ("readout", readout, folder / "readout.json"),
        )
    )


def make_stages(paths: StudyPaths, results: Path = RESULTS) -> tuple[tuple[Chain, ...], ...]:
    """Data first, then seed by seed both arms, each with its measures and its result file."""

    def chain(arm: Arm, seed: int) -> Chain:
        jobs = (train_job(paths, arm, seed), *measure_jobs(paths, arm, seed))
        return Chain(jobs, lambda: write_result(paths, arm, seed, results))

    preparation = (Chain((collect_job(paths),)), Chain((frames_job(paths),)))
    return preparation, tuple(chain(arm, seed) for seed in paths.profile.seeds for arm in ARMS)


def write_result(paths: StudyPaths, arm: Arm, seed: int, results: Path) -> Path:
    """Gather one policy's numbers in `results/confirmation/ARM-seedN.json`."""
    run_id = paths.run_id(arm, seed)
    run, measures = paths.out / "runs" / run_id, paths.out / "measures" / run_id
    flags = read_record(paths.checkpoint(arm, seed, LATE_STEPS[-1]))
    validation = [row for row in read_log(run / LOG_FILE) if "val/action_loss" in row]
    record = {
        "format_version": FORMAT_VERSION,
        "arm": arm.name,
        "label": arm.label,
        "seed": seed,
        "code": flags["code"],
        "versions": flags["versions"],
        "configuration": portable(paths, flags),
        "training": training_curves(run),
        "validation": validation[-1],
        "reach": read_json(measures / "reach.json")["subjects"],
        "readout": read_json(measures / "readout.json")["subjects"][0],
    }
    path = results / paths.profile.name / f"{run_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(record) + "\n")
    return path


def values_of(records: Sequence[Record], arm: Arm, measure: Measure) -> dict[int, float]:
    """Seed -> the measure, of the seeds that have it."""
    values = {record["seed"]: measure.read(record) for record in records if record["arm"] == arm.name}
    return {seed: value for seed, value in values.items() if value is not None}


def verdict(measure: Measure, values: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """The registered test's answer; "not complete" without all registered seeds."""
    if not measure.tested:
        return "not tested"
    if not set(REGIME.seeds) <= values.keys() & reference.keys():
        return "not complete"
    registered = {seed: values[seed] for seed in REGIME.seeds}
    paired = paired_by_seed(registered, reference)
    assert paired is not None
    if paired.p_value >= THRESHOLD:
        return "no difference shown"
    return "better with ROCKET" if measure.sign * paired.mean > 0 else "worse with ROCKET"


def write_verdict(results: Path = RESULTS) -> Table | None:
    """The table of all measures, also as `results/confirmation/verdict.md`; None without results."""
    folder = results / REGIME.name
    records: list[dict[str, Any]] = [read_json(file) for file in sorted(folder.glob("*-seed*.json"))]
    if not records:
        return None
    rows = []
    for measure in MEASURES:
        without, aligned = (values_of(records, arm, measure) for arm in ARMS)
        paired = paired_by_seed(aligned, without)
        means = (f"{statistics.mean(values.values()):.3f}" if values else "" for values in (without, aligned))
        compared = paired.text(digits=3) if paired else ""
        rows.append((measure.name, *means, compared, verdict(measure, aligned, without)))
    table = Table(("measure", "no alignment", "ROCKET", "difference paired by seed", "registered test"), tuple(rows))
    commits = sorted({record["code"].get("commit", "unknown")[:10] for record in records})
    lines = ["# Confirmation", "", f"Code {', '.join(commits)}. What was registered: docs/confirmation.md.", ""]
    atomic_write(folder / "verdict.md", "\n".join([*lines, *markdown_table(*table), ""]))
    return table
