"""Pretrain the mini student by behavior cloning, with the fine-tuning script itself, and export it.

    python -m experiments.mini.make.pretrain_student --data_root_dir DATA --work runs/mini_student

All weights train (no LoRA, no alignment). The run is resumable: the same command goes on at its last checkpoint. The
export is what the repository ships: weights rounded to bfloat16, heads, processor, statistics and a card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.reproduce.jobs import start_or_resume
from prismatic.training.folders import last_checkpoint
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path, atomic_write

ROOT = Path(__file__).resolve().parents[3]
RUN_ID = "student"


@dataclass
class PretrainConfig:
    """The settings that made the shipped weights are the defaults."""

    data_root_dir: Path = Path("data/pretrain")  # Folder of the demonstrations (RLDS)
    dataset_name: str = "libero_object_no_noops"  # Datasets, comma list
    work: Path = Path("runs/mini_student")  # Initial weights, checkpoints and logs
    out: Path = ROOT / "experiments" / "mini" / "weights" / "student"  # The exported model
    max_steps: int = 3000  # Optimizer steps
    batch_size: int = 32  # Samples per step
    learning_rate: float = 1e-3  # Peak learning rate
    weight_decay: float = 0.05  # AdamW weight decay
    seed: int = 0  # Initialization, shuffling and augmentation
    save_freq: int = 500  # Steps between checkpoints


def initialize(config: PretrainConfig) -> Path:
    """A randomly initialized student on disk."""
    from experiments.mini.make.student_config import build_student

    folder = config.work / "init"
    if not (folder / "tokenizer.json").is_file():
        model, processor = build_student(config.seed)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def training_flags(config: PretrainConfig) -> list[str]:
    """The fine-tuning script's flags, resuming where a checkpoint is found."""
    values = {
        "recipe": "baseline",
        "use_lora": False,
        **start_or_resume(config.work / RUN_ID, lambda: initialize(config)),
        "data_root_dir": config.data_root_dir,
        "dataset_name": config.dataset_name,
        "run_root_dir": config.work,
        "run_id_override": RUN_ID,
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "scheduler": "CosineAnnealingLR",
        "lr_warmup_steps": 100,
        "max_grad_norm": 1.0,
        "max_steps": config.max_steps,
        "save_freq": config.save_freq,
        "seed": config.seed,
        "num_workers": 1,
        "wandb_log_freq": 50,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def export(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint's model, rounded to bfloat16, heads, processor and statistics; no training state."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(checkpoint / "model.safetensors").items()}
    with atomic_path(out / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    for old in out.glob("*_checkpoint.pt"):
        old.unlink()
    copied = ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "dataset_statistics.json"]
    for source in [checkpoint / name for name in copied] + sorted(checkpoint.glob("*_checkpoint.pt")):
        shutil.copyfile(source, out / source.name)
    model = json.loads((checkpoint / "config.json").read_text())
    atomic_write(out / "config.json", json.dumps({**model, "dtype": "bfloat16"}, indent=2) + "\n")


def main(config: PretrainConfig) -> int:
    """Train (or go on) and export; returns the training script's exit code."""
    if not config.data_root_dir.is_dir():
        raise UsageError(f"--data_root_dir: no such folder: {config.data_root_dir}")
    finished = last_checkpoint(config.work / RUN_ID)
    if finished is None or f"--{config.max_steps}_" not in finished.name:
        command = [sys.executable, "vla-scripts/finetune.py", *training_flags(config)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            return code
    checkpoint = last_checkpoint(config.work / RUN_ID)
    assert checkpoint is not None
    export(checkpoint, config.out)
    print(f"exported {checkpoint} to {config.out}")
    return 0


if __name__ == "__main__":
    run(PretrainConfig, main)
