"""Reading RLDS datasets: the frame index, its cache, random access, mixtures and what bad files say."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from prismatic.util.errors import UsageError
from prismatic.vla.datasets import FrameDraw, RLDSDataset, prepare_policy_image
from prismatic.vla.datasets.builder import open_dataset
from prismatic.vla.datasets.episodes import cache_folder
from prismatic.vla.datasets.frame_index import load_frame_index
from prismatic.vla.datasets.image_transforms import decode_image
from prismatic.vla.datasets.specs import DATASETS, LIBERO_SPEC, DatasetSpec, register_dataset, resolve_mixture
from prismatic.vla.datasets.statistics import normalize
from prismatic.vla.platforms import ALOHA, LIBERO
from tests.helpers.rlds_files import encode_example, episode, frame_record, write_dataset

NAME = "libero_spatial_no_noops"


def _keep(frame: dict[str, Any]) -> dict[str, Any]:
    return frame


def _open(root: Path, mix: str = NAME, **options: Any) -> RLDSDataset:
    return RLDSDataset(root, mix, _keep, (32, 32), **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards: episodes of 12 and 9 steps, then one of 6 (too short for a chunk) and one of 8."""
    shards = [[episode(12, 0), episode(9, 1, "close it")], [episode(6, 2), episode(8, 3)]]
    write_dataset(tmp_path, NAME, {"train": shards, "val": [[episode(10, 4)]]})
    return tmp_path


def test_index_holds_what_tfds_reads(root: Path) -> None:
    builder = tfds.builder_from_directory(root / NAME / "1.0.0")
    index = load_frame_index(open_dataset(root, NAME, LIBERO_SPEC, LIBERO)["train"])
    steps = [
        step
        for path in index.shards
        for payload in _payloads(path)
        for step in builder.info.features.deserialize_example_np(payload)["steps"]
    ]
    assert len(steps) == index.num_frames == 35
    np.testing.assert_array_equal(index.action, [step["action"] for step in steps])
    np.testing.assert_array_equal(index.state, [step["observation"]["state"] for step in steps])
    found = [index.instructions[number].encode() for number in index.language]
    assert found == [step["language_instruction"] for step in steps]
    for view, feature in enumerate(("image", "wrist_image")):
        for frame, step in enumerate(steps):
            shard = index.shards[index.episode_shard[index.episode_of(frame)]]
            start, size = index.image_start[view, frame], index.image_size[view, frame]
            encoded = shard.read_bytes()[start : start + size]
            # TFDS decodes with Pillow, or with another library when that is installed: by the accurate DCT.
            difference = decode_image(encoded).astype(int) - step["observation"][feature]
            assert np.abs(difference).max() <= 18 and np.abs(difference).mean() < 3


def _payloads(path: Path) -> list[bytes]:
    data, payloads, position = path.read_bytes(), [], 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        payloads.append(data[position + 12 : position + 12 + length])
        position += length + 16
    return payloads


def test_start_frames_have_a_whole_chunk(root: Path) -> None:
    dataset = _open(root)
    assert len(dataset) == (12 - 7) + (9 - 7) + 0 + (8 - 7)
    raw = [episode(12, 0), episode(9, 1), episode(8, 3)]
    statistics = dataset.dataset_statistics[NAME]["action"]
    number = 0
    for features in raw:
        actions = features["steps/action"].copy()
        actions[:, 6] = 1 - np.clip(actions[:, 6], 0, 1)
        for start in range(len(actions) - 7):
            frame = dataset.frame(number)
            expected = normalize(actions[start : start + 8], statistics, LIBERO.normalization)
            np.testing.assert_allclose(frame["action"], expected, atol=1e-6)
            assert frame["observation"]["timestep"].tolist() == [start]
            image = decode_image(features["steps/observation/wrist_image"][start])
            np.testing.assert_array_equal(frame["observation"]["image_wrist"][0], image)
            number += 1
    assert number == len(dataset) and len(list(dataset)) == number
    with pytest.raises(IndexError):
        dataset[number]


def test_validation_split(root: Path) -> None:
    train, val = _open(root), _open(root, train=False)
    assert len(val) == 3
    assert val.dataset_statistics == train.dataset_statistics  # both over all transitions of all splits
    assert val.dataset_statistics[NAME]["num_transitions"] == 45
    assert val.dataset_statistics[NAME]["num_trajectories"] == 5


def test_a_frame_reads_only_its_own_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, read = _open(root), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *where: read.append(where[1]) or pread(*where))
    dataset.frame(3)
    features = episode(12, 0)
    expected = [len(features[f"steps/observation/{view}"][3]) for view in ("image", "wrist_image")]
    assert read == expected


class TestCache:
    def test_lies_beside_the_data_and_is_used(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = _open(root)
        folder = root / NAME / "1.0.0"
        assert (folder / "frame_index-train.npz").is_file()
        assert [path.name for path in folder.glob(".*")] == []
        (statistics,) = folder.glob("dataset_statistics_*.json")
        assert json.loads(statistics.read_text()) == first.dataset_statistics
        monkeypatch.setattr("prismatic.vla.datasets.frame_index.read_records", _must_not_run)
        monkeypatch.setattr("prismatic.vla.datasets.dataset.compute_statistics", _must_not_run)
        second = _open(root)
        assert second.dataset_statistics == first.dataset_statistics
        for number in range(len(first)):
            np.testing.assert_array_equal(first.frame(number)["action"], second.frame(number)["action"])

    def test_a_transform_of_the_same_name_has_its_own_statistics(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Edited code and a value from outside alike; also callables that have no name."""

        def scaled(factor: float) -> Callable[..., Any]:
            return lambda action, state: (action * factor, state)

        means = []
        for transform in (scaled(1.0), scaled(2.0), functools.partial(scaled(4.0))):
            monkeypatch.setitem(DATASETS, NAME, dataclasses.replace(LIBERO_SPEC, standardize=transform))
            means.append(_open(root).dataset_statistics[NAME]["action"]["mean"])
        np.testing.assert_allclose(np.array(means[1:]) / means[0], [[2.0] * 7, [4.0] * 7], rtol=1e-6)

    def test_changed_data_are_read_again(self, root: Path) -> None:
        assert len(_open(root)) == 8
        shutil.rmtree(root / NAME)
        write_dataset(root, NAME, {"train": [[episode(20, 9)]]})
        cache = root / NAME / "1.0.0" / "frame_index-train.npz"
        dataset = _open(root)
        assert len(dataset) == 13 and dataset.dataset_statistics[NAME]["num_transitions"] == 20
        path = dataset._sources[0].index.shards[0]
        os.utime(path, ns=(0, 0))
        written = cache.stat().st_mtime_ns
        _open(root)
        assert cache.stat().st_mtime_ns > written

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not an archive", None])
    def test_a_damaged_cache_is_built_anew(self, root: Path, damage: bytes | None) -> None:
        _open(root)
        cache = root / NAME / "1.0.0" / "frame_index-train.npz"
        whole = cache.read_bytes()
        cache.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        assert len(_open(root)) == 8
        assert len(cache.read_bytes()) == len(whole)

    def test_a_read_only_folder_is_left_alone(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = root / NAME / "1.0.0"
        before = sorted(folder.iterdir())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder.chmod(0o555)
        try:
            _open(root)
            assert sorted(folder.iterdir()) == before
            assert (cache_folder(folder) / "frame_index-train.npz").is_file()
            assert cache_folder(folder).is_relative_to(tmp_path / "cache")
            _open(root)
            assert [record.message for record in caplog.records] == [
                f"{folder} may not be written: its index and statistics are cached in {cache_folder(folder)}"
            ]
        finally:
            folder.chmod(0o755)


def _must_not_run(*_: Any) -> Any:
    raise AssertionError("the cache should have been used")


class TestMixture:
    def test_joins_datasets(self, root: Path) -> None:
        write_dataset(root, "libero_object_no_noops", {"train": [[episode(11, 5, "lift it")]]})
        dataset = _open(root, f"{NAME}, libero_object_no_noops:0.5")
        assert [(part.name, part.first, part.size, part.weight) for part in dataset.mixture] == [
            (NAME, 0, 8, 1.0),
            ("libero_object_no_noops", 8, 4, 0.5),
        ]
        assert set(dataset.dataset_statistics) == {NAME, "libero_object_no_noops"}
        assert dataset.frame(8)["dataset_name"] == "libero_object_no_noops"
        assert dataset.frame(8)["task"]["language_instruction"] == "lift it"
        assert dataset.frame(7)["dataset_name"] == NAME

    def test_names(self) -> None:
        assert [name for name, _ in resolve_mixture("libero_4_task_suites_no_noops")] == [
            "libero_spatial_no_noops",
            "libero_object_no_noops",
            "libero_goal_no_noops",
            "libero_10_no_noops",
        ]
        assert resolve_mixture("libero_goal_no_noops:2") == (("libero_goal_no_noops", 2.0),)
        for wrong, message in (
            ("libero_spatail_no_noops", "did you mean 'libero_spatial_no_noops'"),
            (f"{NAME},", "unknown value ''"),
            (f"{NAME}:0", "accepted: a positive number"),
            (f"{NAME}:x", "accepted: a positive number"),
            (f"{NAME},{NAME}", "named twice"),
        ):
            with pytest.raises(UsageError, match=re.escape(message)):
                resolve_mixture(wrong)

    def test_own_dataset(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(DATASETS, "my_robot", raising=False)
        register_dataset("my_robot", DatasetSpec(images={"primary": "observation/image"}))
        write_dataset(root, "my_robot", {"train": [[episode(9, 6)]]})
        frame = _open(root, "my_robot").frame(0)
        assert [key for key in frame["observation"] if "image" in key] == ["image_primary"]
        with pytest.raises(ValueError, match="already registered"):
            register_dataset(NAME, DatasetSpec())
        DATASETS.pop("my_robot")


def test_augmentation_depends_on_seed_frame_epoch_and_view(root: Path) -> None:
    dataset = _open(root, image_aug=True, seed=5)
    draw = dataset.augmentation(FrameDraw(2, 1))
    assert draw == dataset.augmentation(FrameDraw(2, 1))
    others = [dataset.augmentation(key) for key in (FrameDraw(2, 0), FrameDraw(3, 1))]
    others.append(_open(root, image_aug=True, seed=6).augmentation(FrameDraw(2, 1)))
    crops = [view.crop for one in [draw, *others] for view in one.values() if view is not None]
    assert len(set(crops)) == 8
    images = [dataset.frame(FrameDraw(2, epoch))["observation"]["image_primary"] for epoch in (1, 1, 2)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).mean() > 0.5
    plain = _open(root, seed=5)
    assert plain.augmentation(2) == {"primary": None, "wrist": None}
    assert plain.frame(2)["observation"]["image_primary"].shape == (1, 32, 32, 3)


def test_rollouts_can_use_the_training_transform(root: Path) -> None:
    dataset = _open(root, image_aug=True)
    scene = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(dataset.image_transform.rollout(scene), prepare_policy_image(scene, 32, True))


def _shard(root: Path, number: int = 0) -> Path:
    return sorted((root / NAME / "1.0.0").glob("*-train.tfrecord-*"))[number]


def _edit(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda root: _shard(root).write_bytes(change(_shard(root).read_bytes()))


def _flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def _wrong_feature(name: str, value: Any) -> Callable[[Path], Any]:
    """Put another value, or none, into a shard's second record."""
    features = {**episode(12, 0), f"steps/{name}": value}
    features = {key: kept for key, kept in features.items() if kept is not None}
    records = [frame_record(encode_example(record)) for record in (episode(9, 1), features)]
    return _edit(lambda data: b"".join(records))


EPISODE = frame_record(encode_example(episode(12, 0)))
BAD_SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_edit(lambda data: data[:-100]), r"record 1: needs \d+ bytes, the file has \d+ more \(truncated"),
    "truncated header": (_edit(lambda data: data + b"\x01\x02"), r"record 2: the file ends inside the record's header"),
    "flipped byte": (_edit(lambda data: _flip(data, len(data) // 3, 1)), r"record 0: wrong checksum of its \d+ bytes"),
    "flipped length": (_edit(lambda data: _flip(data, 1, 4)), r"record 0: wrong checksum of the length at byte 0"),
    "no protobuf": (
        _edit(lambda data: frame_record(b"\xff" * 50)),
        r"record 0: (bad varint|unknown wire type|a field) ",
    ),
    "missing shard": (lambda root: _shard(root, 1).unlink(), r"no such file, but dataset_info.json lists 2 shards"),
    "missing record": (_edit(lambda data: EPISODE), r"1 records, dataset_info.json says 2"),
    "missing feature": (
        _wrong_feature("observation/wrist_image", None),
        r"record 1: missing feature steps/observation/wrist",
    ),
    "wrong width": (
        _wrong_feature("action", np.zeros((12, 6), np.float32)),
        r"record 1: steps/action holds 72 numbers, expected 12 steps x 7",
    ),
    "wrong kind": (_wrong_feature("action", [1] * 84), r"record 1: feature steps/action holds list kind 3 .*, not 2"),
    "not finite": (
        _wrong_feature("observation/state", np.full((12, 8), np.nan, np.float32)),
        r"record 1: steps/observation/state holds values that are not f",
    ),
    "missing image": (
        _wrong_feature("observation/image", [b"x"] * 11),
        r"record 1: steps/observation/image holds 11 images",
    ),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards(root: Path, case: str) -> None:
    damage, message = BAD_SHARDS[case]
    damage(root)
    with pytest.raises(UsageError, match=rf"0000[01]-of-00002: {message}"):
        _open(root)
    assert not list((root / NAME / "1.0.0").glob("*.npz"))  # nothing half-read is cached


def test_an_image_that_is_no_image(root: Path) -> None:
    _wrong_feature("observation/image", [b"not a JPEG"] * 12)(root)
    dataset = _open(root)
    with pytest.raises(UsageError, match=r"record 1: step 4: image primary: 10 bytes that are no comp"):
        dataset.frame(2 + 4)


def test_a_shard_that_shrinks_while_training(root: Path) -> None:
    dataset = _open(root)
    _shard(root).write_bytes(b"")
    with pytest.raises(UsageError, match=r"record 0: step 0: image primary: 0 bytes"):
        dataset.frame(0)


class TestBadFolders:
    def _fails(self, root: Path, message: str, mix: str = NAME, **options: Any) -> None:
        with pytest.raises(UsageError, match=message):
            _open(root, mix, **options)

    def test_missing_folders(self, root: Path) -> None:
        self._fails(root / "nowhere", r"--data_root_dir: no such folder: .*nowhere")
        self._fails(root, r"no dataset 'libero_spatial' \(did you mean 'libero_spatial_no_noops'\?\)", "libero_spatial")
        self._fails(root, r"dataset_name: unknown value 'libero_spatal_no_noops' \(did you", "libero_spatal_no_noops")
        (root / "libero_goal_no_noops").mkdir()
        self._fails(root, r"libero_goal_no_noops: no version folder", "libero_goal_no_noops")

    def test_newest_version_is_taken(self, root: Path) -> None:
        write_dataset(root / "new", NAME, {"train": [[episode(20, 9)]]})
        (root / "new" / NAME / "1.0.0").rename(root / NAME / "10.0.0")
        assert len(_open(root)) == 13

    def test_metadata(self, root: Path) -> None:
        folder = root / NAME / "1.0.0"
        info = (folder / "dataset_info.json").read_text()
        (folder / "dataset_info.json").write_text(info.replace("tfrecord", "riegeli"))
        self._fails(root, r"file format 'riegeli'; accepted: tfrecord, array_record")
        (folder / "dataset_info.json").write_text(info[:50])
        self._fails(root, r"1\.0\.0: dataset_info.json or features.json is no valid RLDS description")
        (folder / "dataset_info.json").unlink()
        self._fails(root, r"dataset_info.json: no such file")

    def test_schema(self, root: Path) -> None:
        features = root / NAME / "1.0.0" / "features.json"
        whole = features.read_text()
        features.write_text(whole.replace('"wrist_image"', '"hand_image"'))
        self._fails(root, r"features.json: missing feature steps/observation/wrist_image.*steps/observation/hand_image")
        features.write_text(whole.replace('"dimensions": ["7"]', '"dimensions": ["9"]'))
        self._fails(root, r"feature steps/action has shape \(9,\); accepted for platform 'libero': \(7,\)")
        features.write_text(whole)
        self._fails(root, r"feature steps/action has shape \(7,\); accepted for platform 'aloha'", platform=ALOHA)

    def test_splits(self, root: Path) -> None:
        write_dataset(root, "libero_goal_no_noops", {"train": [[]], "test": [[episode(8, 0)]]})
        self._fails(root, r"no split 'val' \(--use_val_set .*found: test, train", "libero_goal_no_noops", train=False)
        self._fails(root, r"split 'train' is empty", "libero_goal_no_noops")
        write_dataset(root, "libero_object_no_noops", {"train": [[episode(7, 0), episode(5, 0)]]})
        self._fails(root, r"no episode has the 8 steps of an action chunk \(longest: 7\)", "libero_object_no_noops")
