"""Flags of the mini teacher's training, apart from the code that they set: importing them is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.mini.make.teacher_data import parse_tasks
from prismatic.util.errors import UsageError
from rocket_align.teacher.vggt.config import VGGTConfig


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
    steps: int = 2500
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    ema_decay: float = 0.995
    # Sizes; see rocket_align.teacher.vggt.config
    image_size: int = 84
    embed_dim: int = 64
    depth: int = 6
    num_heads: int = 2
    mlp_ratio: float = 2.0
    vit_depth: int = 2
    num_register_tokens: int = 2
    # Side of the square of depth cells per patch
    cells: int = 4
    # Train the readouts alone, on a random aggregator
    control: bool = False
    log_every: int = 50
    save_every: int = 100
    # CPU threads; 0 leaves the choice to PyTorch
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        parse_tasks(self.train_tasks, "train_tasks")
        parse_tasks(self.held_out_tasks, "held_out_tasks")
        for name in ("steps", "batch_size", "warmup_steps", "cells", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}: got {getattr(self, name)}; accepted: 1 or more")
        if not 0 < self.ema_decay < 1:
            raise UsageError(f"--ema_decay: got {self.ema_decay}; accepted: between 0 and 1")
        if self.control and self.weights is not None:
            raise UsageError("--weights: not with --control true, whose aggregator is random; leave one of them out")

    def vggt_config(self) -> VGGTConfig:
        """VGGT's configuration at these sizes; LayerScale starts at 1, since the model is not deep."""
        return VGGTConfig(
            image_size=self.image_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            num_register_tokens=self.num_register_tokens,
            layer_scale_init=1.0,
            vit_depth=self.vit_depth,
            vit_num_heads=self.num_heads,
            vit_mlp_ratio=self.mlp_ratio,
            vit_num_register_tokens=0,
        )
