"""Finding an RLDS dataset on disk and checking its schema, through tensorflow-datasets (no TensorFlow needed)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform

SplitT = TypeVar("SplitT")


@dataclass(frozen=True)
class NumberFeature:
    """How a feature of numbers is stored.

    Attributes:
        width: values a step.
        integers: a list of integers (or booleans) instead of floats.
        packed: their type, when each step's values are one byte string; zlib: which is compressed.
    """

    width: int
    integers: bool = False
    packed: str = ""
    zlib: bool = False


@dataclass(frozen=True)
class SplitFiles:
    """One split of a dataset: its version folder, its TFRecord shards with their record counts, and feature widths.

    Attributes:
        numbers: feature -> how its numbers are stored.
        action_width, state_width: of the actions and states made of them.
    """

    folder: Path
    split: str
    shards: tuple[Path, ...]
    shard_lengths: tuple[int, ...]
    numbers: Mapping[str, NumberFeature]
    action_width: int
    state_width: int


def _version_key(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def find_version_folder(data_root_dir: Path, name: str) -> Path:
    """The newest `data_root_dir/name/X.Y.Z`.

    Raises:
        UsageError: a folder is missing; names it, and similar ones that are there.
    """
    if not data_root_dir.is_dir():
        raise UsageError(
            f"--data_root_dir: no such folder: {data_root_dir}; accepted: the folder that holds the RLDS datasets"
        )
    dataset = data_root_dir / name
    if not dataset.is_dir():
        names = sorted(path.name for path in data_root_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(
            f"--data_root_dir: {data_root_dir} holds no dataset {name!r}{hint}; found: {', '.join(names) or 'none'}"
        )
    versions = [path for path in dataset.iterdir() if path.is_dir() and path.name.replace(".", "").isdigit()]
    if not versions:
        raise UsageError(
            f"{dataset}: no version folder; accepted: a folder like {dataset / '1.0.0'} with dataset_info.json"
        )
    return max(versions, key=_version_key)


def _feature(steps: Any, name: str) -> Any:
    """The TFDS feature connector at a path like "observation/image"; None when there is none.

    A feature's own name may hold a slash, too ("observation/present/xyz").
    """
    if not hasattr(steps, "keys"):
        return None
    if name in steps.keys():  # noqa: SIM118  (FeaturesDict is no Mapping)
        return steps[name]
    for key in steps.keys():  # noqa: SIM118
        if name.startswith(f"{key}/") and (feature := _feature(steps[key], name[len(key) + 1 :])) is not None:
            return feature
    return None


def _number_feature(folder: Path, steps: Any, name: str) -> NumberFeature:
    feature = _feature(steps, name)
    shape = tuple(getattr(feature, "shape", None) or ())
    dtype = np.dtype(feature.np_dtype)
    if None in shape or dtype.kind not in "fiub":
        raise UsageError(
            f"{folder / 'features.json'}: feature steps/{name} has shape {shape} and type {dtype}; "
            "accepted: numbers of a fixed shape"
        )
    encoding = str(getattr(getattr(feature, "_encoding", None), "value", "none"))
    packed = dtype.str if encoding in ("bytes", "zlib") else ""
    return NumberFeature(math.prod(shape), dtype.kind != "f", packed, encoding == "zlib")


def _check_width(folder: Path, what: str, found: tuple[int, ...], expected: int, platform: Platform) -> None:
    if found != (expected,):
        raise UsageError(
            f"{folder / 'features.json'}: {what} has shape {found}; "
            f"accepted for platform {platform.name!r}: ({expected},)"
        )


def _widths(
    folder: Path, steps: Any, spec: DatasetSpec, platform: Platform, with_proprio: bool
) -> tuple[dict[str, NumberFeature], int, int]:
    """How the numbers are stored, and the widths of action and state after a check against the platform."""
    if spec.assembly is None:
        wanted = ((spec.action, platform.action_dim), (spec.state, platform.proprio_dim))
        for name, width in wanted if with_proprio else wanted[:1]:
            _check_width(folder, f"feature steps/{name}", tuple(_feature(steps, name).shape), width, platform)
        numbers = {name: _number_feature(folder, steps, name) for name in spec.numbers}
        return numbers, numbers[spec.action].width, numbers[spec.state].width
    numbers = {name: _number_feature(folder, steps, name) for name in spec.numbers}
    # A made-up step of zeros shows how wide the vectors come out.
    step = {name: np.zeros((1, feature.width), np.float32) for name, feature in numbers.items()}
    action, proprio = (vectors.shape[1] for vectors in spec.assembly(step))
    made_of = "made of " + ", ".join(spec.numbers)
    _check_width(folder, f"the action {made_of}", (action,), platform.action_dim, platform)
    if with_proprio:
        _check_width(folder, f"the state {made_of}", (proprio,), platform.proprio_dim, platform)
    return numbers, action, proprio


def open_dataset(
    data_root_dir: Path, name: str, spec: DatasetSpec, platform: Platform, with_proprio: bool = True
) -> dict[str, SplitFiles]:
    """All splits of a dataset after a check of its schema; the width of its states matters `with_proprio` alone.

    Raises:
        UsageError: a missing folder, unreadable metadata, a file format other than TFRecord, a missing feature, or
            actions or states whose width is not the platform's.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import Error as ProtobufJSONError

    folder = find_version_folder(data_root_dir, name)
    for required in ("dataset_info.json", "features.json"):
        if not (folder / required).is_file():
            raise UsageError(f"{folder / required}: no such file; accepted: a TFDS dataset folder (RLDS)")
    try:
        info = tfds.builder_from_directory(folder).info
        steps = info.features["steps"].feature
    except (ProtobufJSONError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{folder}: dataset_info.json or features.json is no valid RLDS description: {reason}"
        ) from error
    if info.file_format.value != "tfrecord":
        raise UsageError(f"{folder}: file format {info.file_format.value!r}; accepted: tfrecord")
    for feature in (*spec.numbers, spec.language, *spec.stored_images.values()):
        if _feature(steps, feature) is None:
            raise UsageError(
                f"{folder / 'features.json'}: missing feature steps/{feature}, which dataset {name!r} needs; "
                f"found: {', '.join(sorted(_names(steps)))}"
            )
    numbers, action_width, state_width = _widths(folder, steps, spec, platform, with_proprio)
    if np.dtype(_feature(steps, spec.language).np_dtype).kind in "iu":
        numbers[spec.language] = _number_feature(folder, steps, spec.language)
    return {
        split: SplitFiles(
            folder=folder,
            split=split,
            shards=tuple(Path(str(path)) for path in split_info.filepaths),
            shard_lengths=tuple(int(length) for length in split_info.shard_lengths),
            numbers=numbers,
            action_width=action_width,
            state_width=state_width,
        )
        for split, split_info in info.splits.items()
    }


def _names(node: Any, prefix: str = "steps/") -> list[str]:
    names: list[str] = []
    for key, value in node.items():
        names += _names(value, f"{prefix}{key}/") if hasattr(value, "items") else [prefix + key]
    return names


def choose_split(splits: Mapping[str, SplitT], name: str, train: bool) -> SplitT:
    """The "train" split, or the "val" split when `train` is False.

    Raises:
        UsageError: the dataset has no such split.
    """
    wanted = "train" if train else "val"
    if wanted not in splits:
        names = ", ".join(sorted(splits)) or "none"
        hint = "" if train else " (--use_val_set needs one; --val_fraction 0.05 holds episodes out instead)"
        raise UsageError(f"dataset {name!r} has no split {wanted!r}{hint}; found: {names}")
    return splits[wanted]
