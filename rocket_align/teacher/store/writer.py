"""Building a feature store: resumable, shard by shard, by one or several processes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocket_align.teacher.base import Teacher
from rocket_align.teacher.files import replacing
from rocket_align.teacher.store.codec import Basis, BasisFit, Codes, dequantize, encode, pool_to_grid, reconstruct
from rocket_align.teacher.store.layout import (
    BASIS_NAME,
    FRAMES_NAME,
    INDEX_NAME,
    StoreError,
    StoreLayout,
    made_from,
    read_layout,
    write_index,
)
from rocket_align.teacher.store.reader import read_basis, record_checksums


def begin_store(root: Path, layout: StoreLayout) -> None:
    """Write the store's index, or accept the one that is there.

    Raises StoreError: the folder holds a store of another layout; one line with the differences.
    """
    if (root / INDEX_NAME).is_file():
        mismatch = read_layout(root).differences(layout)
        if not mismatch:
            return
        if any(root.glob("*/*")):
            raise StoreError(
                f"{root}: holds another store ({mismatch}); accepted: an empty folder, or the same settings"
            )
        (root / BASIS_NAME).unlink(missing_ok=True)  # Of a build that stopped before its first record.
    write_index(root / INDEX_NAME, {"layout": layout.__dict__})


def fit_basis(root: Path, layout: StoreLayout, teacher: Teacher, batches: Iterable[Tensor]) -> Basis:
    """The store's basis: the one that is there, or one fitted to `batches` of what the teacher takes."""
    if not (root / BASIS_NAME).is_file():
        fit = BasisFit()
        for images in batches:
            fit.add(pool_to_grid(teacher(images), layout.grid_hw))
        basis = fit.result(layout.components)
        tensors = {"mean": basis.mean_KC.cpu()}
        if basis.directions_KCR is not None:
            tensors["directions"] = basis.directions_KCR.cpu()
        with replacing(root / BASIS_NAME) as file:
            save_file(tensors, file)
    return read_basis(root)


@dataclass
class DatasetBuild:
    """Building the features of one data set."""

    root: Path  # The store's folder, begun and with its basis
    name: str  # The data set
    fingerprint: str  # Of the data set's content
    layout: StoreLayout
    frames: np.ndarray  # Frame numbers within the data set, ascending

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.root / self.name

    @property
    def shards(self) -> list[Path]:
        """All files there will be."""
        total = -(-len(self.frames) // self.layout.shard_frames)
        return [self.folder / f"features-{number:05d}-of-{total:05d}.safetensors" for number in range(total)]

    def frames_of(self, shard: int) -> np.ndarray:
        """Frame numbers of a shard."""
        first = shard * self.layout.shard_frames
        return self.frames[first : first + self.layout.shard_frames]

    @functools.cached_property
    def _made_from(self) -> str:
        return made_from(self.root, self.layout, self.fingerprint, self.frames.tobytes())

    def missing(self) -> list[int]:
        """Shards still to be built; damaged ones and those of other data, settings or basis count as missing."""
        return [number for number, path in enumerate(self.shards) if not self._is_ours(path)]

    def _is_ours(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("made_from") == self._made_from
        except (SafetensorError, OSError):  # not there yet, or damaged: built anew
            return False

    def build_shard(self, shard: int, teacher: Teacher, basis: Basis, batches: Iterable[Tensor]) -> Iterator[int]:
        """Compute and write a shard; yields the number of frames after every batch.

        Args:
            batches: `frames_of(shard)` in order, as the teacher takes them.
        """
        layout, dtype = self.layout, getattr(torch, self.layout.dtype)
        parts: list[Codes] = []
        cosines = torch.zeros(len(layout.layers), dtype=torch.float64)
        for images in batches:
            features = pool_to_grid(teacher(images), layout.grid_hw)
            codes = encode(features, basis, dtype)
            kept = F.cosine_similarity(reconstruct(dequantize(codes), basis), features, dim=-1)
            cosines += kept.mean(dim=(2, 3)).sum(0).double().cpu()
            scales = None if codes.scales_BKVP is None else codes.scales_BKVP.cpu()
            parts.append(Codes(codes.values_BKVPR.cpu(), scales))
            yield len(images)
        frames = self.frames_of(shard)
        tensors = {"values": torch.cat([codes.values_BKVPR for codes in parts]), "cosines": cosines / len(frames)}
        if dtype == torch.int8:
            tensors["scales"] = torch.cat([codes.scales_BKVP for codes in parts if codes.scales_BKVP is not None])
        records = zip(tensors["values"], tensors.get("scales", [None] * len(frames)))
        tensors["checksums"] = torch.tensor([record_checksums(values, scales) for values, scales in records])
        if len(tensors["values"]) != len(frames):
            raise ValueError(f"{self.name}: {len(tensors['values'])} images for {len(frames)} frames of shard {shard}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.shards[shard]) as file:
            save_file(tensors, file, metadata={"made_from": self._made_from})

    def finish(self) -> dict[str, float]:
        """Write the data set's index when all shards are there; returns layer -> mean cosine of what was stored.

        Raises ValueError: shards are missing.
        """
        if missing := self.missing():
            raise ValueError(f"{self.folder}: {len(missing)} of {len(self.shards)} shards are missing; accepted: none")
        totals = np.zeros(len(self.layout.layers))
        for number, path in enumerate(self.shards):
            with safe_open(path, framework="pt") as file:
                totals += file.get_tensor("cosines").numpy() * len(self.frames_of(number))
        cosines = dict(zip(map(str, self.layout.layers), (totals / len(self.frames)).tolist()))
        with replacing(self.folder / FRAMES_NAME) as file:
            np.save(file, self.frames, allow_pickle=False)
        index = {
            "fingerprint": self.fingerprint,
            "made_from": self._made_from,
            "frames": len(self.frames),
            "cosine_of_stored_features": cosines,
            "shards": [{"file": path.name, "bytes": path.stat().st_size} for path in self.shards],
        }
        write_index(self.folder / INDEX_NAME, index)
        for path in set(self.folder.glob("features-*.safetensors")) - set(self.shards):
            path.unlink()  # of a build from more or fewer frames
        return cosines
