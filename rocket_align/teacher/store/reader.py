"""Reading a feature store: opened and checked once, then one record at a time, from any number of processes."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rocket_align.pooling import student_grid
from rocket_align.teacher.store.codec import Basis, StoredTeacher, StoreGeometry
from rocket_align.teacher.store.layout import (
    BASIS_NAME,
    FRAMES_NAME,
    INDEX_NAME,
    StoreError,
    StoreLayout,
    made_from,
    read_index,
    read_layout,
)

_MAX_OPEN_SHARDS = 64


def record_checksums(values_KVPR: Tensor, scales_KVP: Tensor | None) -> list[int]:
    """CRC-32 of each layer's part of a record, over its values and then its scales."""
    sums = []
    for layer in range(len(values_KVPR)):
        total = zlib.crc32(values_KVPR[layer].contiguous().view(torch.uint8).numpy().data)
        if scales_KVP is not None:
            total = zlib.crc32(scales_KVP[layer].contiguous().view(torch.uint8).numpy().data, total)
        sums.append(total)
    return sums


def read_basis(root: Path) -> Basis:
    """The basis of the store at `root`, all layers. Raises StoreError: missing or damaged."""
    try:
        tensors = load_file(root / BASIS_NAME)
        return Basis(tensors["mean"], tensors.get("directions"))
    except (SafetensorError, OSError, KeyError) as error:
        raise StoreError(f"{root / BASIS_NAME}: not readable ({error}); accepted: a new build") from error


class DatasetFeatures:
    """The records of one data set; its files are opened when first read, and never across pickling.

    Opening checks the index, the set of shards, their sizes and headers; every record's checksum is checked when it is
    read, so that training never uses a damaged one and opening costs no pass over the data.

    Args:
        root: the store's folder.
        name: the data set.
        layout: the store's.
        fingerprint: of the data set as it is now.

    Raises:
        StoreError: no such data set in the store, made of other data, incomplete or damaged; one line.
    """

    def __init__(self, root: Path, name: str, layout: StoreLayout, fingerprint: str) -> None:
        self.folder, self.layout = root / name, layout
        if not (self.folder / INDEX_NAME).is_file():
            raise StoreError(
                f"{root}: holds no finished features of data set {name!r}; "
                "accepted: after vla-scripts/build_feature_store.py has run to its end"
            )
        index = read_index(self.folder / INDEX_NAME)
        if index.get("fingerprint") != fingerprint:
            raise StoreError(
                f"{self.folder}: made of other data than the data set {name!r} here; accepted: a store built from it"
            )
        try:
            self.frames = np.load(self.folder / FRAMES_NAME, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{self.folder / FRAMES_NAME}: not readable ({error}); accepted: a new build") from error
        if index.get("made_from") != made_from(root, layout, fingerprint, self.frames.tobytes()):
            raise StoreError(f"{self.folder}: does not belong to {root / BASIS_NAME}; accepted: a new build")
        try:
            shards = [(self.folder / shard["file"], shard["bytes"]) for shard in index["shards"]]
        except (TypeError, LookupError) as error:
            raise StoreError(f"{self.folder / INDEX_NAME}: damaged ({error!r}); accepted: a new build") from error
        self.shards = tuple(path for path, _ in shards)
        if index.get("frames") != len(self.frames) or len(self.shards) != -(-len(self.frames) // layout.shard_frames):
            raise StoreError(f"{self.folder}: index, frames and shards disagree; accepted: a new build")
        for path, expected in shards:
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise StoreError(f"{path}: has {size} bytes, not {expected}; accepted: a new build of this file")
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self.frames)

    def _shard(self, number: int) -> Any:
        opened = self._open.get(number)
        if opened is None:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            try:
                opened = self._open[number] = safe_open(self.shards[number], framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise StoreError(f"{self.shards[number]}: not readable ({error}); accepted: a new build") from error
        self._open.move_to_end(number)
        return opened

    def record(self, row: int, layers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(values (K, V, P, R), scales (K, V, P) or None) of record `row`; `layers` are positions in the layout's.

        Only the bytes of these layers are read. Raises StoreError: the record is damaged; names file and record.
        """
        number, position = divmod(row, self.layout.shard_frames)
        shard = self._shard(number)

        def parts(name: str) -> Tensor:
            stored = shard.get_slice(name)
            if list(layers) == list(range(layers[0], layers[0] + len(layers))):
                return stored[position, layers[0] : layers[0] + len(layers)]
            return torch.stack([stored[position, layer] for layer in layers])

        values = parts("values")
        scales = parts("scales") if self.layout.dtype == "int8" else None
        if record_checksums(values, scales) != parts("checksums").tolist():
            raise StoreError(f"{self.shards[number]}: record {position} is damaged; accepted: a new build of this file")
        return values, scales

    def row_of(self, frame: int) -> int:
        """The record of a frame number of the data set. Raises StoreError: the store has none for it."""
        row = int(np.searchsorted(self.frames, frame))
        if row == len(self.frames) or self.frames[row] != frame:
            raise StoreError(
                f"{self.folder}: no record of frame {frame}; accepted: a store built with this --data_fraction and seed"
            )
        return row

    def verify(self) -> None:
        """Read every record once; raises StoreError for the first damaged one."""
        for row in range(len(self)):
            self.record(row, range(len(self.layout.layers)))


class FeatureStore:
    """A store opened for the layers and data sets of one training run.

    Calling it with a data set, a frame and the crops of its views gives what :class:`StoredTeacher` takes, without the
    batch dimension: `values_BKVPR`, `crops_BV4` and, for int8, `scales_BKVP`.

    Args:
        root: the store's folder.
        fingerprints: data set -> its fingerprint as it is now.
        layers: teacher blocks to read, in this order.
        teacher_hash: of the teacher that training was given; None when it was given none, which accepts the store's.
        views: names of the views that training reads.
        view_pixels: side of the student's views.

    Raises:
        StoreError: the store was made with another teacher, layers, views or data, or is damaged; one line.
    """

    def __init__(
        self,
        root: str | Path,
        fingerprints: Mapping[str, str],
        layers: Sequence[int],
        *,
        teacher_hash: str | None,
        views: Sequence[str],
        view_pixels: int,
    ) -> None:
        self.root = Path(root)
        self.layout = read_layout(self.root)
        self._check(layers, teacher_hash, tuple(views), view_pixels)
        self.rows = tuple(self.layout.layers.index(layer) for layer in layers)
        self.datasets = {
            name: DatasetFeatures(self.root, name, self.layout, fingerprint)
            for name, fingerprint in fingerprints.items()
        }

    def _check(self, layers: Iterable[int], teacher_hash: str | None, views: tuple[str, ...], pixels: int) -> None:
        layout = self.layout
        if teacher_hash not in (None, layout.teacher_hash):
            raise StoreError(f"{self.root}: made with another teacher; accepted: the one it was built with")
        layout.check_layers(layers, self.root)
        if views != layout.views:
            raise StoreError(
                f"{self.root}: made of the views {', '.join(layout.views)}; accepted: the same, not {', '.join(views)}"
            )
        if pixels != layout.view_pixels:
            raise StoreError(
                f"{self.root}: made of views of {layout.view_pixels} pixels; accepted: the same, not {pixels}"
            )

    def basis(self) -> Basis:
        """The basis of the chosen layers."""
        whole, rows = read_basis(self.root), list(self.rows)
        return Basis(whole.mean_KC[rows], None if whole.directions_KCR is None else whole.directions_KCR[rows])

    def teacher(self, tokens_per_view: int, *, position_embedding: bool) -> StoredTeacher:
        """Make what turns this store's records into targets for a student with so many vision tokens a view.

        Raises ValueError: tokens that form no grid.
        """
        layout = self.layout
        geometry = StoreGeometry(
            stored_hw=layout.grid_hw,
            teacher_hw=layout.teacher_grid_hw,
            student_hw=student_grid(tokens_per_view, 1, layout.teacher_grid_hw),
            teacher_image_hw=layout.teacher_image_hw,
            view_pixels=layout.view_pixels,
        )
        return StoredTeacher(self.basis(), geometry, position_embedding=position_embedding)

    def __call__(self, dataset: str, frame: int, crops: Sequence[Sequence[float]]) -> dict[str, Tensor]:
        """One frame's stored features; raises StoreError for a damaged record or an unknown frame."""
        features = self.datasets[dataset]
        values, scales = features.record(features.row_of(frame), self.rows)
        result = {"values_BKVPR": values, "crops_BV4": torch.tensor(crops, dtype=torch.float32)}
        return result if scales is None else {**result, "scales_BKVP": scales}
