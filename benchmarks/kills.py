"""Kill a training run at random moments, start it again each time, and compare its end with an uninterrupted run's.

    python benchmarks/kills.py --data_root_dir data/demo --dataset_name libero_object_no_noops --kills 20

The moments take turns: in the start-up, in a step, in a save, while the model is merged. The command is the same every
time, as a cluster starts a job again. Exit code 1 if any tensor of the last checkpoint differs by a bit.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.checkpoint.layout import LOG_FILE, STATE_FILE, last_checkpoint, split_checkpoint_name
from prismatic.training.metrics import PACE, read_log
from prismatic.util.cli import run
from prismatic.util.files import atomic_write
from prismatic.util.flags import limited

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ("step", "save", "start-up", "merge")
_POLL_SECONDS = 0.002


@dataclass
class KillsConfig:
    data_root_dir: Path = Path("data/demo")  # Folder that holds the RLDS dataset
    dataset_name: str = "libero_object_no_noops"
    kills: int = limited(20, least=1)
    max_steps: int = limited(30, least=1)
    save_freq: int = limited(2, least=1)
    seed: int = limited(0, least=0)  # Of the moments
    work_dir: Path = Path("runs/kills")  # Emptied first
    out: str = "benchmarks/results/kills.json"


def main(config: KillsConfig) -> int:
    """Train twice, once with kills; returns 0 if both end alike."""
    shutil.rmtree(config.work_dir, ignore_errors=True)
    straight, killed = (config.work_dir / name for name in ("straight", "killed"))
    began = time.monotonic()
    assert os.waitpid(_start(config, straight), 0)[1] == 0
    seconds = time.monotonic() - began
    moments = Counter(kill_at_moments(lambda: _start(config, killed), killed / "run", config.kills, config.seed))
    differing, compared = compare(straight / "run", killed / "run", config.max_steps)
    results = {"kills": dict(moments), "tensors": compared, "differing": differing, "seconds": round(seconds, 1)}
    atomic_write(config.out, json.dumps(results, indent=2) + "\n")
    print(f"{sum(moments.values())} kills ({dict(moments)}): {len(differing)} of {compared} tensors and lines differ")
    return 1 if differing or sum(moments.values()) < config.kills else 0


def _start(config: KillsConfig, runs: Path) -> int:
    weights = ROOT / "experiments" / "mini" / "weights"
    flags = f"""--recipe rocket --vla_path {weights / "student"} --vggt_path {weights / "teacher"} --resume True
        --data_root_dir {config.data_root_dir} --dataset_name {config.dataset_name} --run_root_dir {runs}
        --run_id_override run --num_images_in_input 2 --use_proprio True --batch_size 4 --lora_dropout 0.1
        --max_steps {config.max_steps} --save_freq {config.save_freq} --wandb_log_freq 1 --trackers none"""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "log.txt").open("a") as log:
        command = [sys.executable, str(ROOT / "vla-scripts" / "finetune.py"), *flags.split()]
        return subprocess.Popen(command, stdout=log, stderr=log).pid


def kill_at_moments(start: Callable[[], int], run_dir: Path, kills: int, seed: int = 0) -> Iterator[str]:
    """Kill the process whose number `start` returns, and start it again, `kills` times; then let it end.

    Yields:
        The moment of each kill; fewer than `kills` where the run ends before.

    Raises:
        RuntimeError: it ended by itself with another exit code than 0.
    """
    chance = random.Random(seed)
    start_up = 1.0  # Seconds to the first step, as last seen.
    for moment in itertools.islice(itertools.cycle(MOMENTS), kills):
        process, began = start(), time.monotonic()
        last = last_checkpoint(run_dir)
        done = split_checkpoint_name(last.name)[1] or 0 if last else 0
        wait = chance.uniform(0, start_up) if moment == "start-up" else None
        while not _is_now(moment, run_dir, done, None if wait is None else time.monotonic() - began > wait):
            if _ended(process):
                return
            time.sleep(_POLL_SECONDS)
        if moment == "step":
            start_up = time.monotonic() - began
        time.sleep(chance.uniform(0, 0.1 if moment == "step" else 0.02))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        yield moment
    process = start()
    while not _ended(process):
        time.sleep(0.05)


def _is_now(moment: str, run_dir: Path, done: int, late: bool | None) -> bool:
    if late is not None:
        return late
    if moment == "step":
        rows = read_log(run_dir / LOG_FILE)
        return bool(rows) and rows[-1]["step"] > done
    saving = next(run_dir.parent.glob(f".{run_dir.name}*.tmp"), None)
    if moment == "merge" and saving is not None:
        adapter = (saving / "lora_adapter" / "adapter_model.safetensors").is_file()
        return adapter and not (saving / "model.safetensors").is_file()
    return saving is not None


def _ended(process: int) -> bool:
    number, status = os.waitpid(process, os.WNOHANG)
    if number and status:
        raise RuntimeError(f"training ended by itself with exit code {os.waitstatus_to_exitcode(status)}")
    return bool(number)


def compare(expected: Path, actual: Path, step: int) -> tuple[list[str], int]:
    """Names of the tensors and log lines that differ between two runs at `step`, and how many were compared."""
    tensors = [_tensors(run_dir.with_name(f"{run_dir.name}--{step}_chkpt")) for run_dir in (expected, actual)]
    paces = dict.fromkeys(PACE, 0)
    rows = [[{**row, **paces} for row in read_log(run_dir / LOG_FILE)] for run_dir in (expected, actual)]
    differing = [f"line {index + 1}" for index, (row, other) in enumerate(zip(*rows)) if row != other]
    differing += [] if len(rows[0]) == len(rows[1]) else ["number of lines"]
    names = tensors[0].keys() | tensors[1].keys()
    differing += sorted(name for name in names if not _equal(tensors[0].get(name), tensors[1].get(name)))
    return differing, len(names) + len(rows[0])


def _equal(expected: torch.Tensor | None, actual: torch.Tensor | None) -> bool:
    import torch

    return expected is not None and actual is not None and torch.equal(expected, actual)


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, weights and training state, by file and place."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.rglob("*.safetensors"):
        tensors |= {f"{file.relative_to(checkpoint)}/{name}": value for name, value in load_file(file).items()}
    for file in [*checkpoint.glob("*.pt"), checkpoint / STATE_FILE]:
        content = torch.load(file, weights_only=True)
        tensors |= {f"{file.name}/{name}": value for name, value in _flat(content)}
    return tensors


def _flat(content: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _flat(value, f"{name}.{key}")
    elif isinstance(content, int | float):
        yield name, torch.tensor(content, dtype=torch.float64)


if __name__ == "__main__":
    run(KillsConfig, main)
