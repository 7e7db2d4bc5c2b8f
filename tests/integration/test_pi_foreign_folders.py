"""Folders of pi0 and pi0.5 that LeRobot wrote, or that lack a run's record, act by what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from experiments.robot.acting import load_policy
from experiments.robot.policy import Query
from experiments.robot.serving.server import load_served
from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint
from prismatic.models.pi.images import letterbox, to_pixel_values
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.prompts import load_tokenizer, prompt_text, tokenize
from prismatic.util.errors import UsageError
from tests.helpers.tiny_pi import write_tiny_pi

FLAGS: dict[str, Any] = {"num_images_in_input": 2, "use_proprio": True, "center_crop": True, "device": "cpu"}
FLAGS |= {"use_l1_regression": True, "use_diffusion": False, "use_film": False}
QUERY = Query(
    np.random.default_rng(1).integers(0, 256, (60, 84, 3), dtype=np.uint8),
    np.random.default_rng(2).integers(0, 256, (42, 42, 3), dtype=np.uint8),
    np.random.default_rng(3).normal(size=8),
    "pick up the mug",
    prepared=True,
)


def lerobot_folder(folder: Path, kind: str, mode: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with LeRobot's pipeline, and its statistics."""
    write_tiny_pi(folder, kind)
    rng = np.random.default_rng(4)
    stats: dict[str, np.ndarray] = {}
    for feature, width in (("observation.state", 8), ("action", 7)):
        low, high = -1 - rng.random(width), 1 + rng.random(width)
        values = {"mean": rng.normal(size=width), "std": rng.random(width) + 0.5, "q01": low, "q99": high}
        values |= {"min": low - 1, "max": high + 1}
        stats |= {f"{feature}.{name}": value.astype(np.float32) for name, value in values.items()}
    save_file(stats, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    config = {"eps": 1e-8, "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}}
    state_file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    step = {"registry_name": "normalizer_processor", "config": config, "state_file": state_file}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": [step]}))
    return folder, stats


def scaled(stats: dict[str, np.ndarray], feature: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(offset, scale) of LeRobot's formulas, in float64: normalized = (value - offset) / scale."""
    names = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}[mode]
    first, second = (stats[f"{feature}.{name}"].astype(np.float64) for name in names)
    return (first, second) if mode == "MEAN_STD" else ((first + second) / 2, (second - first) / 2)


@pytest.mark.parametrize(("kind", "mode"), [("pi0", "MEAN_STD"), ("pi05", "QUANTILES"), ("pi05", "MIN_MAX")])
def test_a_folder_of_lerobots_acts_as_lerobot_would(kind: str, mode: str, tmp_path: Path) -> None:
    folder, stats = lerobot_folder(tmp_path / "lerobot", kind, mode)
    opened = open_checkpoint(str(folder))
    assert list(opened.statistics) == ["lerobot"] and (opened.platform.action_dim, opened.platform.chunk) == (7, 4)
    actions = np.asarray(load_served(opened, SimpleNamespace(**FLAGS), "lerobot").act([QUERY])[0])  # type: ignore[arg-type]

    policy, tokenizer = PiPolicy.from_pretrained(folder), load_tokenizer(folder)
    offset, scale = scaled(stats, "observation.state", mode)
    state = (QUERY.state - offset) / scale
    views = [torch.from_numpy(view).permute(2, 0, 1) for view in (QUERY.image, QUERY.wrist_image)]
    pixels = torch.stack([to_pixel_values(letterbox(view, 42)) for view in views])[None]
    text = prompt_text(QUERY.instruction, state if kind == "pi05" else None)
    ids, mask = tokenize(tokenizer, [text], 60)
    noise = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(QUERY.seed))
    sampled = policy.sample_actions(
        pixels, torch.ones(1, 2).bool(), ids, mask, torch.from_numpy(state)[None].float(), num_steps=3, noise=noise
    )[0, :, :7].numpy()
    offset, scale = scaled(stats, "action", mode)
    np.testing.assert_allclose(actions, sampled * scale + offset, rtol=1e-4, atol=1e-4)

    simulated = np.asarray(load_policy(opened, SimpleNamespace(**FLAGS), "lerobot").act([QUERY])[0])  # type: ignore[arg-type]
    np.testing.assert_allclose(simulated[:, -1], (1 - actions[:, -1]) / 2, rtol=1e-6)
    before = opened.fingerprint()
    save_file({**stats, "action.mean": stats["action.mean"] + 1}, next(folder.glob("policy_preprocessor*.safetensors")))
    assert open_checkpoint(str(folder)).fingerprint() != before


def test_without_normalization_the_width_is_that_of_the_features(tmp_path: Path) -> None:
    folder, _ = lerobot_folder(tmp_path / "lerobot", "pi0", "IDENTITY")
    file = folder / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    features = {"action": {"type": "ACTION", "shape": [6]}, "observation.state": {"type": "STATE", "shape": [5]}}
    pipeline["steps"][0]["config"]["features"] = features
    file.write_text(json.dumps(pipeline))
    platform = open_checkpoint(str(folder)).platform
    assert (platform.action_dim, platform.proprio_dim) == (6, 5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: next(folder.glob("policy*.safetensors")).write_text("version https://git-lfs"),
            "damaged or cut short",
        ),
        (lambda folder: (folder / "policy_preprocessor.json").write_text('{"steps": [3]}'), "a pipeline of LeRobot's"),
    ],
)
def test_damaged_statistics_are_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder, _ = lerobot_folder(tmp_path / "lerobot", "pi05", "QUANTILES")
    damage(folder)
    with pytest.raises(UsageError, match=f"policy_preprocessor.*{message}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("spoken", [True, False])
def test_a_model_that_says_whether_it_sees_the_state_is_not_asked_otherwise(spoken: bool, tmp_path: Path) -> None:
    folder, _ = lerobot_folder(tmp_path / "pi05", "pi05", "QUANTILES")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "discrete_state_input": spoken}))
    opened = open_checkpoint(str(folder))
    check_policy_flags(SimpleNamespace(**{**FLAGS, "use_proprio": spoken}), opened, "lerobot")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--use_proprio: found {not spoken}; accepted: {spoken}, as discrete_state"):
        check_policy_flags(SimpleNamespace(**{**FLAGS, "use_proprio": not spoken}), opened, "lerobot")  # type: ignore[arg-type]
