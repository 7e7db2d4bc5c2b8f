"""Datasets of a user's own in both formats: any cameras and columns, no states, images as tensors, array_record."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from array_record.python.array_record_module import ArrayRecordWriter

from prismatic.util.errors import UsageError
from prismatic.vla.datasets import DatasetSpec, RLDSBatchTransform, RLDSDataset, register_dataset
from prismatic.vla.datasets.dataset_file import read_datasets
from prismatic.vla.datasets.oxe.operations import Assembly, Columns, Constant, Operation
from prismatic.vla.datasets.rlds_schema import Features, Images, Numbers, Schema, Texts
from prismatic.vla.datasets.rlds_writer import RLDSWriter, encode_jpeg
from prismatic.vla.datasets.specs import DATASETS
from prismatic.vla.datasets.tfrecord import read_records
from prismatic.vla.platforms import Platform
from tests.helpers.lerobot_files import FPS, write_columns
from tests.helpers.rlds_files import episode, write_dataset

STEPS, SIDE, NAME = 12, 16, "my_data"
ARM = Platform("my_arm", chunk=4, action_dim=3, proprio_dim=2, normalization="bounds_q99")  # type: ignore[arg-type]
RNG = np.random.default_rng(0)
ACTION = RNG.uniform(-1, 1, (STEPS, 3)).astype(np.float32)
STATE = RNG.normal(size=(STEPS, 2)).astype(np.float32)
LEVELS = 20 * np.arange(STEPS)
FRONT = DatasetSpec(images={"primary": "observation/front"}, state=None)
PICTURES = [encode_jpeg(np.full((SIDE, SIDE, 3), level, np.uint8)) for level in LEVELS]


@pytest.fixture(autouse=True)
def _names() -> Iterator[None]:
    known = set(DATASETS)
    yield
    for name in set(DATASETS) - known:
        del DATASETS[name]


def _write(root: Path, format_: str, features: Features, values: dict[str, Any]) -> None:
    """One episode of features "observation/..." and "action", with an instruction, in either format."""
    if format_ == "lerobot":
        columns = {name.replace("/", "."): value for name, value in values.items()}
        write_columns(root / NAME, columns, (STEPS,))
        return
    schema = Schema({**features, "language_instruction": Texts()})
    payload = schema.serialize({**values, "language_instruction": ["pick it up"] * STEPS})
    RLDSWriter(root, NAME, schema=schema).write_payloads([payload])


def _open(root: Path, spec: DatasetSpec, views: int | None = None, proprio: bool | None = None) -> RLDSDataset:
    """The dataset as a policy of so many views (None: all), with states or not (None: as they are), opens it."""
    DATASETS.pop(NAME, None)
    register_dataset(NAME, spec)

    class Keep(SimpleNamespace):
        def __call__(self, frame: Any) -> Any:
            return frame

    asked = {} if proprio is None else {"use_proprio": proprio}
    return RLDSDataset(root, NAME, Keep(num_images=views, **asked), (SIDE, SIDE), platform=ARM)


def _images(dataset: RLDSDataset, frame: int) -> dict[str, int]:
    observation = dataset.frame(frame)["observation"]
    return {name: round(float(value.mean())) for name, value in observation.items() if name.startswith("image_")}


@pytest.mark.parametrize("format_", ["rlds", "lerobot"])
class TestBothFormats:
    def test_cameras_have_any_names_and_any_number(self, format_: str, tmp_path: Path) -> None:
        cameras = ("front", "side", "hand", "ceiling")
        features = {"action": Numbers((3,)), "observation": {name: Images(SIDE, SIDE) for name in cameras}}
        pictures = {f"observation/{name}": PICTURES[number:] + PICTURES[:number] for number, name in enumerate(cameras)}
        _write(tmp_path, format_, features, {"action": ACTION, **pictures})
        spec = DatasetSpec(images={name: f"observation/{name}" for name in cameras}, state=None)
        assert _images(_open(tmp_path, spec), 2) == {
            "image_front": 40, "image_side": 60, "image_hand": 80, "image_ceiling": 100,
        }  # fmt: skip
        assert _images(_open(tmp_path, spec, views=2), 2) == {"image_front": 40, "image_side": 60}

    def test_unused_states_and_views_may_be_missing_or_wrong(self, format_: str, tmp_path: Path) -> None:
        broken = np.where(np.arange(STEPS)[:, None] == 5, np.nan, STATE).astype(np.float32)
        observation = {"front": Images(SIDE, SIDE), "state": Numbers((2,))}
        values = {"action": ACTION, "observation/front": PICTURES, "observation/state": broken}
        _write(tmp_path, format_, {"action": Numbers((3,)), "observation": observation}, values)
        spec = DatasetSpec(images={"primary": "observation/front", "wrist": "observation/hand"})
        for _ in range(2):  # the second time from the cache
            dataset = _open(tmp_path, spec, views=1, proprio=False)
            assert "proprio" not in dataset.frame(0)["observation"]
            assert set(dataset.dataset_statistics[NAME]) == {"action", "num_transitions", "num_trajectories"}
            with pytest.raises(UsageError, match="state holds values that are not finite"):
                _open(tmp_path, spec, views=1, proprio=True)
        with pytest.raises(UsageError, match=r"(missing feature|no camera for).*observation/hand"):
            _open(tmp_path, spec, views=2, proprio=False)
        with pytest.raises(UsageError, match="--use_proprio: True found, but dataset 'my_data' has no states"):
            _open(tmp_path, dataclasses.replace(spec, state=None), views=1, proprio=True)

    def test_unused_states_may_be_wrong_in_one_split(self, format_: str, tmp_path: Path) -> None:
        if format_ == "lerobot":
            broken = np.where(np.arange(STEPS)[:, None] == 11, np.nan, STATE).astype(np.float32)
            columns = {"action": ACTION, "observation.front": PICTURES, "observation.state": broken}
            write_columns(tmp_path / NAME, columns, (6, 6), splits={"train": "0:1", "val": "1:2"})
        else:
            observation = {"front": Images(SIDE, SIDE), "state": Numbers((2,))}
            schema = Schema({"action": Numbers((3,)), "observation": observation, "language_instruction": Texts()})
            steps = {"action": ACTION, "observation/front": PICTURES, "language_instruction": ["pick it up"] * STEPS}
            payloads = [schema.serialize({**steps, "observation/state": STATE * factor}) for factor in (1, np.nan)]
            RLDSWriter(tmp_path, NAME, schema=schema).write_splits({"train": payloads[:1], "val": payloads[1:]})
        spec = DatasetSpec(images={"primary": "observation/front"})
        dataset = _open(tmp_path, spec, proprio=False)
        assert "proprio" not in dataset.dataset_statistics[NAME] and len(dataset.frame(0)["action"]) == 4

    def test_vectors_are_cut_and_joined(self, format_: str, tmp_path: Path) -> None:
        features: Features = {
            "action": Numbers((5,)),
            "observation": {"front": Images(SIDE, SIDE), "pose": Numbers((4,)), "grip": Numbers((1,))},
        }
        wide, pose, grip = RNG.normal(size=(STEPS, 5)), RNG.normal(size=(STEPS, 4)), RNG.uniform(size=(STEPS, 1))
        wide, pose, grip = (values.astype(np.float32) for values in (wide, pose, grip))
        values = {"action": wide, "observation/front": PICTURES, "observation/pose": pose, "observation/grip": grip}
        _write(tmp_path, format_, features, values)
        spec = DatasetSpec(
            images={"primary": "observation/front"},
            assembly=Assembly(
                action=(Columns("action")[1:3], Columns("observation/grip").then(Operation.INVERT)),
                proprio=(Columns("observation/pose")[3:], Columns("observation/grip")),
                drop_first=2,
                drop_last=1,
            ),
        )
        dataset = _open(tmp_path, spec)
        source = dataset._sources[0].index
        np.testing.assert_allclose(source.action, np.concatenate([wide[:, 1:3], 1 - grip], axis=1)[2:-1])
        np.testing.assert_allclose(source.state, np.concatenate([pose[:, 3:], grip], axis=1)[2:-1])
        assert len(dataset) == STEPS - 3 - 3 and _images(dataset, 0) == {"image_primary": 40}
        cut = DatasetSpec(images=spec.images, standardize=lambda a, s: (a[:, :3], s[:, :2]), state="observation/pose")
        assert _open(tmp_path, cut).frame(0)["observation"]["proprio"].shape == (1, 2)
        short = dataclasses.replace(cut, standardize=lambda a, s: (a[:, :2], s))
        with pytest.raises(UsageError, match=r"standardize gives actions of shape \(12, 2\); accepted .*: \(12, 3\)"):
            _open(tmp_path, short)

    def test_the_second_image_is_whatever_comes_second(self, format_: str, tmp_path: Path) -> None:
        observation = {"a": Images(SIDE, SIDE), "b": Images(SIDE, SIDE)}
        values = {"action": ACTION, "observation/a": PICTURES, "observation/b": PICTURES[::-1]}
        _write(tmp_path, format_, {"action": Numbers((3,)), "observation": observation}, values)
        frame = _open(tmp_path, DatasetSpec(images={"x": "observation/b", "y": "observation/a"}, state=None)).frame(1)
        tokens = SimpleNamespace(encode_actions_to_token_ids=lambda actions: np.full(actions.shape, 31990))
        words: Any = lambda text, add_special_tokens: SimpleNamespace(input_ids=[1, 5])  # noqa: E731
        mean: Any = lambda image: torch.full((1, 1, 1), float(np.asarray(image).mean()))  # noqa: E731
        transform = RLDSBatchTransform(tokens, words, mean, use_wrist_image=True)  # type: ignore[arg-type]
        sample = transform(frame)
        assert (sample["pixel_values"].item(), sample["pixel_values_wrist"].item()) == (200.0, 20.0)


@pytest.mark.parametrize(
    "form",
    [
        Numbers((SIDE, SIDE, 3), "uint8"),
        Numbers((SIDE, SIDE, 3), "uint8", zlib=True),
        Numbers((SIDE, SIDE, 1), "uint8"),
        Numbers((SIDE, SIDE), "uint8"),
        Numbers((SIDE, SIDE, 4), "uint8"),
        Texts(),
    ],
    ids=["rgb", "zlib", "one channel", "no channel", "rgba", "bytes"],
)
def test_images_in_every_feature_that_may_hold_them(form: Numbers | Texts, tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (STEPS, SIDE, SIDE, 3), dtype=np.uint8)
    stored: Any = pixels
    if isinstance(form, Texts):
        stored = PICTURES
        pixels = np.tile(LEVELS[:, None, None, None].astype(np.uint8), (1, SIDE, SIDE, 3))
    elif form.shape[2:] == (4,):
        stored = np.concatenate([pixels, pixels[..., :1]], axis=3)
    elif form.shape[2:] != (3,):
        pixels = np.repeat(pixels[..., :1], 3, axis=3)
        stored = pixels[..., 0].reshape(STEPS, *form.shape)
    schema = Schema({"action": Numbers((3,)), "observation": {"front": form}, "language_instruction": Texts()})
    payload = schema.serialize(
        {"action": ACTION, "observation/front": stored, "language_instruction": ["pick it up"] * STEPS}
    )
    RLDSWriter(tmp_path, NAME, schema=schema).write_payloads([payload, payload])
    for dataset in (_open(tmp_path, FRONT), _open(tmp_path, FRONT)):
        shown = [dataset.frame(number)["observation"]["image_primary"][0] for number in range(len(dataset))]
        np.testing.assert_array_equal(np.stack(shown), np.concatenate([pixels[:9]] * 2))


@pytest.mark.parametrize("form", [Numbers((SIDE, SIDE, 3)), Numbers((3, SIDE, SIDE), "uint8"), Numbers((7,), "int64")])
def test_other_tensors_are_no_images(form: Numbers, tmp_path: Path) -> None:
    features = {"action": Numbers((3,)), "observation": {"front": form}}
    _write(tmp_path, "rlds", features, {"action": ACTION, "observation/front": np.zeros((STEPS, *form.shape))})
    with pytest.raises(UsageError, match=r"features.json: feature steps/observation/front is a Tensor .*: an Image"):
        _open(tmp_path, FRONT)


class TestDatasetFile:
    def _read(self, folder: Path, entry: object, name: str = NAME, ending: str = "json") -> DatasetSpec:
        file = folder / f"my_data.{ending}"
        file.write_text(json.dumps({name: entry}))
        return read_datasets(file)[name]

    @pytest.mark.parametrize("ending", ["json", "yaml"])
    def test_describes_what_python_does(self, ending: str, tmp_path: Path) -> None:
        entry = {
            "images": {"front": "observation/cam", "black": None},
            "action": ["action/arm[:6]", {"columns": "action/grip[-1]", "operations": ["clip", "invert"]}],
            "state": ["observation/pose[2:5]", 0],
            "language": "text",
            "action_mask": [True] * 6 + [False],
            "drop_last": 1,
        }
        grip = Columns("action/grip")[-1:].then(Operation.CLIP, Operation.INVERT)
        assert self._read(tmp_path, entry, ending=ending) == DatasetSpec(
            images={"front": "observation/cam", "black": None},
            language="text",
            action_mask=(True,) * 6 + (False,),
            assembly=Assembly(
                (Columns("action/arm")[:6], grip), (Columns("observation/pose")[2:5], Constant(0.0)), drop_last=1
            ),
        )
        plain = {"images": {"front": "observation/cam"}, "action": "act", "state": None}
        assert self._read(tmp_path, plain) == DatasetSpec({"front": "observation/cam"}, action="act", state=None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": {}}, "field: 'image' found; accepted: images, action, state, language"),
            ({"images": {}}, "images: {} found; accepted: a camera's name and feature each"),
            ({"images": {"a": 1}}, "images: {'a': 1} found"),
            ({"action": "arm[1:2:3]"}, r"action: 'arm[1:2:3]' found; accepted: a feature,"),
            ({"action": None}, "action: None found"),
            ({"state": [{"columns": "a", "operations": ["flip"]}]}, "state: operations: ['flip'] found"),
            ({"action_mask": [1, 0]}, "action_mask: [1, 0] found; accepted: a list of true"),
            ({"drop_first": -1}, "drop_first: -1 found"),
            ({"language": 3}, "language: 3 found"),
        ],
    )
    def test_mistakes_are_one_line(self, change: dict[str, object], message: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=re.escape(f"my_data.json: dataset 'my_data': {message}")):
            self._read(tmp_path, {"images": {"front": "observation/cam"}, **change})

    def test_names_and_files(self, tmp_path: Path) -> None:
        entry = {"images": {"front": "observation/cam"}}
        for name in ("bridge", "a,b", "a:2"):
            with pytest.raises(UsageError, match=f"dataset '{name}'; accepted: the name of a folder"):
                self._read(tmp_path, entry, name)
        for content, message in (("- a", "expected a YAML mapping"), ("{", "not valid YAML")):
            (tmp_path / "my_data.yaml").write_text(content)
            with pytest.raises(UsageError, match=message):
                read_datasets(tmp_path / "my_data.yaml")
        with pytest.raises(UsageError, match=r"nowhere\.json: no such file"):
            read_datasets(tmp_path / "nowhere.json")


def _as_array_record(folder: Path) -> None:
    """Turn the TFRecord files of a dataset into what TFDS writes without TensorFlow."""
    for path in sorted(folder.glob("*.tfrecord-*")):
        writer = ArrayRecordWriter(str(path).replace("tfrecord", "array_record"), "group_size:1")
        for record in read_records(path):
            writer.write(record.payload)
        writer.close()
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))


class TestArrayRecord:
    NAME = "libero_goal_no_noops"

    def _open(self, root: Path, **options: Any) -> RLDSDataset:
        return RLDSDataset(root, self.NAME, lambda frame: frame, (32, 32), **options)  # type: ignore[arg-type,return-value]

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for place in ("tfrecord", "array_record"):
            write_dataset(tmp_path / place, self.NAME, {"train": [[episode(12, 0), episode(9, 1)], [episode(10, 2)]]})
        _as_array_record(tmp_path / "array_record" / self.NAME / "1.0.0")
        return tmp_path

    def test_gives_the_samples_of_tfrecord(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = self._open(root / "tfrecord")
        for attempt in range(2):
            if attempt:  # the second time from the copy
                monkeypatch.setattr("prismatic.vla.datasets.frame_index.read_array_records", None)
            dataset = self._open(root / "array_record")
            assert dataset.dataset_statistics == expected.dataset_statistics and len(dataset) == len(expected)
            for number in range(len(dataset)):
                for name, value in expected.frame(number)["observation"].items():
                    np.testing.assert_array_equal(dataset.frame(number)["observation"][name], value)

    def test_damage_is_named(self, root: Path) -> None:
        folder = root / "array_record" / self.NAME / "1.0.0"
        shard = sorted(folder.glob("*.array_record-*"))[1]
        whole = shard.read_bytes()
        middle = len(whole) // 2
        for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
            shard.write_bytes(damaged)
            with pytest.raises(UsageError, match=r"00001-of-00002: (no readable array_record|0 records)"):
                self._open(root / "array_record")
            assert not list(folder.glob("*.npz")) and not list(folder.glob("*.bin"))


def _video(path: Path, times: np.ndarray) -> None:
    """A video whose frames have the given times and grow brighter by 4 levels each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "10", "bf": "0"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 90000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 + 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class TestTimeStamps:
    GRID = np.arange(STEPS) / FPS

    def _written(self, root: Path, rows: np.ndarray, frames: np.ndarray) -> RLDSDataset:
        columns = {"action": ACTION, "timestamp": rows.astype(np.float32)}
        write_columns(root / NAME, columns, (STEPS,), video_path="{video_key}.mp4")
        file = root / NAME / "meta" / "info.json"
        info = json.loads(file.read_text())
        info["features"]["observation.front"] = {"dtype": "video", "shape": [64, 64, 3]}
        file.write_text(json.dumps(info))
        _video(root / NAME / "observation.front.mp4", frames)
        return _open(root, FRONT)

    @pytest.mark.parametrize(("rate", "row"), [(28 / 30, 1), (0.999, 1), (0.9997, 4)])
    def test_off_the_grid_are_told_with_the_first_row(self, rate: float, row: int, tmp_path: Path) -> None:
        said = rf"000000.parquet: episode 0: frame {row}: timestamp .* has no frame .*accepted: within 0.0001 s"
        with pytest.raises(UsageError, match=said):
            self._written(tmp_path, self.GRID / rate, self.GRID)
        assert not list((tmp_path / NAME).glob("*.npz"))

    def test_a_video_with_frames_at_just_these_times_is_read(self, tmp_path: Path) -> None:
        uneven = self.GRID + np.where(np.arange(STEPS) % 3 == 1, 0.02, 0.0)
        dataset = self._written(tmp_path, uneven, uneven)
        for number in range(len(dataset)):
            image = dataset._sources[0].index.image(0, number)
            assert round((float(image.mean()) - 10) / 4) == number

    def test_a_video_with_frames_at_other_times_is_told_when_read(self, tmp_path: Path) -> None:
        dataset = self._written(tmp_path, self.GRID, self.GRID * 1.01)
        with pytest.raises(UsageError, match=r"front.mp4: the frame nearest to 0.3 s is at 0.303 s; accepted: within"):
            dataset.frame(3)

    def test_data_without_videos_need_none(self, tmp_path: Path) -> None:
        columns = {"action": ACTION, "observation.front": PICTURES, "timestamp": (self.GRID * 1.1).astype(np.float32)}
        write_columns(tmp_path / NAME, columns, (STEPS,))
        assert _images(_open(tmp_path, FRONT), 2) == {"image_primary": 40}


def test_lerobots_instructions_may_stand_in_a_column(tmp_path: Path) -> None:
    texts = ["open it"] * 6 + ["close it"] * 6
    write_columns(tmp_path / NAME, {"action": ACTION, "observation.front": PICTURES, "words": texts}, (6, 6))
    spec = DatasetSpec(images={"primary": "observation/front"}, state=None, language="words")
    dataset = _open(tmp_path, spec)
    found = [dataset.frame(number)["task"]["language_instruction"] for number in range(len(dataset))]
    assert found == ["open it"] * 3 + ["close it"] * 3


def test_lerobots_own_statistics_are_never_read(tmp_path: Path) -> None:
    """Its quantiles are means of the episodes' quantiles, not those of the dataset."""
    folder = write_columns(tmp_path / NAME, {"action": ACTION, "observation.front": PICTURES}, (STEPS,))
    (folder / "meta" / "stats.json").write_text('{"action": {"q01": [9, 9, 9], "q99": [9, 9, 9]}}')
    statistics = _open(tmp_path, FRONT).dataset_statistics
    np.testing.assert_allclose(statistics[NAME]["action"]["q99"], np.quantile(ACTION.astype(np.float64), 0.99, axis=0))


@pytest.mark.parametrize("edit", ["statistics", "operations"])
def test_edited_code_does_not_take_older_caches(edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_columns(tmp_path / NAME, {"action": ACTION, "observation.front": PICTURES}, (STEPS,))
    _open(tmp_path, FRONT)
    source: Callable[[Any], str] = inspect.getsource
    monkeypatch.setattr(
        inspect, "getsource", lambda module: source(module) + ("# edited" if module.__name__.endswith(edit) else "")
    )
    index = tmp_path / NAME / "lerobot_index-train.npz"
    os.utime(index, ns=(0, 0))
    _open(tmp_path, FRONT)
    assert len(list((tmp_path / NAME).glob("dataset_statistics_*.json"))) == 2
    assert (index.stat().st_mtime_ns > 0) == (edit == "operations")
