"""LeRobot datasets: the same samples as the same episodes give as RLDS, and what bad files say."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("av", reason="PyAV is not installed")

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prismatic.util.errors import UsageError
from prismatic.vla.datasets import FrameDraw, MixtureSampler, RLDSDataset, make_dataloader
from prismatic.vla.datasets.image_transforms import decode_image
from prismatic.vla.datasets.lerobot import images as lerobot_images
from prismatic.vla.datasets.specs import DATASETS, LIBERO_SPEC
from prismatic.vla.platforms import ALOHA
from tests.helpers.lerobot_files import LeRobotFiles
from tests.helpers.rlds_files import episode, png, write_dataset

NAME = "libero_goal_no_noops"
OTHER = "libero_object_no_noops"
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1 video": {"version": "v2.1", "video": True},
    "3.0 video": {"version": "v3.0", "video": True},
    "3.0 AV1 video": {"version": "v3.0", "video": True, "codec": "libsvtav1"},
    "2.1 images": {"version": "v2.1"},
    "3.0 images": {"version": "v3.0"},
    "physical-intelligence": {"version": "v2.1", "pi": True},
}


def _smooth(features: dict[str, Any], seed: int) -> dict[str, Any]:
    """The episode with images that a video codec can keep: a gradient that moves, another one for the wrist.

    They are PNG files, which every decoder reads alike.
    """
    y, x = np.mgrid[0:64, 0:64]
    for shift, name in ((0, "image"), (90, "wrist_image")):
        frames = []
        for step in range(len(features["steps/action"])):
            colors = (2 * x + 60 + shift / 2, np.full_like(x, 40 + 12 * step), 3 * y + 20 + seed)
            frames.append(png(np.clip(np.stack(colors, axis=2), 0, 255).astype(np.uint8)))
        features[f"steps/observation/{name}"] = frames
    return features


@pytest.fixture(scope="module")
def episodes() -> list[dict[str, Any]]:
    texts = ("open the drawer", "close it", "open the drawer")
    return [_smooth(episode(steps, seed, texts[seed]), seed) for seed, steps in enumerate((12, 9, 10))]


def _open(root: Path, mix: str = NAME, **options: Any) -> RLDSDataset:
    return RLDSDataset(root, mix, lambda frame: frame, (64, 64), **options)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes real-time")
def test_writing_a_video_leaves_the_process_as_it_was(episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    LeRobotFiles(tmp_path / NAME, **LAYOUTS["3.0 AV1 video"]).write(episodes)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(scope="module")
def rlds(episodes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> RLDSDataset:
    root = tmp_path_factory.mktemp("rlds")
    write_dataset(root, NAME, {"train": [episodes]}, side=64)
    return _open(root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_samples_as_rlds(layout: str, rlds: RLDSDataset, episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    LeRobotFiles(tmp_path / NAME, **LAYOUTS[layout]).write(episodes)
    for _ in range(2):  # the second time from the cached index
        dataset = _open(tmp_path)
        assert dataset.dataset_statistics == rlds.dataset_statistics
        assert len(dataset) == len(rlds)
        # Backwards, so that every video frame needs a seek.
        for number in reversed(range(len(rlds))):
            expected, found = rlds.frame(number), dataset.frame(number)
            assert found["task"] == expected["task"]
            np.testing.assert_array_equal(found["action"], expected["action"])
            for key, value in expected["observation"].items():
                if "image" in key and LAYOUTS[layout].get("video"):
                    difference = np.abs(found["observation"][key].astype(int) - value)
                    # A neighboring frame differs by 12 in green everywhere.
                    assert difference.mean() < 3 and difference[..., 1].mean() < 3, (number, key)
                else:
                    np.testing.assert_array_equal(found["observation"][key], value)


def test_jpeg_keeps_lerobots_decoder(tmp_path: Path) -> None:
    features = episode(9, 0)
    LeRobotFiles(tmp_path / NAME, "v3.0").write([features])
    write_dataset(tmp_path / "rlds", NAME, {"train": [[features]]})
    shown, tensorflows = (
        RLDSDataset(root, NAME, lambda frame: frame, (32, 32)).frame(1)["observation"]["image_primary"][0]
        for root in (tmp_path, tmp_path / "rlds")
    )
    encoded = features["steps/observation/image"][1]
    np.testing.assert_array_equal(shown, np.asarray(Image.open(io.BytesIO(encoded))))
    np.testing.assert_array_equal(tensorflows, decode_image(encoded))
    assert 0 < np.abs(shown.astype(int) - tensorflows).max() <= 18


def test_reading_again_uses_the_cache(
    episodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LeRobotFiles(tmp_path / NAME, "v2.1").write(episodes)
    first = _open(tmp_path)
    pack = folder / "lerobot_images-train.bin"
    encoded = [image for features in episodes for image in features["steps/observation/image"]]
    assert all(image in pack.read_bytes() for image in encoded)
    with monkeypatch.context() as patch:
        patch.setattr("prismatic.vla.datasets.lerobot.split.read_rows", _must_not_run)
        again = _open(tmp_path)
    np.testing.assert_array_equal(again.frame(0)["action"], first.frame(0)["action"])
    pack.write_bytes(pack.read_bytes()[:-1])
    assert len(_open(tmp_path)) == len(first)
    assert encoded[-1] in pack.read_bytes()
    data = next(folder.glob("data/*/*.parquet"))
    os.utime(data, ns=(0, 0))
    index = folder / "lerobot_index-train.npz"
    written = index.stat().st_mtime_ns
    _open(tmp_path)
    assert index.stat().st_mtime_ns > written


def _must_not_run(*_: Any) -> Any:
    raise AssertionError("the cache should have been used")


def test_standardized_grippers_are_turned_back(
    rlds: RLDSDataset, episodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Conversions with 1 = open and 0 = closed give the same actions as the raw ones with -1 and 1."""
    raw, standardized = ([{**features} for features in episodes] for _ in range(2))
    for one, other in zip(raw, standardized, strict=True):
        closed = one["steps/action"][:, 6] > 0
        one["steps/action"] = np.where(np.arange(7) == 6, np.where(closed, 1, -1)[:, None], one["steps/action"])
        other["steps/action"] = np.where(np.arange(7) == 6, np.where(closed, 0, 1)[:, None], one["steps/action"])
    LeRobotFiles(tmp_path / "a" / NAME, "v3.0").write(raw)
    LeRobotFiles(tmp_path / "b" / NAME, "v3.0").write(standardized)
    first, second = _open(tmp_path / "a"), _open(tmp_path / "b")
    assert first.dataset_statistics == second.dataset_statistics
    for number in range(len(first)):
        np.testing.assert_array_equal(first.frame(number)["action"], second.frame(number)["action"])
    grippers = {float(row) for number in range(len(first)) for row in first.frame(number)["action"][:, 6]}
    assert grippers == {0.0, 1.0}


def test_mixture_of_both_formats_in_workers(episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    LeRobotFiles(tmp_path / "libero", "v3.0", video=True).write(episodes)
    write_dataset(tmp_path, OTHER, {"train": [[_smooth(episode(14, 7), 3)]]}, side=64)
    dataset = _open(tmp_path, f"libero,{OTHER}:0.5", image_aug=True)
    assert [part.name for part in dataset.mixture] == ["libero", OTHER]
    assert dataset.frame(0)["dataset_name"] == "libero"
    dataset.batch_transform = lambda frame: {"image": frame["observation"]["image_wrist"], "action": frame["action"]}
    dataset.frame(0)  # opens a video in this process, which the workers must not share

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        loader = make_dataloader(dataset, MixtureSampler(dataset, 4, seed=1), _collate, workers)
        return list(itertools.islice(loader, 6))

    torch.testing.assert_close(batches(2), batches(0), rtol=0, atol=0)


def _collate(samples: Any) -> Any:
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in ("image", "action")}


def test_few_videos_stay_open(episodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LeRobotFiles(tmp_path / NAME, "v2.1", video=True).write(episodes)
    monkeypatch.setattr(lerobot_images, "_MAX_OPEN_VIDEOS", 2)
    dataset = _open(tmp_path)
    before = _open_files()
    for number in range(len(dataset)):
        dataset.frame(number)
        assert _open_files() - before <= 4  # two views


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_splits(episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    LeRobotFiles(tmp_path / NAME, "v3.0").write(episodes, {"train": "0:2", "val": "2:3"})
    train, val = _open(tmp_path), _open(tmp_path, train=False)
    assert (len(train), len(val)) == (5 + 2, 3)
    assert train.dataset_statistics == val.dataset_statistics
    assert train.dataset_statistics[NAME]["num_transitions"] == 31
    LeRobotFiles(tmp_path / OTHER, "v3.0").write(episodes)
    with pytest.raises(UsageError, match=r"no split 'val' \(--use_val_set .*found: train"):
        _open(tmp_path, OTHER, train=False)


def test_augmentation_is_that_tensorflows(rlds: RLDSDataset, episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    LeRobotFiles(tmp_path / NAME, "v2.1").write(episodes)
    dataset = _open(tmp_path, image_aug=True, seed=3)
    write_dataset(tmp_path / "rlds", NAME, {"train": [episodes]}, side=64)
    other = _open(tmp_path / "rlds", image_aug=True, seed=3)
    draw = FrameDraw(4, 2)
    for view in ("image_primary", "image_wrist"):
        np.testing.assert_array_equal(dataset.frame(draw)["observation"][view], other.frame(draw)["observation"][view])


def _edit_info(without: str = "", **changes: Any) -> Callable[[Path], None]:
    """Change entries of meta/info.json; leave out the feature `without`."""

    def apply(folder: Path) -> None:
        path = folder / "meta" / "info.json"
        info = json.loads(path.read_text())
        info["features"].pop(without, None)
        path.write_text(json.dumps({**info, **changes}))

    return apply


def _rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("data/*/*.parquet"))[0]
        pq.write_table(change(pq.read_table(path)), path)

    return apply


def _fill(name: str, value: Any, kind: pa.DataType | None = None) -> Callable[[Path], None]:
    """Put one value into every row of a column."""
    return _rewrite(lambda t: t.set_column(t.column_names.index(name), name, pa.array([value] * t.num_rows, kind)))


def _first(pattern: str, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: act(sorted(folder.glob(pattern))[0])


NUMBERS, PICTURE = pa.list_(pa.float32()), pa.struct({"bytes": pa.binary(), "path": pa.string()})
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "old version": ("v2.1", _edit_info(codebase_version="v1.6"), r"version 'v1.6'; accepted: v2.0, v2.1, v3.0"),
    "no JSON": ("v2.1", lambda folder: (folder / "meta/info.json").write_text("{"), r"info.json: not valid JSON"),
    "no fps": ("v2.1", _edit_info(fps=None), r"info.json: no valid LeRobot description"),
    "no features": ("v2.1", _edit_info(features=[]), r"info.json: no valid LeRobot description"),
    "bad split": ("v2.1", _edit_info(splits={"train": "all"}), r"split 'train' is 'all'; accepted: episodes as FIRST"),
    "empty split": ("v2.1", _edit_info(splits={"train": "0:0"}), r"split 'train' is empty"),
    "no wrist": ("v2.1", _edit_info("observation.images.image2"), r"no camera for 'observation/wrist_image' \("),
    "no state": ("v2.1", _edit_info("observation.state"), r"no column for 'observation/state' \(looked for"),
    "no tasks": ("v2.1", _first("meta/tasks.jsonl", Path.unlink), r"tasks.jsonl: no such file"),
    "bad tasks": ("v2.1", _first("meta/tasks.jsonl", lambda p: p.write_text("{}{\n")), r"tasks.jsonl: line 1: not"),
    "no episodes": ("v3.0", lambda folder: shutil.rmtree(folder / "meta/episodes"), r"episodes: no chunk-\*/file-\*"),
    "missing rows": ("v2.1", _rewrite(lambda table: table.slice(1)), r"episode 0 has 11 rows, meta/ says 12"),
    "doubled rows": ("v3.0", _rewrite(lambda t: pa.concat_tables([t, t])), r"episode 0 has 24 rows, meta/ says 12"),
    "missing file": ("v3.0", _first("data/*/*", Path.unlink), r"file-000.parquet: no such file, but"),
    "damaged file": ("v3.0", _first("data/*/*", lambda p: p.write_bytes(b"PAR1")), r"no readable Parquet file"),
    "missing column": ("v2.1", _rewrite(lambda table: table.drop_columns(["action"])), r"no column 'action'; found: "),
    "not finite": ("v2.1", _fill("action", [np.nan] * 7, NUMBERS), r"column action holds values that are not finite"),
    "wrong width": ("v2.1", _fill("action", [0.0] * 6, NUMBERS), r"action holds 72 numbers, expected 12 rows x \(7,\)"),
    "unknown task": ("v2.1", _fill("task_index", 9), r"meta: no task 9, which the rows name"),
    "paths only": (
        "v2.1",
        _fill("observation.images.image", {"bytes": None, "path": "x.png"}, PICTURE),
        r"rows without image bytes; accepted: embedded images",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    version, damage, message = BAD[case]
    folder = LeRobotFiles(tmp_path / NAME, version).write(episodes)
    damage(folder)
    with pytest.raises(UsageError, match=message):
        _open(tmp_path)
    assert not list(folder.glob("*.npz")) or case == "unknown task"


def test_bad_videos(episodes: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = LeRobotFiles(tmp_path / NAME, "v3.0", video=True).write(episodes)
    dataset = _open(tmp_path)
    video = sorted(folder.glob("videos/observation.images.image2/*/*.mp4"))[0]
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UsageError, match=r"image2/chunk-000/file-000.mp4: at 0.300 s: "):
        dataset.frame(3)
    video.unlink()
    with pytest.raises(UsageError, match=r"file-000.mp4: no such video, but meta/ lists it"):
        _open(tmp_path)
    short = LeRobotFiles(tmp_path / "short", "v2.1", video=True).write([_smooth(episode(5, 0), 0)])
    shutil.copy(next(short.glob("videos/*/observation.images.image2/*.mp4")), video)
    with pytest.raises(UsageError, match=r"file-000.mp4: no frame at 1.300 s \(truncated, or not 10 frames a second"):
        _open(tmp_path).frame(5 + 1)  # episode 1, step 1: 12 + 1 frames into the video


def test_platforms_and_packages(
    episodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LeRobotFiles(tmp_path / NAME, "v2.1", video=True).write(episodes)
    with pytest.raises(UsageError, match=r"feature action has shape \(7,\); accepted for platform 'aloha': \(14,\)"):
        _open(tmp_path, platform=ALOHA)
    for module, package in (("pyarrow.parquet", "pyarrow"), ("av", "PyAV")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UsageError, match=re.escape(f"LeRobot data need {package} (")) as caught:
                _open(tmp_path)
        assert 'pip install "rocket-vla[lerobot]"' in str(caught.value)


def test_names_of_the_hubs_data() -> None:
    for name in ("libero", "libero_10_image", "libero_spatial_no_noops_1.0.0_lerobot"):
        assert DATASETS[name] is LIBERO_SPEC
