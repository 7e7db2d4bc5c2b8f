"""Flags of the mini teacher's training, apart from the code that they set: importing them is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.mini.make.teacher_data import parse_tasks
from prismatic.util.errors import UsageError
from prismatic.util.flags import check, limited


@dataclass
class TrainTeacherConfig:
    """Train the mini teacher on frames of teacher_data."""

    # Folder of teacher_data's shards
    data: Path
    # Folder for checkpoint.pt, log.jsonl and evaluation.json
    out: Path
    # Folder for the teacher: config.json, model.safetensors, its readouts, scores and examples; not written if absent
    weights: Path | None = None
    train_tasks: str = "libero_object:0-7;libero_spatial:0-7;libero_goal:0,8"
    held_out_tasks: str = "libero_object:8-9;libero_spatial:8-9"
    steps: int = limited(2500, least=1)
    batch_size: int = limited(16, least=1)
    learning_rate: float = limited(2e-3, above=0)
    weight_decay: float = limited(0.05, least=0)
    warmup_steps: int = limited(100, least=1)
    ema_decay: float = limited(0.995, above=0, below=1)
    # Sizes; see rocket_align.teacher.vggt.config
    image_size: int = limited(84, least=1)
    embed_dim: int = limited(64, least=1)
    depth: int = limited(6, least=1)
    num_heads: int = limited(2, least=1)
    mlp_ratio: float = limited(2.0, above=0)
    vit_depth: int = limited(2, least=1)
    num_register_tokens: int = limited(2, least=0)
    # Side of the square of depth cells per patch
    cells: int = limited(4, least=1)
    # Train the readouts alone, on a random aggregator
    control: bool = False
    log_every: int = limited(50, least=1)
    save_every: int = limited(100, least=1)
    # CPU threads; 0 leaves the choice to PyTorch
    threads: int = limited(0, least=0)
    seed: int = limited(0, least=0)

    def __post_init__(self) -> None:
        parse_tasks("--train_tasks", self.train_tasks)
        parse_tasks("--held_out_tasks", self.held_out_tasks)
        check(self)
        if self.control and self.weights is not None:
            raise UsageError("--weights: not with --control true, whose aggregator is random; leave one of them out")
