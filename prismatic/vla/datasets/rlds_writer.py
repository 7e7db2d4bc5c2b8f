"""Writing episodes as an RLDS dataset that TFDS opens, without TensorFlow.

TFRecord files of one record an episode, beside features.json and dataset_info.json. :class:`Episode` is one of LIBERO,
in the layout of the published `libero_*_no_noops` datasets, version 1.0.0; others are described by a `Schema`.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from prismatic.util.files import atomic_path, atomic_write
from prismatic.vla.datasets.rlds_schema import Features, Images, Numbers, Schema, Texts
from prismatic.vla.datasets.tfrecord import masked_crc
from prismatic.vla.platforms import ALOHA

JPEG_QUALITY = 95
STATE_DIM, JOINT_DIM, ACTION_DIM = 8, 7, 7
_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps."""

    images: Sequence[bytes]  # T JPEG files, rotated 180 degrees as the policies expect them
    wrist_images: Sequence[bytes]  # The same of the wrist camera
    state: np.ndarray  # (T, 8) hand position, axis-angle, two finger positions
    joint_state: np.ndarray  # (T, 7) arm joints
    action: np.ndarray  # (T, 7) as the simulator takes it: gripper -1 open, +1 close
    instruction: str  # What the robot was asked to do
    source: str  # Where the episode comes from; stored as `file_path`


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG (quality 95, 4:2:0 chroma, as TensorFlow's encoder defaults to) of a uint8 (H, W, 3) image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _check(episode: Episode) -> None:
    steps = len(episode.images)
    widths = {"state": STATE_DIM, "joint_state": JOINT_DIM, "action": ACTION_DIM}
    shapes = [
        ("wrist_images", (len(episode.wrist_images),), (steps,)),
        *((name, getattr(episode, name).shape, (steps, width)) for name, width in widths.items()),
    ]
    wrong = [f"{name} {shape} (expected {needed})" for name, shape, needed in shapes if shape != needed]
    if not steps or wrong:
        raise ValueError(f"episode {episode.source}: {steps} images and {', '.join(wrong) or 'nothing else'}")


def serialize_episode(episode: Episode) -> bytes:
    """The episode as a tf.train.Example; equal episodes give equal bytes.

    The last step has reward 1 and is terminal: only successful episodes are demonstrations. Raises ValueError: no
    steps, or lengths that do not agree.
    """
    _check(episode)
    steps = len(episode.images)
    numbers = np.arange(steps)
    return libero_schema(0).serialize(
        {
            "action": episode.action,
            "discount": np.ones(steps),
            "is_first": numbers == 0,
            "is_last": numbers == steps - 1,
            "is_terminal": numbers == steps - 1,
            "language_instruction": [episode.instruction] * steps,
            "observation/image": episode.images,
            "observation/joint_state": episode.joint_state,
            "observation/state": episode.state,
            "observation/wrist_image": episode.wrist_images,
            "reward": numbers == steps - 1,
        },
        {"episode_metadata/file_path": episode.source},
    )


def frame_record(payload: bytes) -> bytes:
    """A TFRecord: length, its masked CRC-32C, payload, the payload's."""
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))


def libero_schema(image_size: int) -> Schema:
    """Schema of the published LIBERO datasets."""
    image, flag = Images(image_size, image_size), Numbers(dtype="bool")
    observation: Features = {
        "image": image,
        "joint_state": Numbers((JOINT_DIM,)),
        "state": Numbers((STATE_DIM,)),
        "wrist_image": image,
    }
    steps: Features = {
        "action": Numbers((ACTION_DIM,)),
        "discount": Numbers(),
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
        "language_instruction": Texts(),
        "observation": observation,
        "reward": Numbers(),
    }
    return Schema(steps, {"episode_metadata": {"file_path": Texts()}})


def aloha_schema(height: int, width: int, encoding: str = "jpeg") -> Schema:
    """Schema of a two-armed dataset: head and wrist cameras, joints and grippers of both arms (14 numbers)."""
    image, flag = Images(height, width, encoding), Numbers(dtype="bool")
    observation: Features = {
        "image": image,
        "left_wrist_image": image,
        "right_wrist_image": image,
        "state": Numbers((ALOHA.proprio_dim,)),
    }
    steps: Features = {
        "action": Numbers((ALOHA.action_dim,)),
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
        "language_instruction": Texts(),
        "observation": observation,
    }
    return Schema(steps, {"episode_metadata": {"file_path": Texts()}})


def features_json(image_size: int) -> dict[str, object]:
    """The schema of the LIBERO datasets as TFDS stores it."""
    return libero_schema(image_size).features_json()


class RLDSWriter:
    """Writes a dataset under `root`: LIBERO's features with square images of `image_size`, or those of `schema`."""

    def __init__(
        self,
        root: str | Path,
        name: str,
        version: str = "1.0.0",
        *,
        image_size: int = 256,
        notes: str = "",
        schema: Schema | None = None,
    ) -> None:
        self.name, self.version, self.image_size = name, version, image_size
        self.schema = schema or libero_schema(image_size)
        self.folder = Path(root) / name / version
        self._notes = notes or "Written by prismatic.vla.datasets.rlds_writer"

    def write(self, episodes: Iterable[Episode]) -> Path:
        """Write episodes held in memory; see :meth:`write_payloads`."""
        return self.write_payloads([serialize_episode(episode) for episode in episodes])

    def write_payloads(self, payloads: Sequence[bytes | Path]) -> Path:
        """Write serialized episodes (or files holding one each) as the split "train"; see :meth:`write_splits`."""
        return self.write_splits({"train": payloads})

    def write_splits(self, splits: Mapping[str, Sequence[bytes | Path]]) -> Path:
        """Write the serialized episodes of every split in the given order; returns the dataset's folder.

        Shards hold about 256 MB. A reader sees no dataset, the old one or the new one: dataset_info.json comes last.
        Raises ValueError: nothing to write.
        """
        if not any(splits.values()):
            raise ValueError(f"dataset {self.name}: no episodes to write")
        self._remove_old()
        descriptions = [self._write_split(split, payloads) for split, payloads in splits.items()]
        atomic_write(self.folder / "features.json", json.dumps(self.schema.features_json(), indent=4))
        atomic_write(self.folder / "dataset_info.json", json.dumps(self._info(descriptions), indent=2))
        return self.folder

    def _write_split(self, split: str, payloads: Sequence[bytes | Path]) -> dict[str, object]:
        """Write the shards of a split; returns its description."""
        shards: list[list[bytes | Path]] = [[]]
        filled = total = 0
        for payload in payloads:
            size = payload.stat().st_size if isinstance(payload, Path) else len(payload)
            if filled and filled + size > _SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(payload)
            filled, total = filled + size, total + size
        for number, shard in enumerate(shards):
            file_name = f"{self.name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            with atomic_path(self.folder / file_name) as temporary, open(temporary, "wb") as file:
                for payload in shard:
                    file.write(frame_record(payload.read_bytes() if isinstance(payload, Path) else payload))
        return {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": split,
            "numBytes": str(total),
            "shardLengths": [str(len(shard)) for shard in shards],
        }

    def _remove_old(self) -> None:
        """Files of an earlier dataset of this name; its description goes first, so that a half-removed one is none."""
        (self.folder / "dataset_info.json").unlink(missing_ok=True)
        for pattern in (f"{self.name}-*.tfrecord-*", "dataset_statistics*.json"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _info(self, splits: list[dict[str, object]]) -> dict[str, object]:
        return {
            "fileFormat": "tfrecord",
            "moduleName": "prismatic.vla.datasets.rlds_writer",
            "name": self.name,
            "releaseNotes": {self.version: self._notes},
            "splits": splits,
            "version": self.version,
        }
