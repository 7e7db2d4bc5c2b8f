"""Builds and checks feature stores: the student's data and a teacher in, `rocket_align.teacher.store` files out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.join import StoreConfig
from prismatic.policies import family_of
from prismatic.training.precision import make_accelerator
from prismatic.training.run import make_dataset
from prismatic.util.errors import UsageError
from prismatic.util.progress import progress_bar
from prismatic.vla.batch import Batch
from rocket_align.targets import TeacherTargets
from rocket_align.teacher.registry import describe_teacher, load_teacher, teacher_hash
from rocket_align.teacher.store.codec import Basis
from rocket_align.teacher.store.layout import StoreError, StoreLayout, read_layout
from rocket_align.teacher.store.reader import DatasetFeatures
from rocket_align.teacher.store.writer import DatasetBuild, begin_store, fit_basis


class Frames:
    """The data set's un-augmented views, as the student's batches bring them to a teacher.

    Raises:
        UsageError: a student whose views are not square.
    """

    def __init__(self, config: StoreConfig, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._num_workers = config.num_workers
        family, start = family_of(config)
        family.check(config, start)
        processor = family.load_processor(start.base)
        self.image_processor = processor.image_processor
        self.patch_pixels = family.patch_pixels(start.base)
        plain = dataclasses.replace(config, image_aug=False)
        self.data = make_dataset(plain, family, processor, family.platform(config, start.base), train=True)
        self._collate = family.collator(processor)
        height, width = self.data.image_transform.size
        if height != width:
            raise UsageError(f"--vla_path: views of {height} x {width} pixels; accepted for a store: square ones")
        self.view_pixels = height

    def numbers(self, name: str) -> np.ndarray:
        """Frame numbers within a data set, ascending."""
        return np.sort(self.data.frame_numbers(name))

    def pixels(self, name: str, chunks: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """`pixel_values` of each chunk of frame numbers of a data set."""
        first = next(part.first for part in self.data.mixture if part.name == name)
        starts = self.data.frame_numbers(name)
        order = np.argsort(starts)
        keys = [(first + order[np.searchsorted(starts, chunk, sorter=order)]).tolist() for chunk in chunks]
        loader: DataLoader[Batch] = DataLoader(
            self.data, batch_sampler=keys, collate_fn=self._collate, num_workers=self._num_workers
        )
        for batch in loader:
            yield batch["pixel_values"].to(self.device, non_blocking=True)

    def spread(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """`pixel_values` of about `count` frames evenly spread over all data sets of the mixture."""
        total = len(self.data)
        for part in self.data.mixture:
            share = min(part.size, max(1, round(count * part.size / total)))
            numbers = self.numbers(part.name)[np.linspace(0, part.size - 1, share).astype(int)]
            yield from self.pixels(part.name, np.array_split(numbers, -(-share // batch_size)))


def plan_store(config: StoreConfig, frames: Frames, targets: TeacherTargets, layers: tuple[int, ...]) -> StoreLayout:
    """The layout; its grids come from one frame that the teacher sees."""
    info = describe_teacher(config.teacher, config.teacher_type)
    name = frames.data.mixture[0].name
    features = targets(next(frames.pixels(name, [frames.numbers(name)[:1]])))
    side = max(1, round(config.grid_scale * (frames.view_pixels // frames.patch_pixels)))
    return StoreLayout(
        teacher_kind=info.kind,
        teacher_hash=teacher_hash(config.teacher),
        teacher_depth=info.depth,
        layers=layers,
        channels=info.channels,
        components=min(config.components, info.channels),
        dtype=config.store_dtype,
        views=frames.data.views,
        view_pixels=frames.view_pixels,
        teacher_image_hw=features.image_hw,
        teacher_grid_hw=features.grid_hw,
        grid_hw=(min(side, features.grid_hw[0]), min(side, features.grid_hw[1])),
    )


def build(config: StoreConfig) -> None:
    """Build what is missing, with the launch's other processes. Raises UsageError for another store or data."""
    accelerator = make_accelerator(config.mixed_precision)
    frames = Frames(config, accelerator.device)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    try:
        depth = describe_teacher(config.teacher, config.teacher_type).depth
        family, start = family_of(config)
        align = config.align_config(family.depth(start.base), depth, indexing=family.indexing)
        layers = sorted(set(align.teacher_layers))
        teacher = load_teacher(config.teacher, layers, config.teacher_type, dtype=dtype, device=accelerator.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    targets = TeacherTargets(teacher, frames.image_processor)
    layout, root = plan_store(config, frames, targets, teacher.layers), Path(config.feature_store)
    fingerprints = frames.data.fingerprints()
    try:
        if accelerator.is_main_process:
            begin_store(root, layout)
            fit_basis(root, layout, targets, frames.spread(config.fit_frames, config.batch_size))
        accelerator.wait_for_everyone()
        begin_store(root, layout)
        basis = fit_basis(root, layout, targets, ()).to(accelerator.device)
        for name, fingerprint in fingerprints.items():
            work = DatasetBuild(root, name, fingerprint, layout, frames.numbers(name))
            shards = work.missing()[accelerator.process_index :: accelerator.num_processes]
            accelerator.wait_for_everyone()  # Nobody writes while another one still looks what is missing.
            reports = build_shards(work, shards, frames, targets, basis, batch_size=config.batch_size)
            hidden = not accelerator.is_main_process
            total = sum(len(work.frames_of(shard)) for shard in shards)
            with progress_bar(hidden=hidden) as progress:
                task = progress.add_task(f"{name} (frames)", total=total, info="")
                for _ in progress.track(reports, task_id=task):
                    pass
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                cosines = ", ".join(f"{layer}: {cosine:.4f}" for layer, cosine in work.finish().items())
                accelerator.print(
                    f"{work.folder}: {len(work.frames)} frames, {layout.frame_bytes:,} bytes each; "
                    f"cosine of stored and pooled features by layer: {cosines}"
                )
    except StoreError as error:
        raise UsageError(f"--feature_store: {error}") from error


def build_shards(
    work: DatasetBuild, shards: list[int], frames: Frames, targets: TeacherTargets, basis: Basis, *, batch_size: int
) -> Iterator[None]:
    """This process's shards, yielding once a frame; one loader feeds all of them."""
    chunks = {
        shard: np.array_split(work.frames_of(shard), -(-len(work.frames_of(shard)) // batch_size)) for shard in shards
    }
    pixels = frames.pixels(work.name, itertools.chain.from_iterable(chunks.values()))
    for shard in shards:
        for done in work.build_shard(shard, targets, basis, itertools.islice(pixels, len(chunks[shard]))):
            yield from itertools.repeat(None, done)


def verify(config: StoreConfig) -> None:
    """Check every record of a store. Raises UsageError for the first thing found wrong."""
    root = Path(config.feature_store)
    try:
        layout = read_layout(root)
        for name, fingerprint in Frames(config).data.fingerprints().items():
            features = DatasetFeatures(root, name, layout, fingerprint)
            features.verify()
            print(f"{features.folder}: {len(features)} records of {len(layout.layers)} layers are whole")
    except StoreError as error:
        raise UsageError(f"--feature_store: {error}") from error
