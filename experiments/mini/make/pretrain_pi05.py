"""The pretraining of the mini pi0.5, by the fine-tuning script itself; resumable like that of the mini student.

    python -m experiments.mini.make.pretrain_pi05 --data_root_dir DATA --work runs/mini_pi05

All weights train with the flow-matching loss, without alignment. As in openpi's LIBERO recipe the policy sees two
cameras and no state. The export is what the repository ships: weights rounded to bfloat16, tokenizer, statistics and a
card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.mini.make.pretrain_student import (
    ROOT,
    PretrainConfig,
    pretrain,
    refuse_missing_data,
    training_flags,
)
from prismatic.util.cli import run
from prismatic.util.flags import limited


@dataclass
class PretrainPi05Config(PretrainConfig):
    """The defaults are those of the shipped weights' second part: 4,000 steps, resumed from a run of 1,200 with a
    cosine of its own."""

    work: Path = Path("runs/mini_pi05")  # Initial weights, checkpoints and logs
    out: Path = ROOT / "experiments" / "mini" / "weights" / "pi05"  # The exported model
    max_steps: int = limited(4000, least=1)  # Optimizer steps
    batch_size: int = limited(16, least=1)  # Samples per step
    learning_rate: float = limited(1.5e-3, above=0)  # Peak learning rate
    save_freq: int = limited(200, least=1)  # Steps between checkpoints


def main(config: PretrainPi05Config) -> int:
    """Pretrain the mini pi0.5; returns the training script's exit code."""
    from experiments.mini.make.pi05_student import write_student

    refuse_missing_data(config)
    start = config.work / "init"
    if not (start / "tokenizer.json").is_file():
        write_student(start, config.seed)
    return pretrain(
        config,
        training_flags(
            config,
            start,
            {
                "use_proprio": False,
                "lr_warmup_steps": 50,
                "repeated_diffusion_steps": 8,
                "ema_decay": 0.99,
                "image_aug": False,
            },
        ),
    )


if __name__ == "__main__":
    run(PretrainPi05Config, main)
