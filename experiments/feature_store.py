"""Builds and checks feature stores: the student's data and a teacher in, `rocket_align.teacher.store` files out."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismatic.training.config import TrainConfig
from prismatic.util.errors import UsageError
from prismatic.util.flags import check, limited
from rocket_align.flags import AlignFlags
from rocket_align.teacher.store.layout import StoreDType, StoreError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rocket_align.teacher.store.layout import StoreLayout


@dataclass
class StoreConfig(AlignFlags, TrainConfig):
    """The flags of finetune.py, and the store's."""

    # Stored tokens a side, relative to the student's; at most the teacher's own
    grid_scale: float = limited(1.25, above=0)
    store_dtype: StoreDType = "int8"  # int8 (with a scale per token) | float16
    # Coefficients kept of a token's channels (principal directions); at most all
    components: int = limited(384, least=1)
    fit_frames: int = limited(128, least=1)  # Frames, evenly spread over the data, that the directions are fitted to
    verify: bool = False  # Read every record of a finished store and check it; builds nothing

    def validate_store(self) -> None:
        """Refuse wrong flags before anything is loaded.

        Raises:
            UsageError: one line that names the flag.
        """
        if not self.feature_store:
            raise UsageError("--feature_store: empty; accepted: the folder to write")
        check(self)
        try:
            self.validate_alignment()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not self.verify and not (self.aligns and self.teacher):
            raise UsageError(
                "--vggt_path: no teacher; accepted: --vggt_path or --teacher_path, with an aligning recipe"
            )


class Frames:
    """The data set's un-augmented views, as the student's batches bring them to a teacher."""

    def __init__(self, config: StoreConfig) -> None:
        from prismatic.checkpoint.folder import resolve_checkpoint
        from prismatic.checkpoint.load import load_processor
        from prismatic.training.run import make_dataset
        from prismatic.util.data_utils import PaddedCollatorForActionPrediction
        from prismatic.vla.platforms import get_platform

        self.config = config
        self.processor = load_processor(resolve_checkpoint(config).base)
        plain = dataclasses.replace(config, image_aug=False, use_proprio=False)
        self.data = make_dataset(plain, self.processor, get_platform(config.platform), train=True)
        tokenizer = self.processor.tokenizer
        self._collate = PaddedCollatorForActionPrediction(tokenizer.model_max_length, tokenizer.pad_token_id)
        self.pixels = self._square(self.data.image_transform.size)

    @staticmethod
    def _square(size: tuple[int, int]) -> int:
        if size[0] != size[1]:
            raise UsageError(f"--vla_path: views of {size[0]} x {size[1]} pixels; accepted for a store: square ones")
        return size[0]

    def numbers(self, name: str) -> np.ndarray:
        """Frame numbers within a data set, ascending."""
        import numpy as np

        return np.sort(self.data.frame_numbers(name))

    def images(self, name: str, chunks: Iterable[np.ndarray], device: Any) -> Iterator[Tensor]:
        """Images (B, V, 3, H, W) in [0, 1] of each chunk of frame numbers of a data set."""
        import numpy as np
        from torch.utils.data import DataLoader

        from rocket_align.teacher.preprocess import unnormalize_views

        first = next(part.first for part in self.data.mixture if part.name == name)
        starts = self.data.frame_numbers(name)
        order = np.argsort(starts)
        keys = [(first + order[np.searchsorted(starts, chunk, sorter=order)]).tolist() for chunk in chunks]
        images = self.processor.image_processor
        loader: Any = DataLoader(
            self.data, batch_sampler=keys, collate_fn=self._collate, num_workers=self.config.num_workers
        )
        for batch in loader:
            pixels = batch["pixel_values"].to(device, non_blocking=True)
            yield unnormalize_views(pixels, images.means[0], images.stds[0], channels_per_view=3 * len(images.means))


def plan_store(config: StoreConfig, frames: Frames, teacher: Any) -> StoreLayout:
    """The layout: grids come from one frame that the teacher sees."""
    from prismatic.checkpoint.folder import resolve_checkpoint
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from rocket_align.teacher.registry import describe_teacher, teacher_hash
    from rocket_align.teacher.store.layout import StoreLayout

    info = describe_teacher(config.teacher, config.teacher_type)
    name = frames.data.mixture[0].name
    device = next(teacher.parameters()).device
    seen = teacher(next(iter(frames.images(name, [frames.numbers(name)[:1]], device))))
    backbone = str((OpenVLAConfig.from_pretrained(resolve_checkpoint(config).base).timm_model_ids or [""])[0])
    patch = re.search(r"patch(\d+)", backbone)
    if patch is None:
        raise UsageError(
            f"--vla_path: backbone {backbone} does not tell its patch size; accepted: timm's ..._patchN_..."
        )
    side = max(1, round(config.grid_scale * (frames.pixels // int(patch[1]))))
    return StoreLayout(
        teacher_kind=info.kind,
        teacher_hash=teacher_hash(config.teacher),
        teacher_depth=info.depth,
        layers=tuple(teacher.layers),
        channels=info.channels,
        components=min(config.components, info.channels),
        dtype=config.store_dtype,
        views=frames.data.views,
        view_pixels=frames.pixels,
        teacher_image_hw=seen.image_hw,
        teacher_grid_hw=seen.grid_hw,
        grid_hw=(min(side, seen.grid_hw[0]), min(side, seen.grid_hw[1])),
    )


def load(config: StoreConfig, accelerator: Any) -> Any:
    """The teacher, cut after the last layer that the flags align."""
    import torch

    from prismatic.checkpoint.load import student_depth
    from rocket_align.teacher.registry import describe_teacher, load_teacher

    try:
        info = describe_teacher(config.teacher, config.teacher_type)
        layers = sorted(config.align_config(student_depth(config), info.depth).teacher_layers)
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        return load_teacher(config.teacher, layers, config.teacher_type, dtype=dtype, device=accelerator.device)
    except ValueError as error:
        raise UsageError(str(error)) from error


def build(config: StoreConfig, accelerator: Any) -> None:
    """Build what is missing of the store.

    Raises:
        UsageError: the folder holds another store, or wrong flags or data.
    """
    from rocket_align.teacher.store.writer import DatasetBuild, begin_store, fit_basis

    frames, teacher = Frames(config), load(config, accelerator)
    layout, root = plan_store(config, frames, teacher), Path(config.feature_store)
    prints = frames.data.fingerprints()
    try:
        if accelerator.is_main_process:
            begin_store(root, layout)
            fit_basis(root, layout, teacher, spread(config, frames, accelerator.device))
        accelerator.wait_for_everyone()
        begin_store(root, layout)
        basis = fit_basis(root, layout, teacher, ()).to(accelerator.device)
        for name, fingerprint in prints.items():
            work = DatasetBuild(root, name, fingerprint, layout, frames.numbers(name))
            assigned = work.missing()[accelerator.process_index :: accelerator.num_processes]
            accelerator.wait_for_everyone()  # Nobody writes while another one still looks what is missing.
            build_shards(config, accelerator, frames, work, (teacher, basis, assigned))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                cosines = work.finish()
                kept = ", ".join(f"{layer}: {cosine:.4f}" for layer, cosine in cosines.items())
                accelerator.print(
                    f"{work.folder}: {len(work.frames)} frames, {layout.frame_bytes:,} bytes each; "
                    f"cosine of stored and pooled features by layer: {kept}"
                )
    except StoreError as error:
        raise UsageError(f"--feature_store: {error}") from error


def spread(config: StoreConfig, frames: Frames, device: Any) -> Iterator[Tensor]:
    """Images of frames evenly spread over all data sets of the mixture."""
    import numpy as np

    total = len(frames.data)
    for part in frames.data.mixture:
        count = min(part.size, max(1, round(config.fit_frames * part.size / total)))
        numbers = frames.numbers(part.name)[np.linspace(0, part.size - 1, count).astype(int)]
        yield from frames.images(part.name, np.array_split(numbers, -(-count // config.batch_size)), device)


def build_shards(
    config: StoreConfig, accelerator: Any, frames: Frames, work: Any, plan: tuple[Any, Any, list[int]]
) -> None:
    """This process's shards, behind a progress bar; one loader feeds all of them."""
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    teacher, basis, shards = plan
    chunks = {
        shard: np.array_split(work.frames_of(shard), -(-len(work.frames_of(shard)) // config.batch_size))
        for shard in shards
    }
    images = frames.images(work.name, itertools.chain.from_iterable(chunks.values()), accelerator.device)

    def progress() -> Iterator[None]:
        for shard in shards:
            for done in work.build_shard(shard, teacher, basis, itertools.islice(images, len(chunks[shard]))):
                yield from itertools.repeat(None, done)

    total = sum(len(work.frames_of(shard)) for shard in shards)
    console = Console(stderr=True)
    hidden = not accelerator.is_main_process
    for _ in track(progress(), f"{work.name} (frames)", total=total, console=console, disable=hidden):
        pass


def verify(config: StoreConfig) -> None:
    """Check every record of a store.

    Raises:
        UsageError: the first thing found wrong.
    """
    from rocket_align.teacher.store.layout import read_layout
    from rocket_align.teacher.store.reader import DatasetFeatures

    frames, root = Frames(config), Path(config.feature_store)
    try:
        layout = read_layout(root)
        for name, fingerprint in frames.data.fingerprints().items():
            features = DatasetFeatures(root, name, layout, fingerprint)
            features.verify()
            print(f"{features.folder}: {len(features)} records of {len(layout.layers)} layers are whole")
    except StoreError as error:
        raise UsageError(f"--feature_store: {error}") from error
