"""RoboTwin's robot: absolute joints; for pi0, joints that count from the state, and absolute grippers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.robot.pi_policy import PiActingPolicy
from experiments.robot.policy import Query
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.util.errors import UsageError
from prismatic.vla.batch import Frame
from prismatic.vla.datasets import RLDSDataset
from prismatic.vla.datasets.dataset_file import read_datasets
from prismatic.vla.datasets.rlds_schema import Images, Numbers, Schema, Texts
from prismatic.vla.datasets.rlds_writer import RLDSWriter, encode_jpeg
from prismatic.vla.datasets.specs import DATASETS, MIXTURES
from prismatic.vla.datasets.statistics import openpi_normalizer
from prismatic.vla.datasets.transitions import deltas
from prismatic.vla.platforms import ALOHA, ALOHA_AGILEX, OpenPINormalization, get_platform, platform_of_statistics
from tests.helpers.tiny_pi import write_tiny_pi

NAME, OTHER = "robotwin_lift_pot_clean", "aloha1_fold_shirt_30_demos"
CAMERAS = ("image", "left_wrist_image", "right_wrist_image")
JOINTS = np.array(([True] * 6 + [False]) * 2)
PI0 = get_platform({**ALOHA_AGILEX.to_json(), "chunk": 6}).to_json() | {"normalization": "mean_std"}


def write_two_arms(root: Path, name: str, lengths: tuple[int, ...] = (9, 12), width: int = 14) -> list[np.ndarray]:
    """Episodes of random joints with next-frame actions; returns each one's joints, one row more than steps."""
    sizes: Any = {camera: Images(24, 32) for camera in CAMERAS}
    schema = Schema(
        {
            "observation": {**sizes, "state": Numbers((width,))},
            "action": Numbers((width,)),
            "language_instruction": Texts(),
        }
    )
    rng, joints, payloads = np.random.default_rng(len(name)), [], []
    picture = encode_jpeg(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    for steps in lengths:
        joints.append(rng.uniform(0, 1, (steps + 1, width)).cumsum(axis=0).astype(np.float32))
        values: Any = {f"observation/{camera}": [picture] * steps for camera in CAMERAS}
        values |= {"observation/state": joints[-1][:-1], "action": joints[-1][1:]}
        payloads.append(schema.serialize(values | {"language_instruction": ["lift the pot"] * steps}))
    RLDSWriter(root, name, schema=schema).write_payloads(payloads)
    return joints


def dataset(root: Path, names: str, platform: dict[str, Any], use_proprio: bool = True) -> RLDSDataset:
    def transform(frame: Frame) -> Any:
        return frame

    transform.use_proprio, transform.num_images = use_proprio, 3  # type: ignore[attr-defined]
    return RLDSDataset(root, names, transform, (24, 32), platform=get_platform(platform))


def test_the_platform_and_its_datasets_have_names() -> None:
    robot = get_platform("aloha_agilex")
    assert (robot.chunk, robot.action_dim, robot.proprio_dim, robot.normalization.value) == (25, 14, 14, "bounds")
    assert len(MIXTURES["robotwin_clean"]) == len(MIXTURES["robotwin_randomized"]) == 50
    widths = {"action": {"q01": [0.0] * 14}, "proprio": {"q01": [0.0] * 14}}
    assert platform_of_statistics({"a_checkpoint_of_upstreams": widths}) is ALOHA


def test_pi0_learns_joints_as_differences_to_the_state_and_grippers_as_they_are(tmp_path: Path) -> None:
    joints = write_two_arms(tmp_path, NAME)
    data = dataset(tmp_path, NAME, PI0)
    chunks = [
        episode[start + 1 : start + 7] - np.where(JOINTS, episode[start], 0)
        for episode in joints
        for start in range(len(episode) - 6)
    ]
    statistics: Any = data.dataset_statistics[NAME]["action"]
    assert statistics["delta"] == JOINTS.tolist() and len(data) == len(chunks)
    np.testing.assert_allclose(statistics["mean"], np.concatenate(chunks).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics["q99"], np.quantile(np.concatenate(chunks), 0.99, axis=0), rtol=1e-5)
    normalizer = openpi_normalizer(statistics, OpenPINormalization.MEAN_STD)
    for number in range(len(data)):
        learned = normalizer.unnormalize(data.frame(number)["action"].astype(np.float64))
        np.testing.assert_allclose(learned, chunks[number], atol=1e-4)


def test_openvla_learns_absolute_joints(tmp_path: Path) -> None:
    joints = write_two_arms(tmp_path, NAME)
    data = dataset(tmp_path, NAME, {**ALOHA_AGILEX.to_json(), "chunk": 6})
    actions = np.concatenate([episode[1:] for episode in joints])
    low, high = actions.min(axis=0), actions.max(axis=0)
    np.testing.assert_allclose(data.frame(3)["action"], 2 * (joints[0][4:10] - low) / (high - low) - 1, atol=1e-5)
    assert "delta" not in data.dataset_statistics[NAME]["action"]


def test_robots_of_a_mixture_keep_their_own_conventions(tmp_path: Path) -> None:
    write_two_arms(tmp_path, NAME)
    write_two_arms(tmp_path, OTHER, (20,))
    data = dataset(tmp_path, f"{NAME},{OTHER}:2", PI0)
    statistics: Any = data.dataset_statistics
    assert "delta" in statistics[NAME]["action"] and "delta" not in statistics[OTHER]["action"]
    assert {data.frame(number)["dataset_name"] for number in range(len(data))} == {NAME, OTHER}


def test_an_arm_alone_is_filled_up_by_its_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two_arms(tmp_path, NAME)
    (joints,) = write_two_arms(tmp_path, "one_arm", (9,), width=7)
    zeros = ", 0" * 7
    file = tmp_path / "one_arm.yaml"
    file.write_text(
        f"one_arm:\n  images: {{front: observation/image, left: null, right: null}}\n"
        f"  action: [action{zeros}]\n  state: [observation/state{zeros}]\n"
    )
    monkeypatch.setitem(DATASETS, "one_arm", read_datasets(file)["one_arm"])
    data = dataset(tmp_path, f"{NAME},one_arm", PI0)
    frame = data.frame(len(data) - 1)
    normalizer = openpi_normalizer(data.dataset_statistics["one_arm"]["action"], OpenPINormalization.MEAN_STD)
    answer = normalizer.unnormalize(frame["action"].astype(np.float64))
    assert frame["dataset_name"] == "one_arm" and not answer[:, 7:].any() and not frame["action"][:, 7:].any()
    np.testing.assert_allclose(answer[:, :7], joints[-6:], atol=1e-4)


def test_differences_to_a_state_that_is_not_seen_are_refused(tmp_path: Path) -> None:
    write_two_arms(tmp_path, NAME)
    with pytest.raises(
        UsageError, match="--use_proprio: False found, but actions of dataset 'robotwin_lift_pot_clean'"
    ):
        dataset(tmp_path, NAME, PI0, use_proprio=False)


def test_differences_need_a_state_number_for_each_action_number(tmp_path: Path) -> None:
    message = r"delta of 14 numbers found for platform '.*' of 14 action and 15 state numbers; accepted: as many"
    with pytest.raises(UsageError, match=f"dataset '{NAME}': {message}"):
        deltas(NAME, DATASETS[NAME], get_platform({**PI0, "proprio_dim": 15}), with_proprio=True)
    folder = write_tiny_pi(tmp_path, "pi0", width=16)
    numbers = {"mean": [0.0] * 14, "std": [0.5] * 14}
    state = {name: [*values, values[0]] for name, values in numbers.items()}
    statistics = {NAME: {"action": {**numbers, "delta": JOINTS.tolist()}, "proprio": state}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    flags: Any = SimpleNamespace(num_images_in_input=3, use_proprio=True, device="cpu")
    with pytest.raises(UsageError, match=f"statistics of '{NAME}': {message}"):
        PiActingPolicy.from_checkpoint(open_checkpoint(str(folder)), flags, NAME)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_answers_are_absolute(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_pi(tmp_path / kind, kind, width=16)
    rng = np.random.default_rng(2)
    numbers = {"mean": [0.0] * 14, "std": [0.5] * 14, "q01": [-1.0] * 14, "q99": [1.0] * 14}
    statistics = {
        "absolute": {"action": numbers, "proprio": numbers},
        NAME: {"action": {**numbers, "delta": JOINTS.tolist()}, "proprio": numbers},
    }
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    flags: Any = SimpleNamespace(num_images_in_input=3, use_proprio=True, device="cpu")
    policy = PiActingPolicy.from_checkpoint(open_checkpoint(str(folder)), flags, NAME)
    pictures = rng.integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    queries = [
        Query(pictures[0], pictures[1], rng.normal(size=14), "lift the pot", extra_images=(pictures[2],))
        for _ in range(2)
    ]
    moved, differences = policy.act(queries), policy.act(queries, "absolute")
    assert moved.shape == (2, 4, 14)
    for answer, difference, query in zip(moved, differences, queries):
        np.testing.assert_allclose(answer - difference, np.tile(np.where(JOINTS, query.state, 0), (4, 1)), atol=1e-9)
