"""Episodes written as RLDS: the published layout, read back by TFDS itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prismatic.vla.datasets import rlds_writer
from prismatic.vla.datasets.rlds_writer import Episode, RLDSWriter, encode_jpeg, features_json, serialize_episode

SIZE = 16


def make_episode(seed: int, steps: int = 5, **changes: object) -> Episode:
    rng = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, SIZE).astype(np.uint8)
    images = [encode_jpeg(np.dstack([np.tile(smooth, (SIZE, 1))] * 3) // (step + 1)) for step in range(steps)]
    values = {
        "images": images,
        "wrist_images": images[::-1],
        "state": rng.normal(size=(steps, 8)),
        "joint_state": rng.normal(size=(steps, 7)),
        "action": rng.uniform(-1, 1, (steps, 7)),
        "instruction": "pick up the milk",
        "source": f"episode{seed}",
    }
    return Episode(**{**values, **changes})


def test_schema_is_the_published_one(golden_dir: Path) -> None:
    published = golden_dir / "rlds" / "libero_spatial_no_noops" / "1.0.0" / "features.json"
    assert features_json(64) == json.loads(published.read_text())


def test_record_has_the_published_features_and_framing(golden_dir: Path, tmp_path: Path) -> None:
    from tensorflow_datasets.proto import tf_example_generated_pb2 as protocol

    from prismatic.vla.datasets.tfrecord import read_records

    folder = golden_dir / "rlds" / "libero_spatial_no_noops" / "1.0.0"
    shard = next(folder.glob("*.tfrecord*"))
    records = list(read_records(shard))
    assert b"".join(rlds_writer.frame_record(record.payload) for record in records) == shard.read_bytes()
    published = protocol.Example.FromString(records[0].payload).features.feature
    ours = protocol.Example.FromString(serialize_episode(make_episode(0))).features.feature
    assert {name: item.WhichOneof("kind") for name, item in ours.items()} == {
        name: item.WhichOneof("kind") for name, item in published.items()
    }


def test_tfds_reads_it_back(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    from prismatic.vla.datasets.tfrecord import read_records

    episodes = [make_episode(seed, steps=3 + seed) for seed in range(3)]
    folder = RLDSWriter(tmp_path, "libero_object_no_noops", image_size=SIZE).write(episodes)
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == 3
    assert builder.info.name == "libero_object_no_noops" and str(builder.info.version) == "1.0.0"
    for path in builder.info.splits["train"].filepaths:
        for record, episode in zip(read_records(Path(path)), episodes, strict=True):
            read = builder.info.features.deserialize_example_np(record.payload)
            steps = list(read["steps"])
            assert read["episode_metadata"]["file_path"].decode() == episode.source
            assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
            assert [step["is_last"] for step in steps] == [False] * (len(steps) - 1) + [True]
            assert [float(step["reward"]) for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
            for number, step in enumerate(steps):
                assert np.array_equal(step["action"], episode.action[number].astype(np.float32))
                assert np.array_equal(step["observation"]["state"], episode.state[number].astype(np.float32))
                assert step["language_instruction"].decode() == "pick up the milk"
                assert step["observation"]["image"].shape == (SIZE, SIZE, 3)
                exact = np.linspace(0, 255, SIZE).astype(np.uint8) // (number + 1)
                assert np.abs(step["observation"]["image"][0, :, 1].astype(int) - exact).max() <= 3


def test_many_episodes_make_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    payload = serialize_episode(make_episode(0))
    monkeypatch.setattr(rlds_writer, "_SHARD_BYTES", 2 * len(payload))
    stored = tmp_path / "one.example"
    stored.write_bytes(payload)
    folder = RLDSWriter(tmp_path, "set", image_size=SIZE).write_payloads([payload, stored, stored, payload, payload])
    split = tfds.builder_from_directory(folder).info.splits["train"]
    assert split.shard_lengths == [2, 2, 1]
    assert split.num_bytes == 5 * len(payload)


def test_rewriting_leaves_nothing_of_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = serialize_episode(make_episode(0))
    with monkeypatch.context() as patch:
        patch.setattr(rlds_writer, "_SHARD_BYTES", 1)
        folder = RLDSWriter(tmp_path, "set", image_size=SIZE).write_payloads([payload, payload])
    assert len(list(folder.glob("*.tfrecord*"))) == 2
    RLDSWriter(tmp_path, "set", image_size=SIZE).write_payloads([payload])
    assert [path.name for path in folder.glob("*.tfrecord*")] == ["set-train.tfrecord-00000-of-00001"]


def test_wrong_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"episode episode0: 5 images and action \(5, 6\) \(expected \(5, 7\)\)"):
        serialize_episode(make_episode(0, action=np.zeros((5, 6))))
    with pytest.raises(ValueError, match="no episodes to write"):
        RLDSWriter(tmp_path, "set", image_size=SIZE).write([])
