"""The features of an RLDS dataset: their description for TFDS, and episodes as records, without TensorFlow.

One tf.train.Example holds an episode; a feature of the steps is one list with all steps one after the other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeAlias

import numpy as np

_CLASSES = "tensorflow_datasets.core.features."

Values = np.ndarray | Sequence[float | str | bytes] | Sequence[bytes] | Sequence[str]
# The list of a tf.train.Feature that holds the values, and the values.
Stored = tuple[str, Sequence[object]]


@dataclass(frozen=True)
class Numbers:
    """An array of `shape` a step (or one number); `zlib` stores it compressed, as one byte string a step."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    zlib: bool = False

    def describe(self) -> dict[str, object]:
        kind = "tensor_feature.Tensor" if self.shape or self.zlib else "scalar.Scalar"
        dimensions = {"dimensions": [str(size) for size in self.shape]} if self.shape else {}
        encoding = "zlib" if self.zlib else "none"
        return {
            "pythonClassName": _CLASSES + kind,
            "tensor": {"dtype": self.dtype, "encoding": encoding, "shape": dimensions},
        }

    def store(self, values: Values) -> Stored:
        """The values of all steps."""
        array = np.asarray(values, dtype=self.dtype)
        if self.zlib:
            return "bytes_list", [zlib.compress(step.tobytes()) for step in array]
        if array.dtype.kind == "f":
            return "float_list", array.astype(np.float32).ravel().tolist()
        return "int64_list", array.astype(np.int64).ravel().tolist()


@dataclass(frozen=True)
class Images:
    """An encoded image a step; `dtype` uint8 with 3 channels, or for depth another type with 1."""

    height: int
    width: int
    encoding: str = "jpeg"
    channels: int = 3
    dtype: str = "uint8"

    def describe(self) -> dict[str, object]:
        shape = {"dimensions": [str(self.height), str(self.width), str(self.channels)]}
        return {
            "image": {"dtype": self.dtype, "encodingFormat": self.encoding, "shape": shape},
            "pythonClassName": _CLASSES + "image_feature.Image",
        }

    def store(self, values: Values) -> Stored:
        """The encoded images of all steps."""
        return "bytes_list", list(values)


@dataclass(frozen=True)
class Texts:
    """A text a step."""

    def describe(self) -> dict[str, object]:
        return {"pythonClassName": _CLASSES + "text_feature.Text", "text": {}}

    def store(self, values: Values) -> Stored:
        """The texts (or bytes) of all steps."""
        return "bytes_list", [text if isinstance(text, bytes) else str(text).encode() for text in values]


Feature = Numbers | Images | Texts
Features: TypeAlias = "Mapping[str, Feature | Features]"


def _group(described: Mapping[str, object]) -> dict[str, object]:
    return {"featuresDict": {"features": described}, "pythonClassName": _CLASSES + "features_dict.FeaturesDict"}


def _describe(features: Features) -> dict[str, object]:
    return {
        name: _group(_describe(feature)) if isinstance(feature, Mapping) else feature.describe()
        for name, feature in features.items()
    }


def _leaves(features: Features, prefix: str = "") -> Iterator[tuple[str, Feature]]:
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            yield from _leaves(feature, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", feature


def load_protocol() -> ModuleType:
    """Import the classes of tf.train.Example.

    Not while another thread may import something, as a progress bar's does: tensorflow_datasets replaces `__import__`
    for all threads while it is imported, by one that refuses relative imports.
    """
    from tensorflow_datasets.proto import tf_example_generated_pb2 as protocol

    return protocol


@dataclass(frozen=True)
class Schema:
    """Features of every step, and of every episode, of a dataset; groups are nested mappings."""

    steps: Features
    episode: Features = field(default_factory=dict)

    def features_json(self) -> dict[str, object]:
        """The content of features.json."""
        steps = {
            "pythonClassName": _CLASSES + "dataset_feature.Dataset",
            "sequence": {"feature": _group(_describe(self.steps)), "length": "-1"},
        }
        return _group({**_describe(self.episode), "steps": steps})

    def serialize(self, steps: Mapping[str, Values], episode: Mapping[str, float | str | bytes] | None = None) -> bytes:
        """An episode as a tf.train.Example; equal episodes give equal bytes.

        Args:
            steps: "group/name" -> its values at every step: an array, encoded images, or texts.
            episode: the same for the whole episode, one value each.

        Raises:
            ValueError: a feature is missing, unknown, or has not one value of its shape a step.
        """
        protocol = load_protocol()
        given = dict(episode or {})
        expected, episode_features = dict(_leaves(self.steps)), dict(_leaves(self.episode))
        if set(steps) != set(expected) or set(given) != set(episode_features):
            wrong = sorted({*steps, *given} ^ {*expected, *episode_features})
            raise ValueError(f"features {', '.join(wrong)}: given or described, not both")
        lengths = {name: len(values) for name, values in steps.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"features of different numbers of steps: {lengths}")
        example = protocol.Example()
        for name, feature in expected.items():
            if isinstance(feature, Numbers) and np.size(steps[name]) != lengths[name] * math.prod(feature.shape):
                shape = np.shape(steps[name])[1:]
                raise ValueError(f"feature {name}: values of shape {shape} a step; accepted: {feature.shape}")
        stored = {f"steps/{name}": feature.store(steps[name]) for name, feature in expected.items()}
        stored |= {name: feature.store([given[name]]) for name, feature in episode_features.items()}
        for name, (kind, values) in stored.items():
            getattr(example.features.feature[name], kind).value.extend(values)
        return bytes(example.SerializeToString(deterministic=True))
