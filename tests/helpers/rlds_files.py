"""Small RLDS datasets on disk for the tests, written with struct alone, so that they can also be wrong on purpose."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def encode_example(features: dict[str, Any]) -> bytes:
    """A serialized tf.train.Example of float arrays, integer lists and lists of byte strings."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, np.ndarray):
            feature = _message(2, _message(1, value.astype("<f4").tobytes()))
        elif isinstance(value[0], bytes):
            feature = _message(1, b"".join(_message(1, item) for item in value))
        else:
            feature = _message(3, _message(1, b"".join(_varint(item) for item in value)))
        entries += _message(1, _message(1, name.encode()) + _message(2, feature))
    return _message(1, entries)


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def frame_record(payload: bytes) -> bytes:
    """The payload as a TFRecord record."""
    length = struct.pack("<Q", len(payload))
    return length + _masked_crc(length) + payload + _masked_crc(payload)


def png(image_HW3: np.ndarray) -> bytes:
    """A picture (H, W, 3), unchanged, as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image_HW3: np.ndarray) -> bytes:
    """JPEG bytes of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def episode(steps: int, seed: int, instruction: str = "open the drawer", side: int = 32) -> dict[str, Any]:
    """The features of a random episode; its images are small noisy blocks."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (steps, 2, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(side // 8, axis=2).repeat(side // 8, axis=3)
    return {
        "steps/action": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "steps/observation/state": rng.normal(size=(steps, 8)).astype(np.float32),
        "steps/observation/joint_state": rng.normal(size=(steps, 7)).astype(np.float32),
        "steps/observation/image": [jpeg(image) for image in images[:, 0]],
        "steps/observation/wrist_image": [jpeg(image) for image in images[:, 1]],
        "steps/language_instruction": [instruction.encode()] * steps,
        "steps/reward": np.zeros(steps, np.float32),
        "steps/discount": np.ones(steps, np.float32),
        "steps/is_first": [1] + [0] * (steps - 1),
        "steps/is_last": [0] * (steps - 1) + [1],
        "steps/is_terminal": [0] * (steps - 1) + [1],
        "episode_metadata/file_path": [b"made-up"],
    }


def _features_json(side: int) -> dict[str, Any]:
    core = "tensorflow_datasets.core.features."

    def tensor(*shape: int, dtype: str = "float32") -> dict[str, Any]:
        kind = "tensor_feature.Tensor" if shape else "scalar.Scalar"
        dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
        return {"pythonClassName": core + kind, "tensor": {"dtype": dtype, "encoding": "none", "shape": dimensions}}

    def image() -> dict[str, Any]:
        shape = {"dimensions": [str(side), str(side), "3"]}
        return {
            "pythonClassName": core + "image_feature.Image",
            "image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape},
        }

    def text() -> dict[str, Any]:
        return {"pythonClassName": core + "text_feature.Text", "text": {}}

    def group(**features: Any) -> dict[str, Any]:
        return {"pythonClassName": core + "features_dict.FeaturesDict", "featuresDict": {"features": features}}

    step = group(
        action=tensor(7),
        reward=tensor(),
        discount=tensor(),
        is_first=tensor(dtype="bool"),
        is_last=tensor(dtype="bool"),
        is_terminal=tensor(dtype="bool"),
        language_instruction=text(),
        observation=group(image=image(), wrist_image=image(), state=tensor(8), joint_state=tensor(7)),
    )
    steps = {"pythonClassName": core + "dataset_feature.Dataset", "sequence": {"feature": step, "length": "-1"}}
    return group(steps=steps, episode_metadata=group(file_path=text()))


def write_dataset(root: Path, name: str, splits: dict[str, list[list[dict[str, Any]]]], side: int = 32) -> Path:
    """Write {split: shards of episodes} as `root/name/1.0.0`; returns that folder."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    descriptions = []
    for split, shards in splits.items():
        for number, episodes in enumerate(shards):
            path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            path.write_bytes(b"".join(frame_record(encode_example(features)) for features in episodes))
        descriptions.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(episodes)) for episodes in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {
        "fileFormat": "tfrecord",
        "moduleName": "__main__",
        "name": name,
        "version": "1.0.0",
        "splits": descriptions,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_features_json(side)))
    return folder
