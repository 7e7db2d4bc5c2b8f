"""Robot datasets as one map-style dataset: any frame of any dataset of a mixture, read from disk when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.vla.batch import Frame, Sample
from prismatic.vla.datasets import statistics as statistics_module
from prismatic.vla.datasets.builder import DatasetSplit, choose_split, find_splits
from prismatic.vla.datasets.episodes import EpisodeData, cache_folder, choose_episodes, code_digest, hold_out_episodes
from prismatic.vla.datasets.image_transforms import (
    FULL_IMAGE,
    AugmentDraw,
    AugmentRanges,
    CropBox,
    PixelBox,
    PolicyImageTransform,
    crop_of_view,
)
from prismatic.vla.datasets.specs import DATASETS, DatasetSpec, resolve_mixture
from prismatic.vla.datasets.statistics import Statistics, compute_statistics, describe_deltas, normalize
from prismatic.vla.datasets.transitions import (
    ActionChunks,
    all_starts,
    check_transitions,
    chunk_starts,  # noqa: F401 - Earlier name.
    deltas,
    sample_starts,
    transitions,
)
from prismatic.vla.platforms import LIBERO, Platform


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


@dataclass
class _Source:
    """One dataset of the mixture, normalized.

    `views` are those the policy sees, each with the numbers of its images in `index`: none (a black image), one, or
    two, of which each draw takes one at random.
    """

    name: str
    index: EpisodeData
    views: dict[str, tuple[int, ...]]
    action: ActionChunks
    proprio: np.ndarray | None
    starts: np.ndarray


def _views(name: str, spec: DatasetSpec, index: EpisodeData, count: int | None) -> dict[str, tuple[int, ...]]:
    """The first `count` views of a dataset (None: all it has), see :class:`_Source`."""
    if count is not None and count > len(spec.images):
        raise UsageError(
            f"--num_images_in_input: {count} found; accepted for dataset {name!r}: 1 to {len(spec.images)} "
            f"({', '.join(spec.images)})"
        )
    names = [[view, f"{view}_swap"] for view in list(spec.images)[:count]]
    return {group[0]: tuple(index.views.index(view) for view in group if view in index.views) for group in names}


def _statistics(
    name: str,
    spec: DatasetSpec,
    splits: Mapping[str, DatasetSplit],
    own: str,
    index: EpisodeData,
    known: tuple[np.ndarray, np.ndarray],
    future: int,
    delta: tuple[bool, ...] | None,
) -> Statistics:
    """Statistics over all splits (as upstream), from their JSON cache or computed now.

    `index` and the transitions `known` are of the split `own`. With `delta`, actions are those of chunks with `future`
    more.
    """
    identity = [splits[split].fingerprint() for split in sorted(splits)]
    code = code_digest(statistics_module)
    settings = [identity, spec.action_mask, code, *([delta, future] if delta else [])]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    # A transform is known by what it makes of the data: its name stays when its code, or what it calls, is edited.
    for array in known:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    path = cache_folder(splits[own].folder) / f"dataset_statistics_{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # not there yet, or damaged
        return json.loads(path.read_text())[name]
    indices = {split: index if split == own else splits[split].load() for split in sorted(splits)}
    by_split = [known if split == own else transitions(spec, indices[split]) for split in indices]
    # Unused states may be damaged in one split and sound in another.
    width = min(proprio.shape[1] for _, proprio in by_split)
    actions = np.concatenate([action for action, _ in by_split])
    proprios = np.concatenate([proprio[:, :width] for _, proprio in by_split])
    episodes = sum(table.num_episodes for table in indices.values())
    statistics = compute_statistics(actions, proprios, episodes, spec.action_mask)
    if delta:
        chunks = describe_deltas(actions, proprios, all_starts(indices.values(), future), future + 1, delta)
        statistics["action"] |= {**chunks, "delta": list(delta)}
    with contextlib.suppress(OSError):  # a read-only disk only costs the computation at the next start
        atomic_write(path, json.dumps({name: statistics}))
    return statistics


def _num_views(batch_transform: object) -> int | None:
    """Number of views that a batch transform looks at; None for all that the dataset has."""
    if not getattr(batch_transform, "use_wrist_image", True):
        return 1
    return getattr(batch_transform, "num_images", None)


class RLDSDataset(Dataset):
    """Random access to the samples of a dataset or mixture, in RLDS or LeRobot format (told from the files).

    A sample is a frame with its whole action chunk inside the episode. `dataset[FrameDraw(frame, epoch)]` depends on
    nothing but the seed, the frame and the epoch, so any number of loader workers gives the same samples;
    `dataset[frame]` is epoch 0.

    Attributes:
        dataset_statistics: {dataset name: statistics} in the layout of dataset_statistics.json.
        mixture: which frames belong to which dataset, with the mixture weights.
        extras: adds what is stored beside the data to every sample, under "extras": called with the dataset's name,
            the frame's number there and the crops of its views. None (the default) adds nothing.
    """

    extras: Callable[[str, int, list[CropBox]], Mapping[str, torch.Tensor]] | None = None

    def __init__(  # noqa: PLR0913 - upstream's interface, and what it reads from global settings
        self,
        data_root_dir: str | Path,
        data_mix: str,
        batch_transform: Callable[[Frame], Sample],
        resize_resolution: tuple[int, int],
        *,
        image_transform: PolicyImageTransform | None = None,
        image_aug: bool = False,
        train: bool = True,
        platform: Platform = LIBERO,
        seed: int = 0,
        fraction: float = 1.0,
        holdout: float = 0.0,
    ) -> None:
        """Open all datasets of `data_mix` (a dataset, a comma list or a mixture name) below `data_root_dir`.

        Args:
            batch_transform: applied to each frame, see :class:`RLDSBatchTransform`.
            resize_resolution: (height, width) of the images.
            image_transform: camera image to the policy's; by default a resize to `resize_resolution`, with random crop
                and colors where `image_aug` says so.
            train: split "train", else "val".
            holdout: a dataset without a split "val" has this part of its episodes in place of it, drawn with the seed,
                and the others in "train".
            fraction: use this part of every dataset's training episodes (see `choose_episodes`); the statistics stay
                those of all of them, so that runs on more and on less data act in the same units.

        Raises:
            UsageError: an unknown name, a missing folder, or data that are damaged or do not fit the platform.
        """
        self.batch_transform, self.platform, self.seed = batch_transform, platform, int(seed)
        self._num_views = _num_views(batch_transform)
        self.fraction, self.holdout = fraction if train else 1.0, holdout
        if image_transform is None:
            size = (int(resize_resolution[0]), int(resize_resolution[1]))
            image_transform = PolicyImageTransform(size, AugmentRanges() if image_aug else None)
        self.image_transform = image_transform
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
        self._check_views(data_mix)

    def _episodes(self, instructions: list[str], held_out: float, train: bool) -> list[int]:
        """The episodes to draw samples from, of those with the given instructions."""
        kept, held = hold_out_episodes(len(instructions), held_out, self.seed)
        if not train and held_out:
            if not len(held):
                raise UsageError("--val_fraction: a dataset of one episode has none to hold out; accepted: 0")
            return held.tolist()
        return kept[choose_episodes([instructions[episode] for episode in kept], self.fraction, self.seed)].tolist()

    def _check_views(self, data_mix: str) -> None:
        """Refuse a view that every dataset would fill with black images."""
        for number in range(self._num_views or 0):
            views = [list(source.views.items())[number] for source in self._sources]
            if not any(images for _, images in views):
                raise UsageError(
                    f"--num_images_in_input: {self._num_views} found, but {data_mix!r} has no {views[0][0]} camera"
                )

    def _open(self, root: Path, name: str, train: bool) -> _Source:
        spec = DATASETS[name]
        # A transform that does not say gets the states there are.
        with_proprio = bool(getattr(self.batch_transform, "use_proprio", spec.has_state))
        if with_proprio and not spec.has_state:
            raise UsageError(f"--use_proprio: True found, but dataset {name!r} has no states; accepted: False")
        splits = find_splits(root, name, spec, self.platform, with_proprio, self._num_views)
        held_out = self.holdout if "val" not in splits else 0.0
        split = choose_split(splits, name, train or held_out > 0)
        index = split.load()
        action, proprio = transitions(spec, index)
        check_transitions(name, (action, proprio), index.num_frames, self.platform, with_proprio)
        delta = deltas(name, spec, self.platform, with_proprio)
        future = self.platform.chunk - 1
        lengths = np.diff(index.episode_start)
        instructions = [index.instructions[index.language[begin]] for begin in index.episode_start[:-1]]
        by_episode = [
            sample_starts(spec, index, action, episode, future)
            for episode in self._episodes(instructions, held_out, train)
        ]
        starts = np.concatenate(by_episode).astype(np.int64)
        if not len(starts):
            raise UsageError(
                f"{split.folder}: split {split.split!r}: no episode has the {future + 1} steps of an action chunk "
                f"(longest: {lengths.max()}) and an instruction; accepted: at least one such episode"
            )
        statistics = _statistics(name, spec, splits, split.split, index, (action, proprio), future, delta)
        self.dataset_statistics[name] = statistics
        kind = self.platform.normalization
        return _Source(
            name=name,
            index=index,
            views=_views(name, spec, index, self._num_views),
            action=ActionChunks(action, proprio, statistics["action"], self.platform),
            proprio=normalize(proprio, statistics["proprio"], kind) if "proprio" in statistics else None,
            starts=starts,
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        return (self[frame] for frame in range(len(self)))

    def __getitem__(self, key: int | FrameDraw) -> Sample:
        """The sample of a frame (epoch 0) or of a draw. Raises IndexError, and UsageError for a damaged image."""
        frame = self.frame(key)
        sample = self.batch_transform(frame)
        if self.extras is None:
            return sample
        return {**sample, "extras": self._read_extras(self._as_draw(key), frame["views"])}

    def _read_extras(self, draw: FrameDraw, contents: Mapping[str, PixelBox | None]) -> Mapping[str, torch.Tensor]:
        assert self.extras is not None
        source, start = self._locate(draw.frame)
        if any(len(images) > 1 for images in source.views.values()):
            raise UsageError(
                f"--feature_store: {source.name!r} shows one of two cameras at random; accepted: datasets that do not"
            )
        crops = []
        for name, augment in self.augmentation(draw).items():
            content = contents[name]
            if augment is None or content is None:
                crops.append(FULL_IMAGE)
            else:
                crops.append(crop_of_view(augment.crop, content, self.image_transform.size))
        try:
            return self.extras(source.name, start, crops)
        except ValueError as error:
            raise UsageError(str(error)) from error

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that are read, in the order the policy sees them."""
        return tuple(self.augmentation(0))

    @property
    def missing_views(self) -> tuple[str, ...]:
        """Views for which some dataset has no camera."""
        return tuple(name for source in self._sources for name, cameras in source.views.items() if not cameras)

    def fingerprints(self) -> dict[str, str]:
        """A hash of the content of every dataset; the same for a copy of it.

        Raises UsageError: a dataset whose view is drawn from two cameras, so that a frame has no fixed content.
        """
        for source in self._sources:
            swapped = [view for view, cameras in source.views.items() if len(cameras) > 1]
            if swapped:
                raise UsageError(
                    f"--feature_store: dataset {source.name!r} draws its view {swapped[0]} from two cameras; "
                    "accepted: datasets with one camera a view"
                )
        return {source.name: source.index.content_hash() for source in self._sources}

    def frame_numbers(self, name: str) -> np.ndarray:
        """The numbers within a dataset of its frames in the mixture, in the mixture's order."""
        return next(source.starts for source in self._sources if source.name == name)

    def frame(self, key: int | FrameDraw) -> Frame:
        """The frame that `batch_transform` gets."""
        draw = self._as_draw(key)
        source, start = self._locate(draw.frame)
        views, images = {}, {}
        for name, augment in self.augmentation(draw).items():
            image, views[name] = self._image(source, name, draw, augment)
            images[f"image_{name}"] = image[None]
        state = {} if source.proprio is None else {"proprio": source.proprio[start : start + 1]}
        timestep = self.episode_and_frame(draw.frame)[2]
        return {
            "dataset_name": source.name,
            "action": source.action[start],
            "observation": {**images, **state, "timestep": np.array([timestep])},
            "task": {"language_instruction": source.index.instructions[source.index.language[start]]},
            "views": views,
            "draw": (self.seed, draw.epoch, draw.frame),
        }

    def _image(
        self, source: _Source, view: str, draw: FrameDraw, augment: AugmentDraw | None
    ) -> tuple[np.ndarray, PixelBox | None]:
        """One view of a draw as the policy sees it, uint8 (height, width, 3), and the part that the camera filled."""
        choices = source.views[view]
        if not choices:
            return np.zeros((*self.image_transform.size, 3), np.uint8), None
        choice = choices[0]
        if len(choices) > 1:
            choice = choices[int(np.random.default_rng((self.seed, 3, draw.epoch, draw.frame)).integers(len(choices)))]
        image = source.index.image(choice, self._locate(draw.frame)[1])
        return self.image_transform.train(image, augment), self.image_transform.content(image.shape[:2])

    def augmentation(self, key: int | FrameDraw) -> dict[str, AugmentDraw | None]:
        """The augmentation of every view that is read for this draw (None without image_aug), without reading it.

        Its `crop` is of the camera's image: see :func:`crop_of_view` for anything spatial that is stored of views.
        """
        draw = self._as_draw(key)
        source, _ = self._locate(draw.frame)
        return {
            name: self.image_transform.draw(np.random.default_rng((self.seed, draw.epoch, draw.frame, view)), name)
            for view, name in enumerate(source.views)
        }

    def _as_draw(self, key: int | FrameDraw) -> FrameDraw:
        draw = key if isinstance(key, FrameDraw) else FrameDraw(int(key), 0)
        if not 0 <= draw.frame < len(self):
            raise IndexError(f"frame {draw.frame} of a dataset with {len(self)} frames")
        return draw

    def episode_and_frame(self, frame: int) -> tuple[str, int, int]:
        """Dataset of a frame of the mixture, its episode there, and its place in that."""
        source, start = self._locate(frame)
        episode = source.index.episode_of(start)
        return source.name, episode, start - int(source.index.episode_start[episode])

    def _locate(self, frame: int) -> tuple[_Source, int]:
        """The dataset of a frame of the mixture, and its number there."""
        part = int(np.searchsorted(self._firsts, frame, side="right")) - 1
        source = self._sources[part]
        return source, int(source.starts[frame - self.mixture[part].first])
