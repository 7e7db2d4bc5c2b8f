"""Writing LIBERO episodes as an RLDS dataset that TFDS opens, without TensorFlow.

The layout is that of the published `libero_*_no_noops` datasets, version 1.0.0: one tf.train.Example an episode, whose
features hold all steps one after the other, in TFRecord files, beside features.json and dataset_info.json.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

from prismatic.util.files import atomic_path, atomic_write

JPEG_QUALITY = 95
STATE_DIM, JOINT_DIM, ACTION_DIM = 8, 7, 7
_SHARD_BYTES = 256 << 20
_CLASSES = "tensorflow_datasets.core.features."


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps.

    Attributes:
        images, wrist_images: T JPEG files each, rotated 180 degrees as the policies expect them.
        state: (T, 8) hand position, axis-angle, two finger positions.
        joint_state: (T, 7) arm joints.
        action: (T, 7) as the simulator takes it: gripper -1 open, +1 close.
        instruction: what the robot was asked to do.
        source: where the episode comes from; stored as `file_path`.
    """

    images: Sequence[bytes]
    wrist_images: Sequence[bytes]
    state: np.ndarray
    joint_state: np.ndarray
    action: np.ndarray
    instruction: str
    source: str


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG (quality 95, 4:2:0 chroma, as TensorFlow's encoder defaults to) of a uint8 (H, W, 3) image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _check(episode: Episode) -> None:
    steps = len(episode.images)
    found = {
        "wrist_images": (len(episode.wrist_images),),
        "state": episode.state.shape,
        "joint_state": episode.joint_state.shape,
        "action": episode.action.shape,
    }
    wanted = {
        "wrist_images": (steps,),
        "state": (steps, STATE_DIM),
        "joint_state": (steps, JOINT_DIM),
        "action": (steps, ACTION_DIM),
    }
    wrong = [f"{name} {found[name]} (expected {wanted[name]})" for name in wanted if found[name] != wanted[name]]
    if not steps or wrong:
        raise ValueError(f"episode {episode.source}: {steps} images and {', '.join(wrong) or 'nothing else'}")


def serialize_episode(episode: Episode) -> bytes:
    """The episode as a tf.train.Example; equal episodes give equal bytes.

    The last step has reward 1 and is terminal: only successful episodes are demonstrations.

    Raises:
        ValueError: no steps, or lengths that do not agree.
    """
    from tensorflow_datasets.proto import tf_example_generated_pb2 as protocol

    _check(episode)
    steps = len(episode.images)
    last = np.arange(steps) == steps - 1
    floats = {
        "steps/action": episode.action,
        "steps/discount": np.ones(steps),
        "steps/observation/joint_state": episode.joint_state,
        "steps/observation/state": episode.state,
        "steps/reward": last,
    }
    flags = {"steps/is_first": np.arange(steps) == 0, "steps/is_last": last, "steps/is_terminal": last}
    texts = {
        "episode_metadata/file_path": [episode.source.encode()],
        "steps/language_instruction": [episode.instruction.encode()] * steps,
        "steps/observation/image": episode.images,
        "steps/observation/wrist_image": episode.wrist_images,
    }
    example = protocol.Example()
    feature = example.features.feature
    for name, values in floats.items():
        feature[name].float_list.value.extend(np.asarray(values, dtype=np.float32).ravel().tolist())
    for name, values in flags.items():
        feature[name].int64_list.value.extend(values.astype(int).tolist())
    for name, items in texts.items():
        feature[name].bytes_list.value.extend(items)
    return bytes(example.SerializeToString(deterministic=True))


def frame_record(payload: bytes) -> bytes:
    """A TFRecord: length, its masked CRC-32C, payload, the payload's."""
    length = struct.pack("<Q", len(payload))
    return length + _masked_crc(length) + payload + _masked_crc(payload)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _tensor(dtype: str, *shape: int, scalar: bool = False) -> dict[str, Any]:
    kind = "scalar.Scalar" if scalar else "tensor_feature.Tensor"
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {
        "pythonClassName": _CLASSES + kind,
        "tensor": {"dtype": dtype, "encoding": "none", "shape": dimensions},
    }


def _image(size: int) -> dict[str, Any]:
    shape = {"dimensions": [str(size), str(size), "3"]}
    return {
        "image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape},
        "pythonClassName": _CLASSES + "image_feature.Image",
    }


def _text() -> dict[str, Any]:
    return {"pythonClassName": _CLASSES + "text_feature.Text", "text": {}}


def _group(features: dict[str, Any]) -> dict[str, Any]:
    return {"featuresDict": {"features": features}, "pythonClassName": _CLASSES + "features_dict.FeaturesDict"}


def features_json(image_size: int) -> dict[str, Any]:
    """The dataset's schema as TFDS stores it."""
    observation = {
        "image": _image(image_size),
        "joint_state": _tensor("float32", JOINT_DIM),
        "state": _tensor("float32", STATE_DIM),
        "wrist_image": _image(image_size),
    }
    step = {
        "action": _tensor("float32", ACTION_DIM),
        "discount": _tensor("float32", scalar=True),
        "is_first": _tensor("bool", scalar=True),
        "is_last": _tensor("bool", scalar=True),
        "is_terminal": _tensor("bool", scalar=True),
        "language_instruction": _text(),
        "observation": _group(observation),
        "reward": _tensor("float32", scalar=True),
    }
    steps = {
        "pythonClassName": _CLASSES + "dataset_feature.Dataset",
        "sequence": {"feature": _group(step), "length": "-1"},
    }
    return _group({"episode_metadata": _group({"file_path": _text()}), "steps": steps})


class RLDSWriter:
    """Writes a dataset `name` of episodes with square images of `image_size` pixels under `root`."""

    def __init__(
        self, root: str | Path, name: str, version: str = "1.0.0", *, image_size: int, notes: str = ""
    ) -> None:
        self.name, self.version, self.image_size = name, version, image_size
        self.folder = Path(root) / name / version
        self._notes = notes or "Written by prismatic.vla.datasets.rlds_writer"

    def write(self, episodes: Iterable[Episode]) -> Path:
        """Write episodes held in memory; see :meth:`write_payloads`."""
        return self.write_payloads([serialize_episode(episode) for episode in episodes])

    def write_payloads(self, payloads: Sequence[bytes | Path]) -> Path:
        """Write serialized episodes (or files holding one each) in the given order; returns the dataset's folder.

        Shards hold about 256 MB. A reader sees no dataset, the old one or the new one: dataset_info.json comes last.

        Raises:
            ValueError: nothing to write.
        """
        if not payloads:
            raise ValueError(f"dataset {self.name}: no episodes to write")
        shards: list[list[bytes | Path]] = [[]]
        filled = total = 0
        for payload in payloads:
            size = payload.stat().st_size if isinstance(payload, Path) else len(payload)
            if filled and filled + size > _SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(payload)
            filled, total = filled + size, total + size
        self._remove_old()
        for number, shard in enumerate(shards):
            file_name = f"{self.name}-train.tfrecord-{number:05d}-of-{len(shards):05d}"
            with atomic_path(self.folder / file_name) as temporary, open(temporary, "wb") as file:
                for payload in shard:
                    file.write(frame_record(payload.read_bytes() if isinstance(payload, Path) else payload))
        atomic_write(self.folder / "features.json", json.dumps(features_json(self.image_size), indent=4))
        info = self._info([len(shard) for shard in shards], total)
        atomic_write(self.folder / "dataset_info.json", json.dumps(info, indent=2))
        return self.folder

    def _remove_old(self) -> None:
        """Files of an earlier dataset of this name; its description goes first, so that a half-removed one is none."""
        (self.folder / "dataset_info.json").unlink(missing_ok=True)
        for pattern in (f"{self.name}-train.tfrecord-*", "dataset_statistics*.json"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _info(self, shard_lengths: list[int], num_bytes: int) -> dict[str, Any]:
        split = {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": "train",
            "numBytes": str(num_bytes),
            "shardLengths": [str(length) for length in shard_lengths],
        }
        return {
            "fileFormat": "tfrecord",
            "moduleName": "prismatic.vla.datasets.rlds_writer",
            "name": self.name,
            "releaseNotes": {self.version: self._notes},
            "splits": [split],
            "version": self.version,
        }
