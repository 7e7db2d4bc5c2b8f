"""The commands behind a study: demonstrations, layer selection, fine-tuning, rollouts, analyses.

Everything is a command of this repository that can be run by hand; its log begins with the command line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.reproduce.jobs import Job, as_arguments
from experiments.reproduce.profiles import Profile
from experiments.reproduce.studies import Analysis, Arm, Study
from prismatic.checkpoint.layout import RUN_CONFIG
from prismatic.util.files import read_json
from prismatic.vla.datasets.specs import resolve_mixture
from rocket_align.teacher.store.layout import INDEX_NAME


@dataclass(frozen=True)
class StudyPaths:
    """Folders of a profile's runs, and how its commands are started.

    Attributes:
        out: datasets, runs, evaluations and logs.
        data_root_dir: RLDS data.
        processes: GPUs; 1 starts the scripts without accelerate's launcher.
        train, evaluate: flags put over the profile's.
        evaluated_once: every policy has one evaluation, named as its run is.
    """

    profile: Profile
    out: Path
    data_root_dir: Path
    processes: int = 1
    train: Mapping[str, object] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    evaluated_once: bool = False

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    def run_id(self, arm: Arm, seed: int) -> str:
        return f"{arm.name}-seed{seed}"

    def checkpoint(self, arm: Arm, seed: int, step: int) -> Path:
        return self.out / "runs" / f"{self.run_id(arm, seed)}--{step}_chkpt"

    def evaluation(self, arm: Arm, seed: int, step: int, suite: str) -> str:
        return self.run_id(arm, seed) + ("" if self.evaluated_once else f"-step{step}-{suite}")

    def layers_file(self, arm: Arm) -> Path:
        """The file that select_layers.py writes for an arm."""
        return self.out / "layers" / f"{arm.name}.json"

    def feature_store(self, arm: Arm) -> Path:
        """The folder that build_feature_store.py writes for an arm."""
        return self.out / "stores" / arm.name

    def analysis_folder(self, analysis: Analysis, seed: int) -> Path:
        """The files that analyze.py writes for a seed; the teacher has none."""
        return self.out / "analysis" / (f"{analysis.name}-seed{seed}" if analysis.arms else analysis.name)

    def launched(self, script: str, flags: Mapping[str, object]) -> tuple[str, ...]:
        """Arguments of the interpreter that run a script on all processes."""
        launcher: tuple[str, ...] = ()
        if self.processes > 1:
            # All values that the launcher would otherwise warn that it had to choose.
            launch = {
                "num_machines": 1,
                "mixed_precision": "no",
                "dynamo_backend": "no",
                "num_processes": self.processes,
            }
            launcher = ("-m", "accelerate.commands.launch", *as_arguments(launch))
        return (*launcher, script, *as_arguments(flags))


def collect_job(paths: StudyPaths) -> Job:
    """The scripted expert's demonstrations, of a profile that names them."""
    name = paths.profile.dataset_name
    flags = {**paths.profile.collect, "out": paths.data_root_dir, "name": name}
    result = paths.data_root_dir / name / "1.0.0" / "dataset_info.json"
    return Job("collect", ("-m", "experiments.mini.collect", *as_arguments(flags)), result)


def select_job(paths: StudyPaths, arm: Arm) -> Job:
    """Choose an arm's layers before training."""
    profile = paths.profile
    inputs = {name: profile.train[name] for name in ("num_images_in_input", "use_proprio")}
    flags = {
        "checkpoint": profile.vla_path,
        "vggt_path": profile.teacher_path,
        "data_root_dir": paths.data_root_dir,
        "dataset_name": profile.dataset_name,
        **inputs,
        **arm.selection,
        "out": paths.layers_file(arm),
    }
    arguments = ("vla-scripts/select_layers.py", *as_arguments(flags))
    return Job(f"select-{arm.name}", arguments, paths.layers_file(arm))


def store_job(paths: StudyPaths, arm: Arm) -> Job:
    """Compute an arm's teacher features before training."""
    flags = {"vla_path": paths.profile.vla_path, **_learning_flags(paths, arm)}
    # A mixture is finished when each of its data sets is.
    names = [name for name, _ in resolve_mixture(paths.profile.dataset_name)]

    def finished(store: Path) -> bool:
        return all((store / name / INDEX_NAME).is_file() for name in names)

    arguments = paths.launched("vla-scripts/build_feature_store.py", flags)
    return Job(f"store-{arm.name}", arguments, paths.feature_store(arm), finished)


def preparation_jobs(paths: StudyPaths, arm: Arm) -> tuple[Job, ...]:
    """Jobs that an arm needs once, before the first of its seeds is trained."""
    jobs = [select_job(paths, arm)] if arm.selection else []
    return (*jobs, store_job(paths, arm)) if arm.stored else tuple(jobs)


def _learning_flags(paths: StudyPaths, arm: Arm) -> dict[str, object]:
    """Flags of what is learned from: data, teacher, layers, and the budget."""
    profile = paths.profile
    return {
        "vggt_path": profile.teacher_path,
        "data_root_dir": paths.data_root_dir,
        "dataset_name": profile.dataset_name,
        **profile.train,
        **arm.flags,
        **({"align_layers_file": paths.layers_file(arm)} if arm.selection else {}),
        **({"feature_store": paths.feature_store(arm)} if arm.stored else {}),
    }


def train_job(paths: StudyPaths, arm: Arm, seed: int) -> Job:
    """LoRA fine-tuning of an arm; an unfinished run goes on at its last checkpoint."""
    profile, run_id = paths.profile, paths.run_id(arm, seed)
    flags = {
        "vla_path": profile.vla_path,
        "resume": True,
        "run_root_dir": paths.out / "runs",
        "run_id_override": run_id,
        "seed": seed,
        **_learning_flags(paths, arm),
        **({"save_specific_steps": ",".join(map(str, profile.curve_steps))} if profile.curve_steps else {}),
        **paths.train,
    }
    # Every checkpoint has it; config.json is in merged ones alone.
    result = paths.checkpoint(arm, seed, profile.final_step) / RUN_CONFIG
    return Job(f"train-{run_id}", paths.launched("vla-scripts/finetune.py", flags), result)


def rollouts_job(
    paths: StudyPaths, name: str, checkpoint: Path | str, suite: str, further: Mapping[str, object] | None = None
) -> Job:
    """Rollouts of a policy in one suite; `further` flags are put over the profile's."""
    profile = paths.profile
    flags = {
        "pretrained_checkpoint": checkpoint,
        "task_suite_name": suite,
        **(profile.plus if suite == profile.plus_suite else profile.evaluate),
        "local_log_dir": paths.out / "eval",
        "run_name": name,
        **paths.evaluate,
        **(further or {}),
    }
    arguments = paths.launched("experiments/robot/libero/run_libero_eval.py", flags)
    return Job(f"evaluate-{name}", arguments, paths.out / "eval" / name / "summary.json", is_complete)


def is_complete(summary: Path) -> bool:
    """Tell whether an evaluation ran all its episodes; the first of several processes to end writes a summary, too."""
    return summary.is_file() and not read_json(summary).get("missing")


def analysis_job(paths: StudyPaths, analysis: Analysis, seed: int) -> Job:
    profile = paths.profile
    folder = paths.analysis_folder(analysis, seed)
    flags: dict[str, object] = {}
    if analysis.arms:
        steps = profile.curve_steps if analysis.curve else (profile.final_step,)
        checkpoints = [str(paths.checkpoint(arm, seed, step)) for arm in analysis.arms for step in steps]
        flags["checkpoint"] = ",".join(checkpoints)
    if analysis.simulator:
        flags |= profile.reach
    else:
        flags |= {"data_root_dir": paths.data_root_dir} if analysis.arms else {}
        flags |= {"vggt_path": profile.teacher_path, **profile.analysis}
    flags["out_dir"] = folder
    arguments = ("vla-scripts/analyze.py", analysis.command, *as_arguments(flags))
    return Job(f"analyze-{folder.name}", arguments, folder / f"{analysis.command}.json")


def arm_jobs(paths: StudyPaths, study: Study, arm: Arm, seed: int) -> tuple[Job, ...]:
    """All commands of one arm and seed, in order."""
    profile = paths.profile
    steps = profile.curve_steps if study.curve else (profile.final_step,)
    suites = (*profile.suites, profile.plus_suite) if study.plus else profile.suites
    jobs = [*preparation_jobs(paths, arm), train_job(paths, arm, seed)]
    for suite, step in itertools.product(suites, steps):
        name, checkpoint = paths.evaluation(arm, seed, step, suite), paths.checkpoint(arm, seed, step)
        jobs.append(rollouts_job(paths, name, checkpoint, suite))
    return tuple(jobs)
