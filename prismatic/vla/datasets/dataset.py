"""RLDS datasets as one map-style dataset: any frame of any dataset of a mixture, read from disk when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.vla.datasets.builder import SplitFiles, choose_split, open_dataset
from prismatic.vla.datasets.chunking import chunk_indices
from prismatic.vla.datasets.frame_index import FrameIndex, cache_folder, fingerprint, load_frame_index
from prismatic.vla.datasets.image_transforms import AugmentDraw, AugmentRanges, PolicyImageTransform, decode_image
from prismatic.vla.datasets.specs import DATASETS, DatasetSpec, resolve_mixture
from prismatic.vla.datasets.statistics import Statistics, compute_statistics, normalize
from prismatic.vla.datasets.subset import choose_episodes
from prismatic.vla.platforms import LIBERO, Platform

_MAX_OPEN_SHARDS = 32


class FrameDraw(NamedTuple):
    """A frame of the mixture (0 .. len - 1) and how often it was drawn before; the latter decides the augmentation."""

    frame: int
    epoch: int


class MixturePart(NamedTuple):
    """Frames first .. first + size - 1 of the mixture come from one dataset."""

    name: str
    first: int
    size: int
    weight: float


class _ShardReader:
    """Reads byte ranges of shards; keeps a few files open, none of them across pickling."""

    def __init__(self, shards: tuple[Path, ...]) -> None:
        self.shards = shards
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "_open": OrderedDict()}

    def read(self, shard: int, start: int, size: int) -> bytes:
        descriptor = self._open.get(shard)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self._open.move_to_end(shard)
        # pread has no file position, so forked loader workers may share a descriptor.
        return os.pread(descriptor, size, start)


@dataclass
class _Source:
    """One dataset of the mixture, normalized."""

    name: str
    index: FrameIndex
    reader: _ShardReader
    views: tuple[str, ...]
    action: np.ndarray
    proprio: np.ndarray
    starts: np.ndarray

    def image(self, view: int, frame: int) -> np.ndarray:
        """The decoded image (H, W, 3) of a frame; raises UsageError when its bytes are no image."""
        index, episode = self.index, self.index.episode_of(frame)
        shard = int(index.episode_shard[episode])
        try:
            encoded = self.reader.read(shard, int(index.image_start[view, frame]), int(index.image_size[view, frame]))
            return decode_image(encoded)
        except (OSError, ValueError) as error:
            step = frame - int(index.episode_start[episode])
            raise UsageError(
                f"{self.reader.shards[shard]}: record {int(index.episode_record[episode])}: "
                f"step {step}: image {self.views[view]}: {' '.join(str(error).split())}"
            ) from error


def _all_transitions(spec: DatasetSpec, indices: list[FrameIndex]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(actions, proprios) of each split, standardized episode by episode."""
    actions, proprios = [], []
    for index in indices:
        bounds = index.episode_start
        pairs = [
            spec.standardize(index.action[first:last], index.state[first:last])
            for first, last in itertools.pairwise(bounds)
        ]
        actions.append(np.concatenate([action for action, _ in pairs]))
        proprios.append(np.concatenate([proprio for _, proprio in pairs]))
    return actions, proprios


def _statistics(
    name: str, spec: DatasetSpec, splits: dict[str, SplitFiles], loaded: dict[str, FrameIndex]
) -> Statistics:
    """Statistics over all splits (as upstream), from their JSON cache or computed now."""
    identity = [fingerprint(spec, splits[split]) for split in sorted(splits)]
    key = json.dumps([identity, spec.standardize.__qualname__, spec.action_mask], sort_keys=True)
    folder = cache_folder(next(iter(splits.values())).folder)
    path = folder / f"dataset_statistics_{hashlib.sha256(key.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # not there yet, or damaged
        return json.loads(path.read_text())[name]
    indices = [loaded.get(split) or load_frame_index(spec, splits[split]) for split in sorted(splits)]
    actions, proprios = _all_transitions(spec, indices)
    episodes = sum(index.num_episodes for index in indices)
    statistics = compute_statistics(np.concatenate(actions), np.concatenate(proprios), episodes, spec.action_mask)
    with contextlib.suppress(OSError):  # a read-only disk only costs the computation at the next start
        atomic_write(path, json.dumps({name: statistics}))
    return statistics


class RLDSDataset(Dataset):
    """Random access to the samples of an RLDS dataset or mixture.

    A sample is a frame with its whole action chunk inside the episode. `dataset[FrameDraw(frame, epoch)]` depends on
    nothing but the seed, the frame and the epoch, so any number of loader workers gives the same samples;
    `dataset[frame]` is epoch 0.

    Attributes:
        dataset_statistics: {dataset name: statistics} in the layout of dataset_statistics.json.
        mixture: which frames belong to which dataset, with the mixture weights.
    """

    def __init__(
        self,
        data_root_dir: str | Path,
        data_mix: str,
        batch_transform: Callable[[dict[str, Any]], dict[str, Any]],
        resize_resolution: tuple[int, int],
        *,
        image_aug: bool = False,
        train: bool = True,
        platform: Platform = LIBERO,
        seed: int = 0,
        fraction: float = 1.0,
    ) -> None:
        """Open all datasets of `data_mix` (a dataset, a comma list or a mixture name) below `data_root_dir`.

        Args:
            batch_transform: applied to each frame, see :class:`RLDSBatchTransform`.
            resize_resolution: (height, width) of the images.
            image_aug: random crop and colors; the transform is `self.image_transform`.
            train: split "train", else "val".
            fraction: use this part of every dataset's training episodes (see `choose_episodes`); the statistics stay
                those of all of them, so that runs on more and on less data act in the same units.

        Raises:
            UsageError: an unknown name, a missing folder, or data that are damaged or do not fit the platform.
        """
        self.batch_transform, self.platform, self.seed = batch_transform, platform, int(seed)
        self.fraction = fraction if train else 1.0
        size = (int(resize_resolution[0]), int(resize_resolution[1]))
        self.image_transform = PolicyImageTransform(size, AugmentRanges() if image_aug else None)
        self.dataset_statistics: dict[str, Statistics] = {}
        self._sources: list[_Source] = []
        parts, first = [], 0
        for name, weight in resolve_mixture(data_mix):
            source = self._open(Path(data_root_dir), name, train)
            self._sources.append(source)
            parts.append(MixturePart(name, first, len(source.starts), weight))
            first += len(source.starts)
        self.mixture = tuple(parts)
        self._firsts = np.array([part.first for part in parts])
        self._length = first

    def _open(self, root: Path, name: str, train: bool) -> _Source:
        spec = DATASETS[name]
        splits = open_dataset(root, name, spec, self.platform)
        split = choose_split(splits, name, train)
        index = load_frame_index(spec, split)
        statistics = self.dataset_statistics[name] = _statistics(name, spec, splits, {split.split: index})
        (action,), (proprio,) = _all_transitions(spec, [index])
        future = self.platform.chunk - 1
        lengths = np.diff(index.episode_start)
        instructions = [index.instructions[index.language[begin]] for begin in index.episode_start[:-1]]
        by_episode = [
            index.episode_start[episode] + chunk_indices(int(lengths[episode]), 1, future).observations[:, 0]
            for episode in choose_episodes(instructions, self.fraction, self.seed)
        ]
        starts = np.concatenate(by_episode).astype(np.int64)
        if not len(starts):
            raise UsageError(
                f"{split.folder}: split {split.split!r}: no episode has the {future + 1} steps of an action chunk "
                f"(longest: {lengths.max()}); accepted: at least one such episode"
            )
        kind = self.platform.normalization
        return _Source(
            name=name,
            index=index,
            reader=_ShardReader(index.shards),
            views=tuple(spec.images),
            action=normalize(action, statistics["action"], kind),
            proprio=normalize(proprio, statistics["proprio"], kind),
            starts=starts,
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[frame] for frame in range(len(self)))

    def __getitem__(self, key: int | FrameDraw) -> dict[str, Any]:
        """The sample of a frame (epoch 0) or of a draw. Raises IndexError, and UsageError for a damaged image."""
        return self.batch_transform(self.frame(key))

    def frame(self, key: int | FrameDraw) -> dict[str, Any]:
        """What `batch_transform` gets: the resized, augmented images and normalized numbers, in upstream's layout."""
        draw = self._as_draw(key)
        source, start = self._locate(draw.frame)
        images = {
            f"image_{name}": self.image_transform.train(source.image(view, start), augment)[None]
            for view, (name, augment) in enumerate(self.augmentation(draw).items())
        }
        timestep = start - int(source.index.episode_start[source.index.episode_of(start)])
        return {
            "dataset_name": source.name,
            "action": source.action[start : start + self.platform.chunk],
            "observation": {**images, "proprio": source.proprio[start : start + 1], "timestep": np.array([timestep])},
            "task": {"language_instruction": source.index.instructions[source.index.language[start]]},
        }

    def augmentation(self, key: int | FrameDraw) -> dict[str, AugmentDraw | None]:
        """The augmentation of every view that is read for this draw (None without image_aug), without reading it.

        Its `crop` is the geometry to use for anything spatial that is stored per frame.
        """
        draw = self._as_draw(key)
        source, _ = self._locate(draw.frame)
        views = source.views if getattr(self.batch_transform, "use_wrist_image", True) else source.views[:1]
        return {
            name: self.image_transform.draw(np.random.default_rng((self.seed, draw.epoch, draw.frame, view)))
            for view, name in enumerate(views)
        }

    def _as_draw(self, key: int | FrameDraw) -> FrameDraw:
        draw = key if isinstance(key, FrameDraw) else FrameDraw(int(key), 0)
        if not 0 <= draw.frame < len(self):
            raise IndexError(f"frame {draw.frame} of a dataset with {len(self)} frames")
        return draw

    def _locate(self, frame: int) -> tuple[_Source, int]:
        """The dataset of a frame of the mixture, and its number there."""
        part = int(np.searchsorted(self._firsts, frame, side="right")) - 1
        source = self._sources[part]
        return source, int(source.starts[frame - self.mixture[part].first])
