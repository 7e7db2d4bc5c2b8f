"""Measure what a feature store costs and what it does to the alignment, against the running teacher.

    python benchmarks/feature_store.py --checkpoint RUN--STEP_chkpt --teacher experiments/mini/weights/teacher

Needs a checkpoint that was trained with this teacher (its projectors make the losses mean something); its data, student
and flags are read from its run's record. Builds stores below --work_dir with the real command, compares targets and
losses on the same batches with and without each half of the augmentation, and trains a few steps with the real script,
online and stored in turns. Times want a quiet machine and OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.join import FinetuneConfig, build_alignment, plan_alignment, read_stored_targets
from prismatic.checkpoint.layout import component_file, read_record
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json
from prismatic.util.flags import limited, names, split_names
from prismatic.vla.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class BenchmarkConfig:
    checkpoint: Path = Path("demo/runs/rocket-seed0--200_chkpt")  # A *_chkpt folder of an aligned run
    teacher: str = "experiments/mini/weights/teacher"  # The teacher it was trained with
    # Number format : components of the stores to compare
    stores: str = names("int8:128,int8:32,int8:16,float16:128", some=True)
    data_fraction: float = limited(1.0, above=0, most=1)  # Part of the demonstrations that is stored and trained on
    batches: int = limited(12, least=1)  # Batches that losses and cosines are averaged over
    batch_size: int = limited(32, least=1)
    steps: int = limited(25, least=6)  # Training steps a timed run takes; the first five are left out
    rounds: int = limited(2, least=1)  # Timed runs of each kind
    work_dir: Path = Path("runs/feature_store_benchmark")  # Stores and runs go there
    out: Path = Path("benchmarks/results/feature_store.json")


def run_config(config: BenchmarkConfig) -> dict[str, Any]:
    """The flags of the checkpoint's run that decide its student, data and alignment."""
    kept = """data_root_dir dataset_name platform num_images_in_input use_proprio use_l1_regression lora_rank recipe
        learning_rate vla_path"""
    stored = read_record(config.checkpoint)
    return {name: stored[name] for name in kept.split()} | {"data_fraction": config.data_fraction}


def command_line(script: str, flags: Mapping[str, object]) -> list[str]:
    """A command of this project with these flags."""
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "vla-scripts" / script), *words]


def build(config: BenchmarkConfig, kind: str) -> tuple[Path, dict[str, object]]:
    """Build a store with the command, if it is not there; returns its folder and what it took."""
    dtype, components = kind.split(":")
    folder = config.work_dir / f"store-{dtype}-{components}"
    report = config.work_dir / f"{folder.name}.json"
    if report.is_file():
        return folder, read_json(report)
    flags = run_config(config) | {"feature_store": folder, "vggt_path": config.teacher, "store_dtype": dtype}
    flags = {name: value for name, value in flags.items() if name not in ("use_proprio", "use_l1_regression")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = command_line("build_feature_store.py", {**flags, "components": components, "batch_size": 32})
    subprocess.run([*command, "--num_workers", "1"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (index,) = [read_json(path) for path in folder.glob("*/index.json")]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    frames = index["frames"]
    took = {
        "frames": frames,
        "bytes_per_frame": round(size / frames),
        "build_seconds_per_frame": (time.perf_counter() - started) / frames,
        "build_cpu_seconds_per_frame": cpu / frames,
        "cosine_of_stored_features": index["cosine_of_stored_features"],
    }
    atomic_write(report, json.dumps(took))
    return folder, took


class Compared:
    """The checkpoint's student and alignment, with the teacher running, and a store read beside it."""

    def __init__(self, config: BenchmarkConfig) -> None:
        from prismatic.checkpoint.load import load_component
        from prismatic.training.module import TrainableVLA
        from prismatic.training.objectives import make_objective
        from prismatic.training.run import TrainingRun

        given = {name: value for name, value in run_config(config).items() if name != "vla_path"}
        known = {field.name for field in fields(FinetuneConfig)}
        self.flags = FinetuneConfig(
            **{name: value for name, value in given.items() if name in known and name != "data_root_dir"},
            data_root_dir=Path(given["data_root_dir"]),
            vla_path=str(config.checkpoint),
            vggt_path=config.teacher,
            resume=True,
            batch_size=config.batch_size,
            num_workers=0,
            mixed_precision="no",
            run_root_dir=config.work_dir,
            trackers="none",
        )
        self.align, width = plan_alignment(self.flags)
        self.training = TrainingRun(self.flags, {})
        self.alignment, self.online = build_alignment(self.training, self.align, width)
        file = component_file(config.checkpoint, "align_projectors")
        if file is None:
            raise UsageError(
                f"--checkpoint: {config.checkpoint} has no align_projectors; accepted: a checkpoint of an aligned run"
            )
        load_component(self.alignment, file)
        objective = make_objective(self.flags, self.training.platform, self.training.processor.tokenizer)
        self.module = TrainableVLA(self.training.parts, objective, self.alignment, auxiliary_coeff=self.align.coeff)
        self.module.eval()

    def batches(self, ranges: Any, count: int) -> Iterator[Batch]:
        """The first batches of training under an augmentation (None: without)."""
        from prismatic.vla.datasets.image_transforms import PolicyImageTransform

        data = self.training.dataset
        data.image_transform = PolicyImageTransform(data.image_transform.size, ranges)
        for number, batch in enumerate(self.training.batches()):
            if number == count:
                return
            yield batch

    def _attach(self, stores: dict[str, Path]) -> dict[str, Any]:
        """Let the loader read several stores; returns for each the function that makes targets from a batch."""
        readers, targets = {}, {}
        for kind, folder in stores.items():
            self.flags.feature_store = str(folder)
            targets[kind] = read_stored_targets(self.training, self.align)
            readers[kind] = self.training.dataset.extras
        self.training.dataset.extras = lambda *frame: {
            f"{kind} {name}": value for kind, reader in readers.items() for name, value in reader(*frame).items()
        }
        return targets

    def measure(self, stores: dict[str, Path], ranges: Any, count: int) -> dict[str, dict[str, float]]:
        """For each store the mean cosines between stored and online targets, and the losses against both."""
        import torch

        targets, tokens = self._attach(stores), self.module._num_vision_tokens()
        seen: dict[str, Any] = {}
        hook = self.alignment.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        sums: dict[str, dict[str, float]] = {kind: {} for kind in stores}
        for batch in self.batches(ranges, count):
            with torch.no_grad():
                running = self.online(batch)
                pooled = self.alignment.targets(running, tokens)
                online = float(self.module(batch, running).metrics["align_loss"])
                args, kwargs = seen["args"], seen["kwargs"]
                for kind, sum_of in sums.items():
                    parts = {k.removeprefix(f"{kind} "): v for k, v in batch["extras"].items() if k.startswith(kind)}
                    kept = targets[kind]({"extras": parts})
                    values = self._cosines(pooled, kept.pooled_KBNC) | {"loss_online": online}
                    values["loss_stored"] = float(self.alignment(*args, **{**kwargs, "teacher": kept}).loss)
                    for name, value in values.items():
                        sum_of[name] = sum_of.get(name, 0.0) + value / count
        hook.remove()
        return sums

    @staticmethod
    def _cosines(pooled_KBNC: Tensor, stored_KBNC: Tensor) -> dict[str, float]:
        import torch

        cosines = torch.cosine_similarity(pooled_KBNC, stored_KBNC, dim=-1)
        others = torch.cosine_similarity(pooled_KBNC, pooled_KBNC.roll(1, dims=1), dim=-1)
        by_pair = {f"cosine_pair_{pair}": float(value) for pair, value in enumerate(cosines.mean((1, 2)))}
        return {"cosine": float(cosines.mean()), "cosine_to_another_frame": float(others.mean()), **by_pair}

    def cpu_seconds(self, store: Path, count: int) -> dict[str, dict[str, float]]:
        """CPU seconds of this process for one batch: loading it, its targets, forward and backward (medians)."""
        import torch

        stored = self._attach({"": store})[""]
        read = self.training.dataset.extras
        times: dict[str, dict[str, list[float]]] = {}
        self.module.train()
        for kind, targets, extras in (("online", self.online, None), ("stored", stored, read)):
            self.training.dataset.extras = extras
            batches, rows = self.batches(augmentations()["crop and colors"], count), times.setdefault(kind, {})
            for _ in range(count):
                marks = [time.process_time()]
                batch = next(batches)
                if "extras" in batch:
                    batch["extras"] = {name.strip(): value for name, value in batch["extras"].items()}
                marks.append(time.process_time())
                with torch.no_grad():
                    wanted = targets(batch)
                marks.append(time.process_time())
                self.module(batch, wanted).loss.backward()
                marks.append(time.process_time())
                for name, first, last in zip(("loading", "targets", "forward and backward"), marks, marks[1:]):
                    rows.setdefault(name, []).append(last - first)
        self.module.eval()
        return {kind: {name: statistics.median(v) for name, v in rows.items()} for kind, rows in times.items()}


def augmentations() -> dict[str, Any]:
    """The training augmentation, its halves, and none."""
    from prismatic.vla.datasets.image_transforms import AugmentRanges

    full = AugmentRanges()
    crop = replace(full, brightness=0.0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0)
    return {"none": None, "crop": crop, "colors": replace(full, crop_area=1.0), "crop and colors": full}


def train(config: BenchmarkConfig, name: str, flags: Mapping[str, object]) -> dict[str, float]:
    """A short run of the real script; wall seconds a step (median) and the last steps' alignment loss."""
    from prismatic.training.metrics import read_log

    runs = config.work_dir / "runs"
    note = f"{name}-{time.time_ns()}"
    given = run_config(config) | {
        "run_root_dir": runs,
        "run_id_override": note,
        "batch_size": config.batch_size,
        "max_steps": config.steps,
        "wandb_log_freq": 1,
        "num_workers": 1,
        "trackers": "none",
        "merge_lora_during_training": False,
        **flags,
    }
    subprocess.run(command_line("finetune.py", given), check=True, env=dict(os.environ))
    rows = read_log(runs / note / "metrics.jsonl")
    result = {"seconds_per_step": statistics.median(row["seconds"] for row in rows[5:])}
    if "align_loss" in rows[-1]:
        result["align_loss_at_the_end"] = statistics.mean(row["align_loss"] for row in rows[-5:])
    return result


def main(config: BenchmarkConfig) -> None:
    """Measure and write the results."""
    config.work_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "teacher": config.teacher,
        "data_fraction": config.data_fraction,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_at_the_start": os.getloadavg()[0],
        "stores": {},
    }
    folders = {}
    for kind in split_names(config.stores):
        folders[kind], results["stores"][kind] = build(config, kind)
    compared, first = Compared(config), next(iter(folders.values()))
    for name, ranges in augmentations().items():
        for kind, values in compared.measure(folders, ranges, config.batches).items():
            results["stores"][kind].setdefault("augmentation", {})[name] = values
    results["cpu_seconds_of_a_batch"] = compared.cpu_seconds(first, config.batches)
    results["batch_size"] = config.batch_size
    atomic_write(config.out, json.dumps(results, indent=2) + "\n")
    kinds: dict[str, dict[str, Any]] = {
        "online": {"vggt_path": config.teacher},
        "stored": {"feature_store": first},
        "no alignment": {"recipe": "baseline"},
    }
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(config.rounds):
        for name, flags in kinds.items():
            timed[name].append(train(config, name.replace(" ", "-"), flags))
    results["training"] = timed
    results["load_average_at_the_end"] = os.getloadavg()[0]
    atomic_write(config.out, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    run(BenchmarkConfig, main)
