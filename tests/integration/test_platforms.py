"""Bridge and ALOHA from their files to actions: fine-tuning, the checkpoint's record, prediction from an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.robot.openvla_utils import OpenVLAPolicy, get_vla_action
from experiments.robot.policy import PolicyFlags, Query
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.training.metrics import read_log
from prismatic.util.errors import UsageError
from prismatic.vla.datasets.rlds_schema import Numbers, Texts
from prismatic.vla.datasets.specs import DATASETS
from prismatic.vla.platforms import ALOHA, BRIDGE, NormalizationType, Platform
from tests.helpers.lerobot_files import write_columns
from tests.helpers.rlds_layouts import (
    ALOHA_STEPS,
    BRIDGE_STEPS,
    IMAGE,
    aloha_episode,
    bridge_episode,
    gray,
    write_layout,
)
from tests.helpers.training import trained_weights

ALOHA_NAME = "aloha1_put_X_into_pot_300_demos"


@pytest.fixture
def robots_root(tmp_path: Path) -> Path:
    """A Bridge and an ALOHA dataset."""
    root = tmp_path / "robots"
    write_layout(root, "bridge_orig", BRIDGE_STEPS, *[bridge_episode(12, [1.0] * 6 + [0.0] * 6)] * 2)
    write_layout(root, ALOHA_NAME, ALOHA_STEPS, aloha_episode(30))
    return root


def _query(platform: Platform, seed: int = 0) -> Query:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    state = rng.uniform(0, 1, platform.proprio_dim)
    return Query(images[0], images[1], state, "put it into the pot", extra_images=(images[2],))


@pytest.mark.parametrize(
    ("platform", "dataset", "num_images", "proprio"),
    [(BRIDGE, "bridge", 1, True), (ALOHA, ALOHA_NAME, 3, True), (ALOHA, ALOHA_NAME, 2, False)],
    ids=["bridge", "aloha-3-proprio", "aloha-2"],
)
def test_from_files_to_actions(
    platform: Platform, dataset: str, num_images: int, proprio: bool, finetune: Callable[..., Path], robots_root: Path
) -> None:
    inputs: dict[str, Any] = {"num_images_in_input": num_images, "use_proprio": proprio}
    given = {"dataset_name": dataset, "platform": platform.name, **inputs}
    runs = finetune(data_root_dir=robots_root, merge_lora_during_training=False, **given)
    rows = read_log(runs / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(0 < row["action_loss"] < 3 for row in rows)
    folder = runs / "run--2_chkpt"
    record = json.loads((folder / "run_config.json").read_text())
    assert (record["platform"], record["num_images_in_input"]) == (platform.name, num_images)
    # The base model says libero; the run's record decides.
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.adapter_path is not None and checkpoint.config["platform"] == platform.to_dict()
    settings = PolicyFlags(str(folder), device="cpu", **inputs)
    policy = OpenVLAPolicy.from_checkpoint(checkpoint, settings, next(iter(checkpoint.statistics)))
    queries = [_query(platform, seed) for seed in range(2)]
    actions = policy.act(queries)
    assert actions.shape == (2, platform.chunk, platform.action_dim) and np.isfinite(actions).all()
    low, high = (
        np.array(bound) for bound in platform.normalization.bounds(policy.vla.norm_stats[policy.unnorm_key]["action"])
    )
    middle, reach = (low + high) / 2, (high - low) / 2 + 1e-6
    normalized = np.abs(actions - middle)[..., :6] / reach[:6]
    assert normalized.max() < 20  # in the units of the data, not of another platform's
    settings.unnorm_key = policy.unnorm_key
    observation = {
        "full_image": queries[0].image,
        "left_wrist_image": queries[0].wrist_image,
        "right_wrist_image": queries[0].extra_images[0],
        "state": queries[0].state,
    }
    heads = (policy._parts["action_head"], policy._parts.get("proprio_projector"))
    single = get_vla_action(settings, policy.vla, policy.processor, observation, queries[0].instruction, *heads)
    np.testing.assert_allclose(single, actions[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format_", ["rlds", "lerobot"])
def test_a_robot_of_ones_own_by_files(format_: str, finetune: Callable[..., Path], tmp_path: Path) -> None:
    """Eight numbers, own names, cameras called anything, no states; the checkpoint needs neither file."""
    rng = np.random.default_rng(0)
    pictures = [gray(20 * number) for number in range(12)]
    values = {
        "arm": rng.uniform(-1, 1, (12, 9)).astype(np.float32),
        "grip": rng.uniform(0, 1, (12, 1)).astype(np.float32),
        "front": pictures,
        "ceiling": pictures,
    }
    if format_ == "rlds":
        steps = {"arm": Numbers((9,)), "grip": Numbers((1,)), "front": IMAGE, "ceiling": IMAGE, "say": Texts()}
        write_layout(tmp_path / "data", "my_data", steps, {**values, "say": ["pick it up"] * 12})
    else:
        write_columns(tmp_path / "data" / "my_data", values, (12,))
    robot, data = tmp_path / "my_arm.json", tmp_path / "my_data.yaml"
    robot.write_text('{"chunk": 4, "action_dim": 8}')
    data.write_text(
        "my_data:\n  images: {front: front, ceiling: ceiling}\n  action: ['arm[1:8]', grip]\n  state: null\n"
        "  language: say\n"
    )
    runs = finetune(
        data_root_dir=tmp_path / "data",
        dataset_name="my_data",
        dataset_file=str(data),
        platform=str(robot),
        num_images_in_input=2,
        use_proprio=False,
        merge_lora_during_training=False,
    )
    for file in (robot, data):
        file.unlink()
    DATASETS.pop("my_data")
    folder = runs / "run--2_chkpt"
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.platform == Platform("my_arm", 4, 8, 0, NormalizationType.BOUNDS_Q99)
    settings = PolicyFlags(str(folder), use_proprio=False, device="cpu")
    policy = OpenVLAPolicy.from_checkpoint(checkpoint, settings, "my_data")
    assert policy.act([_query(checkpoint.platform)]).shape == (1, 4, 8)


def test_a_dataset_of_another_platform_is_refused(finetune: Callable[..., Path], robots_root: Path) -> None:
    with pytest.raises(UsageError, match=r"steps/action has shape \(14,\); accepted for platform 'libero': \(7,\)"):
        finetune(data_root_dir=robots_root, dataset_name=ALOHA_NAME)
    with pytest.raises(UsageError, match="has no wrist camera"):
        finetune(data_root_dir=robots_root, dataset_name="bridge_orig", platform="bridge")


def test_a_film_run_resumes_exactly(finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"use_film": True, "vggt_path": str(teacher_folder), "num_images_in_input": 1}
    flags["merge_lora_during_training"] = False
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=2, save_freq=1, **flags)
    halfway = straight / "run--1_chkpt"
    resumed = finetune(run_root_dir=tmp_path / "b", vla_path=str(halfway), resume=True, max_steps=2, **flags)
    folders = halfway, straight / "run--2_chkpt", resumed / "run--2_chkpt"
    before, expected, actual = (trained_weights(folder) for folder in folders)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    film = [key for key in actual if key.startswith("vision_backbone") and (".scale." in key or ".shift." in key)]
    assert any("vision_backbone" in key and "lora" in key for key in actual)
    assert film and any(not (before[key] == actual[key]).all() for key in film)
