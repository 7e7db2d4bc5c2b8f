"""The share of the alignment's targets that the place of a token explains alone, with and without augmentation.

Needs a teacher and data, but no pass through the student: of it, only its images and its grid of tokens count.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch

from experiments.analysis.config import StaticConfig, teacher_source, training_config
from experiments.analysis.report import Report, line_style, new_figure, save_figure, write_json
from experiments.join import FinetuneConfig, plan_alignment
from prismatic.checkpoint.folder import resolve_checkpoint
from prismatic.policies import get_family
from prismatic.training.precision import make_accelerator
from prismatic.training.run import make_dataset
from prismatic.util.errors import UsageError
from prismatic.util.flags import check
from prismatic.vla.datasets import MixtureSampler, make_dataloader
from rocket_align.alignment import MultiLayerAlignment
from rocket_align.analysis.static import StaticShare, StaticTargets
from rocket_align.targets import TeacherTargets
from rocket_align.teacher.registry import load_teacher


class StaticStudy:
    """Teacher, pairs and data of one checkpoint or base model."""

    def __init__(self, config: StaticConfig, folder: str) -> None:
        check(config)
        self.flags = training_config(config, folder)
        self.flags.validate()
        self.align, teacher_dim = plan_alignment(self.flags)
        if not self.align.num_pairs:
            raise UsageError(
                f"{folder}: no alignment (recipe {self.flags.recipe_name}); accepted: one, with --vggt_path"
            )
        accelerator = make_accelerator(config.mixed_precision)
        self.device = accelerator.device
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        path, kind = teacher_source(self.flags)
        try:
            teacher = load_teacher(path, self.align.teacher_layers, kind, dtype=dtype, device=self.device)
        except ValueError as error:
            raise UsageError(f"--vggt_path: {error}") from error
        start = resolve_checkpoint(self.flags)
        self.family = get_family(start.kind)
        self.platform = self.family.platform(self.flags, start.base)
        self.processor = self.family.load_processor(start.base)
        self.targets = TeacherTargets(teacher, self.processor.image_processor)
        # No student's state is projected: its width is of no consequence.
        self.alignment = MultiLayerAlignment(self.align, 1, teacher_dim)
        side = self.processor.image_processor.input_sizes[0][-1] // self.family.patch_pixels(start.base)
        self.num_tokens = self.flags.num_images_in_input * side * side
        self.num_batches = math.ceil(config.num_samples / config.batch_size)

    def pixels(self, flags: FinetuneConfig) -> Iterator[torch.Tensor]:
        """`pixel_values` of the measured batches, the same samples at every call, augmented as the flags say."""
        data = make_dataset(flags, self.family, self.processor, self.platform, train=True)
        sampler = MixtureSampler(data, flags.batch_size, flags.seed, rank=0, world_size=1)
        loader = make_dataloader(data, sampler, self.family.collator(self.processor), flags.num_workers)
        for batch in itertools.islice(loader, self.num_batches):
            yield batch["pixel_values"].to(self.device)

    @torch.no_grad()
    def measure(self, *, image_aug: bool) -> StaticShare:
        """The numbers of the data, as training sees them with or without augmentation."""
        static = StaticTargets(self.flags.num_images_in_input)
        for pixels in self.pixels(dataclasses.replace(self.flags, image_aug=image_aug)):
            static.update(self.alignment.pooled_features(self.targets(pixels), self.num_tokens))
        return static.result()


def measure(config: StaticConfig, folder: str) -> Report:
    study = StaticStudy(config, folder)
    shares = {name: study.measure(image_aug=name == "augmented") for name in ("plain", "augmented")}
    return {
        "checkpoint": folder,
        "teacher": teacher_source(study.flags)[0],
        "dataset": study.flags.dataset_name,
        "samples": study.num_batches * config.batch_size,
        "seed": config.seed,
        "student_layers": study.align.student_layers,
        "teacher_layers": study.align.teacher_layers,
        **{
            name: {
                "explained_by_place": share.explained_KV,
                "loss_of_constant_per_place": share.constant_loss_KV,
                "remaining_variance": share.remaining_KV,
            }
            for name, share in shares.items()
        },
    }


def static(config: StaticConfig) -> int:
    """Measure, write static.json and static.png."""
    parts = [measure(config, folder) for folder in config.checkpoints]
    write_json(config.out_dir / "static.json", {"analysis": "static", "subjects": parts})
    draw(config, parts[0])
    for part in parts:
        for name in ("plain", "augmented"):
            share, loss = (part[name][key] for key in ("explained_by_place", "loss_of_constant_per_place"))
            print(
                f"{part['dataset']}, {name}: place explains {share.min():.0%} to {share.max():.0%} of the targets' "
                f"variance; a constant per place has a loss of {loss.min():.3f} to {loss.max():.3f}"
            )
    return 0


def draw(config: StaticConfig, part: Report) -> None:
    """Both numbers by pair: a color a view, dashed with augmentation."""
    figure = new_figure(6.6, 2.8)
    labels = [f"{s}-{t}" for s, t in zip(part["student_layers"], part["teacher_layers"])]
    for axes, key, title in zip(
        figure.subplots(1, 2),
        ("explained_by_place", "loss_of_constant_per_place"),
        ("share of variance explained by place", "alignment loss of a constant per place"),
    ):
        for name, line in (("plain", "-"), ("augmented", "--")):
            for view, values in enumerate(part[name][key].T.cpu()):
                label = f"view {view}" + (", augmented" if name == "augmented" else "")
                axes.plot(range(len(labels)), values, ls=line, label=label, **line_style(view))
        axes.set(xlabel="pair (student state - teacher block)", title=title)
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(labels)), labels, rotation=60)
    axes.legend(frameon=False)
    save_figure(figure, config.out_dir / "static.png")
