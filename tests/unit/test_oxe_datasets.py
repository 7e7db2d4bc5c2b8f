"""Open X-Embodiment layouts, small files written as the published ones are, and their operations: numbers by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from prismatic.util.errors import UsageError
from prismatic.vla.datasets import RLDSDataset
from prismatic.vla.datasets.oxe.operations import Assembly, Columns, Constant, Operation
from prismatic.vla.datasets.oxe.table import OXE_DATASETS, OXE_MIXTURES, ActionEncoding
from prismatic.vla.datasets.rlds_schema import Images, Numbers, Schema, Texts
from prismatic.vla.datasets.sampler import MixtureSampler
from prismatic.vla.datasets.specs import DATASETS, MIXTURES, resolve_mixture
from prismatic.vla.datasets.tfrecord import read_records
from prismatic.vla.platforms import ALOHA, BRIDGE, NormalizationType, Platform
from tests.helpers.rlds_layouts import (
    ALOHA_STEPS,
    BRIDGE_STEPS,
    IMAGE,
    SIZE,
    aloha_episode,
    bridge_episode,
    gray,
    write_layout,
)

RT1 = Platform("rt1", chunk=2, action_dim=7, proprio_dim=8, normalization=NormalizationType.BOUNDS)
SEVEN = Platform("seven", chunk=2, action_dim=7, proprio_dim=7, normalization=NormalizationType.BOUNDS)


class Looks:
    """A batch transform that hands the frame on and reads as many views as asked."""

    def __init__(self, num_images: int, use_proprio: bool = True) -> None:
        self.use_wrist_image, self.num_images, self.use_proprio = num_images > 1, num_images, use_proprio

    def __call__(self, frame: dict[str, Any]) -> dict[str, Any]:
        return frame


def _open(root: Path, name: str, platform: Platform, num_images: int = 1, **options: Any) -> RLDSDataset:
    use_proprio = options.pop("use_proprio", True)
    return RLDSDataset(root, name, Looks(num_images, use_proprio), (SIZE, SIZE), platform=platform, **options)


def test_bridge(tmp_path: Path) -> None:
    episode = bridge_episode(9, [0.0, 1.0, 0.5, 0.96, 0.3, 0.01, 0.02, 0.6, 0.6])
    write_layout(tmp_path, "bridge_orig", BRIDGE_STEPS, episode, bridge_episode(2, [1.0, 1.0]))
    dataset = _open(tmp_path, "bridge", BRIDGE)
    statistics = dataset.dataset_statistics["bridge_orig"]
    # The first step is dropped, and so is the last, whose motion nobody knows; two steps leave nothing.
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (7, 1)
    table = dataset._sources[0].index
    # From step t on the hand moves by what step t + 1 adds.
    np.testing.assert_allclose(table.action[:, :6], np.arange(2, 9)[:, None] * np.arange(1, 7) / 100, atol=1e-6)
    np.testing.assert_array_equal(table.action[:, 6], np.array([1, 1, 1, 0, 0, 0, 0.6], np.float32))
    np.testing.assert_allclose(table.state[:, 6], np.arange(1, 8) / 10, atol=1e-6)
    assert table.state.shape == (7, BRIDGE.proprio_dim)
    assert len(dataset) == 7 - 4
    frame = dataset.frame(2)
    assert [key for key in frame["observation"] if "image" in key] == ["image_primary"]
    assert np.abs(frame["observation"]["image_primary"][0].astype(int) - 60).max() <= 2  # step 3 of the file
    # Motions 2..8 have the quantiles 2.06 and 7.94 (times a hundredth for the first column).
    assert statistics["action"]["q01"][0] == pytest.approx(0.0206)
    expected = np.clip((np.arange(4, 9) - 2.06) / (7.94 - 2.06) * 2 - 1, -1, 1)
    np.testing.assert_allclose(frame["action"][:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(frame["action"][:, 6], [1, 0, 0, 0, 0.6], atol=1e-6)  # the gripper is not normalized
    assert frame["action"].shape == (5, 7)


def test_bridge_has_no_wrist_camera(tmp_path: Path) -> None:
    write_layout(tmp_path, "bridge_orig", BRIDGE_STEPS, bridge_episode(9, [1.0] * 9))
    with pytest.raises(UsageError, match=r"--num_images_in_input: 2 found, but 'bridge' has no wrist camera"):
        _open(tmp_path, "bridge", BRIDGE, 2)
    with pytest.raises(UsageError, match=r"--num_images_in_input: 3 found; accepted for dataset 'bridge_orig': 1 to 2"):
        _open(tmp_path, "bridge", BRIDGE, 3)
    with pytest.raises(UsageError, match=r"the state made of .*, action has shape \(7,\).*'rt1': \(8,\)"):
        _open(tmp_path, "bridge", RT1)
    assert len(_open(tmp_path, "bridge", RT1, use_proprio=False)) == 6


FRACTAL_STEPS: dict[str, Any] = {
    "action": {
        "world_vector": Numbers((3,)),
        "rotation_delta": Numbers((3,)),
        "gripper_closedness_action": Numbers((1,)),
        "terminate_episode": Numbers((3,), "int32"),
    },
    "observation": {
        "image": IMAGE,
        "depth": Images(SIZE, SIZE, "png", 1, "uint16"),
        "base_pose_tool_reached": Numbers((7,)),
        "gripper_closed": Numbers((1,)),
        "natural_language_instruction": Texts(),
    },
}


def _fractal_episode(closing: list[float], instruction: str = "pick the can") -> dict[str, Any]:
    steps = len(closing)
    depth = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE), 1500, np.uint16)).save(depth, "PNG")
    return {
        "action/world_vector": np.tile([0.1, 0.2, 0.3], (steps, 1)),
        "action/rotation_delta": np.arange(steps)[:, None] * [1.0, 2.0, 4.0],
        "action/gripper_closedness_action": np.array(closing)[:, None],
        "action/terminate_episode": np.zeros((steps, 3)),
        "observation/image": [gray(10 * number) for number in range(steps)],
        "observation/depth": [depth.getvalue()] * steps,
        "observation/base_pose_tool_reached": np.tile(np.arange(7.0), (steps, 1)),
        "observation/gripper_closed": np.arange(steps)[:, None],
        "observation/natural_language_instruction": [instruction] * steps,
    }


def test_rt1_with_depth_and_a_relative_gripper(tmp_path: Path) -> None:
    episodes = [
        _fractal_episode([0.0, 0.05, 1.0, 0.0, -0.09, -1.0, 0.0]),  # closes at 2, opens at 5
        _fractal_episode([0.0, -1.0, 0.0]),  # opens at 1, so it was closed
        _fractal_episode([0.0, 0.0, 0.0]),  # never moves: open
        _fractal_episode([1.0, 1.0, 1.0], instruction=""),  # counts for the statistics, but starts no sample
    ]
    write_layout(tmp_path, "fractal20220817_data", FRACTAL_STEPS, *episodes)
    dataset = _open(tmp_path, "fractal20220817_data", RT1)
    action = dataset._sources[0].index.action
    assert action[:, 6].tolist() == [1, 1, 0, 0, 0, 1, 1] + [0, 1, 1] + [1, 1, 1] + [0, 0, 0]
    np.testing.assert_allclose(action[4, :6], [0.1, 0.2, 0.3, 4, 8, 16], atol=1e-6)
    assert dataset.dataset_statistics["fractal20220817_data"]["num_transitions"] == 16
    assert len(dataset) == 6 + 2 + 2
    frame = dataset.frame(3)
    assert frame["task"]["language_instruction"] == "pick the can"
    # world_vector never changes, so it is normalized to 0; rotations of 0..6 go to -1..1.
    np.testing.assert_allclose(frame["action"][0], [0, 0, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(frame["action"][1, 3:6], [1 / 3] * 3, atol=1e-6)
    np.testing.assert_allclose(frame["observation"]["proprio"][0], [0] * 7 + [0], atol=1e-6)  # 3 of 0..6


def test_kuka_states_are_compressed(tmp_path: Path) -> None:
    steps: dict[str, Any] = {**FRACTAL_STEPS, "observation": dict(FRACTAL_STEPS["observation"])}
    del steps["observation"]["base_pose_tool_reached"], steps["observation"]["depth"]
    steps["observation"]["clip_function_input/base_pose_tool_reached"] = Numbers((7,), zlib=True)
    steps["observation"]["gripper_closed"] = Numbers((1,), zlib=True)
    episode = _fractal_episode([0.0, 0.0, 1.0, 0.0])
    pose = episode.pop("observation/base_pose_tool_reached") + np.arange(4)[:, None]
    del episode["observation/depth"]
    episode["observation/clip_function_input/base_pose_tool_reached"] = pose
    folder = write_layout(tmp_path, "kuka", steps, episode)
    dataset = _open(tmp_path, "kuka", RT1)
    table = dataset._sources[0].index
    np.testing.assert_array_equal(table.state, np.concatenate([pose, np.arange(4)[:, None]], axis=1))
    assert table.action[:, 6].tolist() == [1, 1, 0, 0]
    features = tfds.builder_from_directory(folder).info.features
    (record,) = read_records(next(folder.glob("*.tfrecord-*")))
    read = [step["observation"] for step in features.deserialize_example_np(record.payload)["steps"]]
    np.testing.assert_array_equal([step["clip_function_input/base_pose_tool_reached"] for step in read], pose)


DROID_STEPS: dict[str, Any] = {
    "action_dict": {"cartesian_velocity": Numbers((6,), "float64"), "gripper_position": Numbers((1,), "float64")},
    "observation": {
        "cartesian_position": Numbers((6,), "float64"),
        "gripper_position": Numbers((1,), "float64"),
        "exterior_image_1_left": IMAGE,
        "exterior_image_2_left": IMAGE,
        "wrist_image_left": IMAGE,
    },
    "language_instruction": Texts(),
}


def _droid_episode(moving: list[int]) -> dict[str, Any]:
    steps = len(moving)
    return {
        "action_dict/cartesian_velocity": np.array(moving)[:, None] * [0.5, 0, 0, 0, -0.25, 0],
        "action_dict/gripper_position": np.linspace(0, 1, steps)[:, None],
        "observation/cartesian_position": np.tile(np.arange(6.0), (steps, 1)),
        "observation/gripper_position": np.linspace(0, 1, steps)[:, None],
        "observation/exterior_image_1_left": [gray(50)] * steps,
        "observation/exterior_image_2_left": [gray(150)] * steps,
        "observation/wrist_image_left": [gray(250)] * steps,
        "language_instruction": ["wipe the table"] * steps,
    }


def test_droid_swaps_outside_views_and_skips_stillness(tmp_path: Path) -> None:
    write_layout(tmp_path, "droid", DROID_STEPS, _droid_episode([1, 0, 0, 0, 1, 0, 1, 1, 1]))
    dataset = _open(tmp_path, "droid", SEVEN, 2)
    # Chunks of two steps: those that begin at 1 and 2 never move the arm (the gripper moves all the time).
    assert dataset.frame_numbers("droid").tolist() == [0, 3, 4, 5, 6, 7]
    np.testing.assert_allclose(dataset._sources[0].index.action[:, 6], 1 - np.linspace(0, 1, 9), atol=1e-6)
    seen = [
        [int(frame["observation"][f"image_{view}"].mean()) for view in ("primary", "wrist")]
        for frame in (dataset.frame(draw) for draw in next(iter(MixtureSampler(dataset, 60))))
    ]
    assert {wrist for _, wrist in seen} == {250}
    primary = [level for level, _ in seen]
    assert set(primary) == {50, 150} and 15 < primary.count(50) < 45
    first = [dataset.frame(number)["observation"]["image_primary"].mean() for number in range(6)]
    again = _open(tmp_path, "droid", SEVEN, 2)
    assert first == [again.frame(number)["observation"]["image_primary"].mean() for number in range(6)]


def test_aloha_takes_one_to_three_images(tmp_path: Path) -> None:
    name, numbers = "aloha1_put_X_into_pot_300_demos", np.arange(31)
    write_layout(tmp_path, name, ALOHA_STEPS, aloha_episode(31), val=[aloha_episode(31)])
    names = ("image_primary", "image_left_wrist", "image_right_wrist")
    for count in (1, 2, 3):
        dataset = _open(tmp_path, name, ALOHA, count)
        frame = dataset.frame(3)
        images = {key: int(value.mean()) for key, value in frame["observation"].items() if "image" in key}
        assert images == dict(zip(names[:count], (60, 120, 180)))
    assert len(dataset) == 31 - 24 == len(_open(tmp_path, name, ALOHA, 3, train=False))
    # Minimum and maximum go to -1 and 1 in every joint, the grippers too.
    np.testing.assert_allclose(frame["action"], np.tile((numbers[3:28] / 15 - 1)[:, None], (1, 14)), atol=1e-6)
    np.testing.assert_allclose(frame["observation"]["proprio"], np.full((1, 14), 0.8), atol=1e-6)


def test_language_table_stores_text_as_code_points(tmp_path: Path) -> None:
    steps = {
        "action": Numbers((2,)),
        "observation": {"rgb": IMAGE, "effector_translation": Numbers((2,)), "instruction": Numbers((32,), "int32")},
    }
    text = "push the ☆ to the left"
    codes = [ord(letter) for letter in text] + [0] * (32 - len(text))
    episode = {
        "action": np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 6.0]]),
        "observation/rgb": [gray(99)] * 3,
        "observation/effector_translation": np.zeros((3, 2)),
        "observation/instruction": [codes] * 3,
    }
    write_layout(tmp_path, "language_table", steps, episode)
    dataset = _open(tmp_path, "language_table", RT1)
    assert dataset.frame(0)["task"]["language_instruction"] == text
    assert dataset._sources[0].index.action.tolist()[1] == [2, 3, 0, 0, 0, 0, 1]


def test_a_mixture_fills_missing_cameras_with_black(tmp_path: Path) -> None:
    write_layout(tmp_path, "bridge_orig", BRIDGE_STEPS, bridge_episode(9, [1.0] * 9))
    write_layout(tmp_path, "droid", DROID_STEPS, _droid_episode([1] * 9))
    dataset = _open(tmp_path, "bridge_orig:2,droid", SEVEN, 2, image_aug=True)
    parts = [(part.name, part.size, part.weight) for part in dataset.mixture]
    assert parts == [("bridge_orig", 6, 2.0), ("droid", 8, 1.0)]
    frame = dataset.frame(5)
    assert frame["observation"]["image_wrist"].shape == (1, SIZE, SIZE, 3)
    assert not frame["observation"]["image_wrist"].any() and frame["observation"]["image_primary"].any()
    assert dataset.frame(6)["observation"]["image_wrist"].any()


def test_every_row_gives_vectors_of_its_encoding() -> None:
    widths = {ActionEncoding.EEF_POS: 7, ActionEncoding.JOINT_POS: 8, ActionEncoding.JOINT_POS_BIMANUAL: 14}
    for name, row in OXE_DATASETS.items():
        assert len(row.action_encoding.normalized) == widths[row.action_encoding]
        spec = DATASETS[name]
        assert spec.action_mask == row.action_encoding.normalized and list(spec.images) == ["primary", "wrist"]
        assert any(row.cameras.values()) and row.assembly.features
    assert len(OXE_DATASETS) == 66


def test_named_mixtures() -> None:
    for name, pairs in OXE_MIXTURES.items():
        assert resolve_mixture(name) == pairs == MIXTURES[name]
        assert all(dataset in OXE_DATASETS and weight > 0 for dataset, weight in pairs)
        assert len({dataset for dataset, _ in pairs}) == len(pairs)
    sizes = {name: len(pairs) for name, pairs in OXE_MIXTURES.items()}
    expected = {"bridge": 1, "bridge_rt_1": 2, "rtx": 10, "rtx_franka": 24, "oxe_magic_soup": 23}
    assert sizes == {**expected, "oxe_magic_soup_plus": 27, "oxe_magic_soup_plus_minus": 25}
    assert dict(MIXTURES["oxe_magic_soup_plus"])["droid"] == 0.06
    assert resolve_mixture("droid:0.5,bridge_orig") == (("droid", 0.5), ("bridge_orig", 1.0))


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    schema = Schema(FRACTAL_STEPS)
    with pytest.raises(ValueError, match="features of different numbers of steps"):
        schema.serialize({**_fractal_episode([0.0] * 3), "observation/gripper_closed": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="features action/world_vector: given or described, not both"):
        schema.serialize({k: v for k, v in _fractal_episode([0.0]).items() if k != "action/world_vector"})
    with pytest.raises(ValueError, match=r"action/world_vector: values of shape \(2,\) a step; accepted: \(3,\)"):
        schema.serialize({**_fractal_episode([0.0]), "action/world_vector": np.zeros((1, 2))})
    steps: dict[str, Any] = {**FRACTAL_STEPS, "action": {**FRACTAL_STEPS["action"], "world_vector": Numbers((2,))}}
    episode = {**_fractal_episode([0.0] * 3), "action/world_vector": np.zeros((3, 2))}
    write_layout(tmp_path, "fractal20220817_data", steps, episode)
    with pytest.raises(UsageError, match=r"the action made of .* has shape \(6,\); accepted for .*'rt1': \(7,\)"):
        _open(tmp_path, "fractal20220817_data", RT1)


def _column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1.0, 0.5, 0.0, 0.5, 1.0], [1, 0, 0, 1, 1]),
        ([0.5, 0.5, 0.96], [1, 1, 1]),
        ([0.0, 0.4, 0.7], [0, 0.7, 0.7]),  # never settles: the last value
        ([0.95, 0.05], [0.05, 0.05]),  # neither counts as settled
    ],
)
def test_binarize(raw: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(Operation.BINARIZE(_column(*raw)), _column(*expected))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([0, 1, 0, -1, 0], [1, 0, 0, 1, 1]),
        ([0, -1, 0], [0, 1, 1]),
        ([0.1, -0.1], [1, 1]),  # too small to be commands
        ([1, 1], [0, 0]),
    ],
)
def test_relative(raw: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(Operation.RELATIVE(_column(*raw)), _column(*expected))


def test_euler() -> None:
    half = math.sqrt(0.5)
    quaternions = np.array([[0, 0, 0, 1], [half, 0, 0, half], [0, 0, half, half], [0, 0, 0, 0]], np.float32)
    expected = [[0, 0, 0], [math.pi / 2, 0, 0], [0, 0, math.pi / 2], [0, 0, 0]]
    np.testing.assert_allclose(Operation.TO_EULER(quaternions), expected, atol=1e-6)


def test_the_rest() -> None:
    assert Operation.CLIP(_column(-1, 0.3, 2)).ravel().tolist() == pytest.approx([0, 0.3, 1])
    assert Operation.INVERT(_column(0, 0.25, 1)).ravel().tolist() == [1, 0.75, 0]
    assert Operation.TO_NEXT(_column(1, 4, 2)).ravel().tolist() == [3, -2, 0]


def test_an_assembly_drops_first_steps_before_operations_and_last_steps_after() -> None:
    assembly = Assembly(
        action=(Columns("a")[1:].then(Operation.TO_NEXT, Operation.INVERT), Constant(7.0)),
        proprio=(Columns("s")[-1:], Columns("a")[:1]),
        drop_first=1,
        drop_last=1,
    )
    numbers = {
        "a": np.array([[0, 100], [1, 1], [2, 4], [3, 9]], np.float32),
        "s": np.array([[9, 0], [9, 10], [9, 20], [9, 30]], np.float32),
    }
    action, proprio = assembly(numbers)
    assert assembly.features == ("a", "s")
    assert action.tolist() == [[-2, 7], [-4, 7]] and action.dtype == np.float32
    assert proprio.tolist() == [[10, 1], [20, 2]]
    for steps in (1, 2):
        action, proprio = assembly({name: values[:steps] for name, values in numbers.items()})
        assert action.shape == (0, 2) and proprio.shape == (0, 2)
