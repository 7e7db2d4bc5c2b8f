"""Small RLDS datasets on disk for the tests, in LIBERO's layout; they can also be wrong on purpose."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prismatic.vla.datasets.rlds_writer import encode_jpeg, frame_record

FEATURES = Path(__file__).parents[1] / "golden/rlds/libero_spatial_no_noops/1.0.0/features.json"  # of 64-pixel images


def encode_example(features: dict[str, Any]) -> bytes:
    """A serialized tf.train.Example of float arrays, integer lists and lists of byte strings."""
    from tensorflow_datasets.proto import tf_example_generated_pb2 as protocol

    example = protocol.Example()
    for name, values in features.items():
        kind = "float" if isinstance(values, np.ndarray) else "bytes" if isinstance(values[0], bytes) else "int64"
        stored = np.ravel(values) if kind == "float" else values
        getattr(example.features.feature[name], f"{kind}_list").value.extend(stored)
    return bytes(example.SerializeToString(deterministic=True))


def png(image_HW3: np.ndarray) -> bytes:
    """A picture (H, W, 3), unchanged, as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
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
        "steps/observation/image": [encode_jpeg(image) for image in images[:, 0]],
        "steps/observation/wrist_image": [encode_jpeg(image) for image in images[:, 1]],
        "steps/language_instruction": [instruction.encode()] * steps,
        "steps/reward": np.zeros(steps, np.float32),
        "steps/discount": np.ones(steps, np.float32),
        "steps/is_first": [1] + [0] * (steps - 1),
        "steps/is_last": [0] * (steps - 1) + [1],
        "steps/is_terminal": [0] * (steps - 1) + [1],
        "episode_metadata/file_path": [b"made-up"],
    }


def write_dataset(root: Path, name: str, splits: dict[str, list[list[dict[str, Any]]]], side: int = 32) -> Path:
    """Write {split: shards of episodes} as `root/name/1.0.0`; returns that folder."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    descriptions = []
    for split, shards in splits.items():
        for number, episodes in enumerate(shards):
            path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            path.write_bytes(b"".join(frame_record(encode_example(features)) for features in episodes))
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(episodes)) for episodes in shards]
        descriptions.append({"name": split, "numBytes": "1", "shardLengths": lengths, "filepathTemplate": template})
    info = {"fileFormat": "tfrecord", "moduleName": "__main__", "name": name, "version": "1.0.0"}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": descriptions}))
    schema = json.dumps(json.loads(FEATURES.read_text()))
    (folder / "features.json").write_text(schema.replace('"64"', f'"{side}"'))
    return folder
