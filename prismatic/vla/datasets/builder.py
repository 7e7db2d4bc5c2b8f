"""Finding a dataset on disk, and checking RLDS schemas through tensorflow-datasets (no TensorFlow needed)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prismatic.util.errors import UsageError, did_you_mean, one_line
from prismatic.vla.datasets.frame_index import ImageFeature, NumberFeature, RLDSSplit
from prismatic.vla.datasets.lerobot.split import LeRobotSplit, open_lerobot
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.platforms import Platform

SplitT = TypeVar("SplitT")

# One split of a dataset, its schema checked, its episodes not read yet.
DatasetSplit = RLDSSplit | LeRobotSplit
FILE_FORMATS = ("tfrecord", "array_record")


def _version_key(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def find_version_folder(data_root_dir: Path, name: str) -> Path:
    """The newest `data_root_dir/name/X.Y.Z`.

    Raises UsageError: a folder is missing; names it, and similar ones that are there.
    """
    if not data_root_dir.is_dir():
        raise UsageError(
            f"--data_root_dir: no such folder: {data_root_dir}; accepted: the folder that holds the RLDS datasets"
        )
    dataset = data_root_dir / name
    if not dataset.is_dir():
        names = sorted(path.name for path in data_root_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
        hint = did_you_mean(name, names)
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


def _encoding(feature: Any) -> str:
    return str(getattr(getattr(feature, "_encoding", None), "value", "none"))


def _number_feature(file: Path, feature: Any, name: str) -> NumberFeature:
    shape = tuple(getattr(feature, "shape", None) or ())
    dtype = np.dtype(feature.np_dtype)
    if None in shape or dtype.kind not in "fiub":
        raise UsageError(
            f"{file}: feature steps/{name} has shape {shape} and type {dtype}; accepted: numbers of a fixed shape"
        )
    encoding = _encoding(feature)
    packed = dtype.str if encoding in ("bytes", "zlib") else ""
    return NumberFeature(math.prod(shape), dtype.kind != "f", packed, encoding == "zlib")


def _image_feature(file: Path, feature: Any, name: str) -> ImageFeature:
    """Storage of the image: TFDS's Image or encoded bytes, else a Tensor of uint8."""
    shape, dtype = tuple(getattr(feature, "shape", None) or ()), np.dtype(feature.np_dtype)
    if dtype.kind in "OSU" and math.prod(shape) == 1:
        return ImageFeature()
    sizes = tuple(-1 if size is None else int(size) for size in shape)
    channels = shape[2] if len(shape) == 3 else 1
    encoded = type(feature).__name__ == "Image"
    fits = dtype == np.uint8 and len(shape) in (2, 3) and channels in (1, 3, 4, None)
    if not fits or (not encoded and (channels is None or sizes.count(-1) > 1)):
        raise UsageError(
            f"{file}: feature steps/{name} is a {type(feature).__name__} of shape {shape} and type {dtype}; accepted: "
            "an Image, encoded bytes or a Tensor, uint8 (height, width, 1, 3 or 4)"
        )
    encoding = _encoding(feature)
    return ImageFeature() if encoded else ImageFeature(sizes, encoding != "none", encoding == "zlib")


FormT = TypeVar("FormT", NumberFeature, ImageFeature)


def _forms(
    steps: Any, describe: Callable[[Path, Any, str], FormT], file: Path, names: Iterable[str], needed: frozenset[str]
) -> tuple[dict[str, FormT], set[str]]:
    """Storage of each feature, and those left out since they are not needed and have another form."""
    forms, others = {}, set()
    for name in names:
        try:
            forms[name] = describe(file, _feature(steps, name), name)
        except UsageError:
            if name in needed:
                raise
            others.add(name)
    return forms, others


def _open_builder(folder: Path) -> Any:
    """TFDS's description of the dataset in `folder`."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import Error as ProtobufJSONError

    for required in ("dataset_info.json", "features.json"):
        if not (folder / required).is_file():
            raise UsageError(f"{folder / required}: no such file; accepted: a TFDS dataset folder (RLDS)")
    try:
        info = tfds.builder_from_directory(folder).info
        _ = info.features["steps"].feature
    except (ProtobufJSONError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = one_line(error)
        raise UsageError(
            f"{folder}: dataset_info.json or features.json is no valid RLDS description: {reason}"
        ) from error
    if info.file_format.value not in FILE_FORMATS:
        raise UsageError(f"{folder}: file format {info.file_format.value!r}; accepted: {', '.join(FILE_FORMATS)}")
    return info


def open_dataset(
    data_root_dir: Path,
    name: str,
    spec: DatasetSpec,
    platform: Platform,
    with_proprio: bool = True,
    num_images: int | None = None,
) -> dict[str, RLDSSplit]:
    """All splits of an RLDS dataset after a check of its schema; arguments and refusals of :func:`find_splits`."""
    folder = find_version_folder(data_root_dir, name)
    info, file = _open_builder(folder), folder / "features.json"
    steps = info.features["steps"].feature
    needed = spec.needed(num_images, with_proprio)
    absent = {
        feature
        for feature in (*spec.numbers, spec.language, *spec.stored_images.values())
        if _feature(steps, feature) is None
    }
    for feature in absent:
        if feature in needed or feature == spec.language:
            raise UsageError(
                f"{file}: missing feature steps/{feature}, which dataset {name!r} needs; "
                f"found: {', '.join(sorted(_names(steps)))}"
            )
    spec = spec.without(absent)
    numbers, no_numbers = _forms(steps, _number_feature, file, spec.numbers, needed)
    images, no_images = _forms(steps, _image_feature, file, spec.stored_images.values(), needed)
    spec = spec.without(no_numbers | no_images)
    widths = {feature: numbers[feature].width for feature in spec.numbers}
    spec.check_widths(file, widths, platform, with_proprio, prefix="steps/")
    if np.dtype(_feature(steps, spec.language).np_dtype).kind in "iu":
        numbers[spec.language] = _number_feature(file, _feature(steps, spec.language), spec.language)
    return {
        split: RLDSSplit(
            folder=folder,
            split=split,
            shards=tuple(Path(str(path)) for path in split_info.filepaths),
            shard_lengths=tuple(int(length) for length in split_info.shard_lengths),
            spec=spec,
            needed=needed,
            numbers=numbers,
            images=images,
            array_record=info.file_format.value == "array_record",
        )
        for split, split_info in info.splits.items()
    }


def _names(node: Any, prefix: str = "steps/") -> list[str]:
    names: list[str] = []
    for key, value in node.items():
        names += _names(value, f"{prefix}{key}/") if hasattr(value, "items") else [prefix + key]
    return names


def find_splits(
    data_root_dir: Path,
    name: str,
    spec: DatasetSpec,
    platform: Platform,
    with_proprio: bool = True,
    num_images: int | None = None,
) -> dict[str, DatasetSplit]:
    """The splits of the dataset in `data_root_dir/name`: LeRobot when it holds meta/info.json, else RLDS.

    States that are not used (`with_proprio` False), and views after the first `num_images`, may be missing or wrong.
    Raises UsageError: a missing folder, unreadable metadata, another file format, a feature that is missing or of
    another kind, or actions or states whose width is not the platform's.
    """
    if (data_root_dir / name / "meta" / "info.json").is_file():
        if spec.rlds_only:
            raise UsageError(
                f"{data_root_dir / name}: a LeRobot dataset, but {name!r} is registered for its RLDS features "
                f"({', '.join(spec.numbers)}); accepted: RLDS files, or a name of its own (--dataset_file)"
            )
        return dict(open_lerobot(data_root_dir / name, spec, platform, with_proprio, num_images))
    return dict(open_dataset(data_root_dir, name, spec, platform, with_proprio, num_images))


def choose_split(splits: Mapping[str, SplitT], name: str, train: bool) -> SplitT:
    """The "train" split, or the "val" split when `train` is False. Raises UsageError: the dataset has no such split."""
    wanted = "train" if train else "val"
    if wanted not in splits:
        names = ", ".join(sorted(splits)) or "none"
        hint = "" if train else " (--use_val_set needs one; --val_fraction 0.05 holds episodes out instead)"
        raise UsageError(f"dataset {name!r} has no split {wanted!r}{hint}; found: {names}")
    return splits[wanted]
