"""Finding an RLDS dataset on disk and checking its schema, through tensorflow-datasets (no TensorFlow needed)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform

SplitT = TypeVar("SplitT")


@dataclass(frozen=True)
class SplitFiles:
    """One split of a dataset: its version folder, its TFRecord shards with their record counts, and feature widths."""

    folder: Path
    split: str
    shards: tuple[Path, ...]
    shard_lengths: tuple[int, ...]
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
        there = sorted(path.name for path in data_root_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
        close = difflib.get_close_matches(name, there, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(
            f"--data_root_dir: {data_root_dir} holds no dataset {name!r}{hint}; found: {', '.join(there) or 'none'}"
        )
    versions = [path for path in dataset.iterdir() if path.is_dir() and path.name.replace(".", "").isdigit()]
    if not versions:
        raise UsageError(
            f"{dataset}: no version folder; accepted: a folder like {dataset / '1.0.0'} with dataset_info.json"
        )
    return max(versions, key=_version_key)


def _feature(steps: Any, name: str) -> Any:
    """The TFDS feature connector at a path like "observation/image"; None when there is none."""
    node = steps
    for part in name.split("/"):
        if not hasattr(node, "keys") or part not in node.keys():  # noqa: SIM118  (FeaturesDict is no Mapping)
            return None
        node = node[part]
    return node


def _width(folder: Path, steps: Any, name: str, expected: int, platform: Platform) -> int:
    shape = tuple(_feature(steps, name).shape)
    if shape != (expected,):
        raise UsageError(
            f"{folder / 'features.json'}: feature steps/{name} has shape {shape}; "
            f"accepted for platform {platform.name!r}: ({expected},)"
        )
    return expected


def open_dataset(data_root_dir: Path, name: str, spec: DatasetSpec, platform: Platform) -> dict[str, SplitFiles]:
    """All splits of a dataset after a check of its schema.

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
    for feature in (spec.action, spec.state, spec.language, *spec.images.values()):
        if _feature(steps, feature) is None:
            raise UsageError(
                f"{folder / 'features.json'}: missing feature steps/{feature}, which dataset {name!r} needs; "
                f"found: {', '.join(sorted(_names(steps)))}"
            )
    action_width = _width(folder, steps, spec.action, platform.action_dim, platform)
    state_width = _width(folder, steps, spec.state, platform.proprio_dim, platform)
    return {
        split: SplitFiles(
            folder=folder,
            split=split,
            shards=tuple(Path(str(path)) for path in split_info.filepaths),
            shard_lengths=tuple(int(length) for length in split_info.shard_lengths),
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
        found = ", ".join(sorted(splits)) or "none"
        hint = "" if train else " (--use_val_set needs one; leave it off for this dataset)"
        raise UsageError(f"dataset {name!r} has no split {wanted!r}{hint}; found: {found}")
    return splits[wanted]
