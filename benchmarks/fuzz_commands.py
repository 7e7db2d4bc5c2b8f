"""Commands that `fuzz.py` tries: their flags, and a command line of each that works on its inputs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prismatic.util.flags import limited, numbers

ROOT = Path(__file__).resolve().parents[1]
FINETUNE, STORE, DEPLOY = "vla-scripts/finetune.py", "vla-scripts/build_feature_store.py", "vla-scripts/deploy.py"
MERGE, PUSH = "vla-scripts/merge_lora_weights_and_save.py", "vla-scripts/push_to_hub.py"
SELECT, ANALYZE = "vla-scripts/select_layers.py", "vla-scripts/analyze.py"
EVALUATE = "experiments/robot/libero/run_libero_eval.py"
RESULTS = "experiments.robot.libero.results"
REGENERATE = "experiments/robot/libero/regenerate_libero_dataset.py"
HDF5 = "experiments/robot/libero/convert_hdf5_to_rlds.py"
ROBOTWIN = "experiments.robot.robotwin.convert"
COLLECT = "experiments.mini.collect"
FRAMES, TEACHER = "experiments.mini.make.teacher_data", "experiments.mini.make.train_teacher"
REPRODUCE, DEMO, PAGE = "experiments.reproduce", "experiments.reproduce.demo", "experiments.reproduce.training_page"
PATCHES = "patches"
PI_FINETUNE, ALOHA = f"{FINETUNE} --policy pi05", f"{EVALUATE} --task_suite_name gym_aloha"
TASKS = {"train_tasks": "libero_object:0", "test_tasks": "libero_object:1"}


@dataclass(frozen=True)
class Command:
    """A command's configuration, flags with which it works, and the flags that are paths.

    A flag whose name begins with "_" is a word without a flag.
    """

    config: type
    flags: dict[str, str]
    folders: tuple[str, ...] = ()  # Read
    files: tuple[str, ...] = ()  # Read
    written: tuple[str, ...] = ()  # Folders to write into
    written_files: tuple[str, ...] = ()

    def words(self, command: str, **changed: str) -> list[str]:
        """The command line, with some flags changed."""
        given = self.flags | changed
        named = (
            word for name, value in given.items() for word in ((value,) if name[0] == "_" else (f"--{name}", value))
        )
        return [*command.split(), *named]


def _config(place: str, name: str) -> type:
    """The class of a script's or module's flags."""
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(f"fuzzed_{Path(place).stem}", ROOT / place)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _flags(**kinds: Any) -> type:
    """Flags of a command whose parser declares none: a type, or a (type, field)."""
    fields = [(name, *(kind if isinstance(kind, tuple) else (kind, limited(None)))) for name, kind in kinds.items()]
    return make_dataclass("Flags", fields)


@cache
def commands(work: Path) -> dict[str, Command]:
    """Every command that is tried, set up for the inputs in `work`."""
    inputs, out = work / "in", work / "out"
    return _policy_commands(inputs, out) | _data_commands(inputs, out) | _look_commands(inputs, out)


def _policy_commands(inputs: Path, out: Path) -> dict[str, Command]:
    """To train, store, merge, publish, serve and evaluate."""
    checkpoint = f"{inputs}/runs/run--2_chkpt"
    acting = {"num_images_in_input": "2", "use_proprio": "True"}
    models = {"vla_path": f"{inputs}/student", "vggt_path": f"{inputs}/teacher", "data_root_dir": f"{inputs}/data"}
    training = {**models, **acting, "num_workers": "0", "max_steps": "2", "batch_size": "1", "trackers": "none"}
    training |= {"run_root_dir": f"{out}/runs", "run_id_override": "run", "lora_rank": "2"}
    store = {**models, **acting, "num_workers": "0", "feature_store": f"{out}/store", "fit_frames": "4"}
    push = {"checkpoint": checkpoint, "repo_id": "me/policy", "license": "mit", "base_model": "me/base"}
    merge = {"base_checkpoint": f"{inputs}/student", "lora_finetuned_checkpoint_dir": checkpoint}
    evaluation = {"pretrained_checkpoint": checkpoint, "local_log_dir": f"{out}/eval", "num_trials_per_task": "1"}
    layers, reads = ("align_layers_file",), ("vla_path", "vggt_path", "data_root_dir")
    finetune, evaluate = _config(FINETUNE, "FinetuneConfig"), _config(EVALUATE, "GenerateConfig")
    pi = {**training, "vla_path": f"{inputs}/pi05"}
    return {
        FINETUNE: Command(finetune, training, reads, layers, ("run_root_dir",)),
        PI_FINETUNE: Command(finetune, pi, reads, layers, ("run_root_dir",)),
        STORE: Command(_config(STORE, "StoreConfig"), store, reads, layers, ("feature_store",)),
        DEPLOY: Command(
            _config(DEPLOY, "DeployConfig"),
            {"pretrained_checkpoint": checkpoint, "port": "0", **acting},
            ("pretrained_checkpoint",),
            ("token_file",),
        ),
        MERGE: Command(
            _config(MERGE, "ConvertConfig"),
            {**merge, "output_dir": f"{out}/merged"},
            tuple(merge),
            written=("output_dir",),
        ),
        PUSH: Command(
            _config(PUSH, "PushConfig"), {**push, "dry_run": f"{out}/hub"}, ("checkpoint",), ("results",), ("dry_run",)
        ),
        EVALUATE: Command(
            evaluate, {**evaluation, **acting}, ("pretrained_checkpoint",), ("initial_states_path",), ("local_log_dir",)
        ),
        ALOHA: Command(evaluate, {**evaluation, **acting}, ("pretrained_checkpoint",), (), ("local_log_dir",)),
    }


def _data_commands(inputs: Path, out: Path) -> dict[str, Command]:
    """To make training data, of a simulator or of files."""
    raw = {"libero_task_suite": "libero_object", "task_ids": "0", "libero_raw_data_dir": f"{inputs}/hdf5"}
    collect = {"suite": "libero_object", "tasks": "0", "episodes": "1", "workers": "1", "out": f"{out}/data"}
    teacher = {"data": f"{inputs}/frames", "out": f"{out}/teacher", "steps": "1", "batch_size": "1", "depth": "2"}
    teacher |= {"train_tasks": TASKS["train_tasks"], "held_out_tasks": TASKS["test_tasks"]}
    return {
        REGENERATE: Command(
            _config(REGENERATE, "RegenerateConfig"),
            {**raw, "libero_target_dir": f"{out}/regenerated"},
            ("libero_raw_data_dir",),
            written=("libero_target_dir",),
        ),
        HDF5: Command(
            _config(HDF5, "ConvertConfig"),
            {"hdf5_dir": f"{inputs}/hdf5", "out": f"{out}/rlds"},
            ("hdf5_dir",),
            written=("out",),
        ),
        ROBOTWIN: Command(
            _config(ROBOTWIN, "ConvertConfig"),
            {"data_dir": f"{inputs}/robotwin", "out": f"{out}/robotwin"},
            ("data_dir",),
            written=("out",),
        ),
        COLLECT: Command(_config(COLLECT, "CollectConfig"), collect, written=("out",)),
        FRAMES: Command(
            _config(FRAMES, "TeacherDataConfig"), {"out": f"{out}/frames", "tasks": "libero_object:0"}, written=("out",)
        ),
        TEACHER: Command(_config(FRAMES, "TrainTeacherConfig"), teacher, ("data",), written=("out", "weights")),
    }


def _look_commands(inputs: Path, out: Path) -> dict[str, Command]:
    """To look into checkpoints and results, and to repeat studies."""
    checkpoint, written = f"{inputs}/runs/run--2_chkpt", ("out_dir",)
    subject = {"checkpoint": checkpoint, "vggt_path": f"{inputs}/teacher", "data_root_dir": f"{inputs}/data"}
    few = {"num_samples": "2", "batch_size": "2", "out_dir": f"{out}/analysis"}
    frames = {"frames_dir": f"{inputs}/frames", "out_dir": f"{out}/analysis", **TASKS}
    settings = "experiments.analysis.config"
    select = {**subject, "strategy": "uniform", "count": "2", "out": f"{out}/layers.json"}
    result = {
        f"{ANALYZE} {name}": Command(
            _config(settings, f"{name.capitalize()}Config"),
            {**subject, **few},
            tuple(subject),
            ("align_layers_file",),
            written,
        )
        for name in ("cka", "gradients", "projectors", "cone", "theorem", "static")
    }
    seconds = {"watch": (float, limited(0, least=1, most=3600)), "port": (int, limited(0, least=0, most=65535))}
    processes = {"processes": (int, limited(0, least=0)), "parallel": (int, limited(0, least=0))}
    profile, seeds = Literal["mini", "paper"], (str, numbers("", least=0))
    both = {"_a": f"{inputs}/results", "_b": f"{inputs}/results"}
    return result | {
        f"{ANALYZE} depth": Command(
            _config(settings, "DepthConfig"),
            {"vggt_path": f"{inputs}/teacher", **frames},
            ("vggt_path",),
            written=written,
        ),
        f"{ANALYZE} readout": Command(
            _config(settings, "ReadoutConfig"), {"checkpoint": checkpoint, **frames}, ("checkpoint",), written=written
        ),
        f"{ANALYZE} reach": Command(
            _config(settings, "ReachConfig"),
            {"checkpoint": checkpoint, "task_ids": "0", "out_dir": f"{out}/analysis"},
            ("checkpoint",),
            written=written,
        ),
        SELECT: Command(_config(settings, "SelectConfig"), select, ("checkpoint", "vggt_path"), written_files=("out",)),
        PAGE: Command(
            _flags(**seconds),
            {"_run": f"{inputs}/runs/run", "out": f"{out}/p.html"},
            ("_run", "eval"),
            (),
            (),
            ("out",),
        ),
        f"{REPRODUCE} run table8 --dry_run": Command(
            _flags(profile=profile, seeds=seeds, arms=(str, limited("", choices=("rocket",))), **processes), {}
        ),
        f"{REPRODUCE} confirm --dry_run": Command(_flags(seeds=seeds, parallel=processes["parallel"]), {}),
        f"{REPRODUCE} report": Command(_flags(profile=profile), {"out": f"{out}/report"}, written=("out",)),
        DEMO: Command(_config(DEMO, "DemoConfig"), {"out": f"{out}/demo"}, written=("out",)),
        f"{RESULTS} report": Command(_flags(), {"_a": f"{inputs}/results"}, ("_a",)),
        f"{RESULTS} compare": Command(_flags(), both, ("_a", "_b")),
        f"{RESULTS} merge": Command(
            _flags(), {"_a": f"{inputs}/results", "out": f"{out}/merged"}, ("_a",), (), ("out",)
        ),
        f"{RESULTS} page": Command(
            _flags(), {"_a": f"{inputs}/results", "out": f"{out}/page.html"}, ("_a",), (), (), ("out",)
        ),
        f"{PATCHES} check": Command(_flags(), {"_path": f"{inputs}/student"}, ("_path",)),
        f"{PATCHES} apply": Command(_flags(), {"_path": f"{inputs}/student"}, ("_path",)),
    }
