"""The mini teacher's training: batches of frames, optimizer, moving average, scores on held-out tasks."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.mini.make.teacher_data import TrainTeacherConfig, parse_tasks
from experiments.mini.make.teacher_frames import (
    FrameSet,
    Targets,
    crop_images,
    draw_crops,
    geometry,
    jitter_colors,
    load_frames,
)
from experiments.mini.make.teacher_model import READOUT_NAME, TeacherModel, readout_loss, scores, summarize
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, atomic_path, atomic_write, refuse_no_folder
from prismatic.util.progress import progress_bar
from rocket_align.teacher.vggt.config import AGGREGATOR_PREFIX, VGGTConfig, save_folder

CHECKPOINT = "checkpoint.pt"
_SCALE_FRAMES = 1024
_EXAMPLES = 8
_EMA_WARMUP = 10


def learning_rate(cfg: TrainTeacherConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def training_batch(cfg: TrainTeacherConfig, frames: FrameSet, step: int, grid: int) -> tuple[Tensor, Targets]:
    """Images and targets of one step: a function of (seed, step) alone, so a resumed run sees the same batches."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    chosen = torch.randint(len(frames), (cfg.batch_size,), generator=generator)
    crops = draw_crops(cfg.batch_size, frames.images.shape[1], generator)
    images = jitter_colors(crop_images(frames.images[chosen], crops), generator)
    return images, geometry(frames, chosen, crops, grid)


def held_out_batches(frames: FrameSet, grid: int, batch_size: int) -> Iterator[tuple[Tensor, Targets]]:
    """All frames in order, centrally cropped."""
    for chosen in torch.arange(len(frames)).split(batch_size):
        crops = draw_crops(len(chosen), frames.images.shape[1], None)
        yield crop_images(frames.images[chosen], crops), geometry(frames, chosen, crops, grid)


def vggt_config(cfg: TrainTeacherConfig) -> VGGTConfig:
    """VGGT's configuration at these sizes; LayerScale starts at 1, since the model is not deep."""
    return VGGTConfig(
        image_size=cfg.image_size,
        embed_dim=cfg.embed_dim,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_ratio,
        num_register_tokens=cfg.num_register_tokens,
        layer_scale_init=1.0,
        vit_depth=cfg.vit_depth,
        vit_num_heads=cfg.num_heads,
        vit_mlp_ratio=cfg.mlp_ratio,
        vit_num_register_tokens=0,
    )


class Trainer:
    """Model, optimizer and moving average of one run."""

    def __init__(self, cfg: TrainTeacherConfig, train: FrameSet, held_out: FrameSet) -> None:
        self.cfg, self.train, self.held_out = cfg, train, held_out
        torch.manual_seed(cfg.seed)
        self.model = TeacherModel(vggt_config(cfg), cfg.cells)
        self.grid = self.model.aggregator.config.grid_size * cfg.cells
        if cfg.control:
            self.model.aggregator.requires_grad_(False)
        generator = torch.Generator().manual_seed(cfg.seed)
        chosen = torch.randperm(len(train), generator=generator)[:_SCALE_FRAMES]
        crops = draw_crops(len(chosen), train.images.shape[1], generator)
        self.model.scale.fit(geometry(train, chosen, crops, self.grid))
        self.average: TeacherModel = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=cfg.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.step, self.seconds = 0, 0.0

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        return [{"params": matrices, "weight_decay": self.cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    def train_step(self) -> float:
        """One optimizer step; returns its loss."""
        images, targets = training_batch(self.cfg, self.train, self.step, self.grid)
        wanted = self.model.scale.standardize(targets)
        predictions = self.model(images)
        loss = torch.stack([readout_loss(prediction, wanted, targets.kinds_BVGG) for prediction in predictions]).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        return float(loss.detach())

    def _update_average(self) -> None:
        decay = min(self.cfg.ema_decay, self.step / (self.step + _EMA_WARMUP))
        with torch.no_grad():
            new: list[Tensor] = list(self.model.parameters())
            old: list[Tensor] = list(self.average.parameters())
            torch._foreach_lerp_(old, new, 1 - decay)

    def evaluate(self) -> dict[str, Any]:
        """Scores on the held-out tasks: each layer's readout, and two baselines that do not look at the picture."""
        collected: dict[str, list[dict[str, Tensor]]] = {}
        constants = self._constant_predictions()
        with torch.no_grad():
            for images, targets in held_out_batches(self.held_out, self.grid, self.cfg.batch_size):
                for layer, prediction in enumerate(self.average(images)):
                    restored = self.average.scale.restore(prediction, targets.kinds_BVGG)
                    collected.setdefault(f"layer_{layer}", []).append(scores(restored, targets))
                for name, constant in constants.items():
                    repeated = {key: part.expand_as(getattr(targets, key)) for key, part in vars(constant).items()}
                    collected.setdefault(name, []).append(scores(Targets(**repeated), targets))
        return {name: summarize(batches) for name, batches in collected.items()}

    def _constant_predictions(self) -> dict[str, Targets]:
        """The training frames' means: one number per view, and one per cell of a view."""
        scale = self.model.scale
        depth, points, camera = scale.depth_mean[None, ..., 0], scale.points_mean[None], scale.camera_mean[None]
        flat_depth = depth.mean(dim=(-2, -1), keepdim=True).expand_as(depth)
        flat_points = points.mean(dim=(2, 3), keepdim=True).expand_as(points)
        kinds = torch.zeros_like(depth, dtype=torch.uint8)
        return {
            "mean_of_view": Targets(flat_depth.exp(), flat_points, kinds, camera),
            "mean_of_cell": Targets(depth.exp(), points, kinds, camera),
        }

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        sizes = {name: str(value) for name, value in asdict(self.cfg).items()}
        return {
            "config": sizes,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, path: Path) -> None:
        """Continue from `path`. Raises UsageError when that checkpoint was made with other flags."""
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            raise UsageError(f"--out: {path} is not readable, cut off? ({one_line(error, 120)})") from error
        current = self.state()["config"]
        free = {"data", "out", "weights", "log_every", "save_every", "threads"}
        other = [name for name in current if name not in free and stored["config"].get(name) != current[name]]
        if other:
            flags = ", ".join(f"{name} {stored['config'].get(name)}" for name in other)
            raise UsageError(f"--out: {path} was made with {flags}; use the same flags or another folder")
        self.model.load_state_dict(stored["model"])
        self.average.load_state_dict(stored["average"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.step, self.seconds = stored["step"], stored["seconds"]


def _train(trainer: Trainer) -> None:
    """The loop: log every `log_every` steps, checkpoint every `save_every` and at the end."""
    cfg, losses = trainer.cfg, []
    with progress_bar() as progress:
        bar = progress.add_task("train", total=cfg.steps, completed=trainer.step, info="")
        while trainer.step < cfg.steps:
            started = time.perf_counter()
            losses.append(trainer.train_step())
            trainer.seconds += time.perf_counter() - started
            progress.advance(bar)
            if trainer.step % cfg.log_every == 0 or trainer.step == cfg.steps:
                mean = sum(losses) / len(losses)
                line = {"step": trainer.step, "loss": round(mean, 5), "seconds": round(trainer.seconds, 1)}
                with (cfg.out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                progress.update(bar, info=f"loss {mean:.4f}")
                losses = []
            if trainer.step % cfg.save_every == 0 or trainer.step == cfg.steps:
                with atomic_path(cfg.out / CHECKPOINT) as temporary:
                    torch.save(trainer.state(), temporary)


def _write_weights(trainer: Trainer, folder: Path, evaluation: str) -> None:
    average = trainer.average
    weights = {AGGREGATOR_PREFIX + name: value for name, value in average.aggregator.state_dict().items()}
    save_folder(folder, average.aggregator.config, weights)
    with atomic_path(folder / READOUT_NAME) as temporary:
        heads = {**average.readouts.state_dict(prefix="readouts."), **average.scale.state_dict(prefix="scale.")}
        save_file({name: value.contiguous() for name, value in heads.items()}, temporary)
    _write_examples(trainer, folder)
    atomic_write(folder / "evaluation.json", evaluation)


def _write_examples(trainer: Trainer, folder: Path) -> None:
    """A few held-out frames as the model sees them, with their depth: enough to see that the weights work."""
    frames = trainer.held_out
    chosen = torch.linspace(0, len(frames) - 1, min(_EXAMPLES, len(frames))).long()
    crops = draw_crops(len(chosen), frames.images.shape[1], None)
    targets = geometry(frames, chosen, crops, trainer.grid)
    images = (crop_images(frames.images[chosen], crops) * 255).round().to(torch.uint8)
    with atomic_path(folder / "examples.npz") as temporary:
        np.savez_compressed(
            temporary, images=images.numpy(), depths=targets.depth_BVGG.half().numpy(), kinds=targets.kinds_BVGG.numpy()
        )


def train(cfg: TrainTeacherConfig) -> None:
    """Train, evaluate, save."""
    refuse_no_folder("--out", cfg.out)
    if cfg.weights is not None:
        refuse_no_folder("--weights", cfg.weights)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    train = load_frames(cfg.data, parse_tasks("--train_tasks", cfg.train_tasks), cfg.image_size)
    held_out = load_frames(cfg.data, parse_tasks("--held_out_tasks", cfg.held_out_tasks), cfg.image_size)
    cfg.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg, train, held_out)
    if (cfg.out / CHECKPOINT).is_file():
        trainer.load(cfg.out / CHECKPOINT)
    _train(trainer)
    held_out_scores = trainer.evaluate()
    report = {
        "train_frames": len(train),
        "held_out_frames": len(held_out),
        "steps": trainer.step,
        "train_seconds": round(trainer.seconds),
        "control": cfg.control,
        "held_out": held_out_scores,
    }
    evaluation = json.dumps(report, indent=2) + "\n"
    atomic_write(cfg.out / "evaluation.json", evaluation)
    if cfg.weights is not None:
        _write_weights(trainer, cfg.weights, evaluation)
    for name, values in held_out_scores.items():
        print(f"{name:13}", " ".join(f"{key} {value:.3f}" for key, value in values.items()))
