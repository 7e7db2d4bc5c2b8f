"""Statistics in the folders of openpi and LeRobot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prismatic.models.pi.normalization import Normalizer, read_normalizers, write_normalizers
from prismatic.util.errors import UsageError

STATE = {"mean": [0.5, 1.0], "std": [2.0, 0.1], "q01": [-1.0, 0.0], "q99": [1.0, 4.0]}
ACTIONS = {"mean": [0.0], "std": [1.0], "q01": [-2.0], "q99": [2.0]}


def write_lerobot(folder: Path, mode: str) -> None:
    state = {f"observation.state.{name}": np.float32(value) for name, value in STATE.items()}
    save_file(
        state | {f"action.{name}": np.float32(value) for name, value in ACTIONS.items()}, folder / "step_5.safetensors"
    )
    config = {"eps": 1e-8, "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}}
    step = {"registry_name": "normalizer_processor", "config": config, "state_file": "step_5.safetensors"}
    steps = [{"registry_name": "to_batch_processor", "config": {}}, step]
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))


@pytest.mark.parametrize(("kind", "mode"), [("pi0", "MEAN_STD"), ("pi05", "QUANTILES")])
def test_openpi_and_lerobot_folders_give_the_same(kind: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "lerobot").mkdir()
    write_lerobot(tmp_path / "lerobot", mode)
    file = tmp_path / "openpi" / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": {"state": STATE, "actions": ACTIONS}}))
    values = {"state": np.array([0.3, 2.0]), "actions": np.array([[0.5], [-1.0]])}
    ours, theirs = (read_normalizers(tmp_path / name, kind) for name in ("openpi", "lerobot"))
    for name, value in values.items():
        np.testing.assert_allclose(ours[name].normalize(value), theirs[name].normalize(value), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(ours[name].unnormalize(ours[name].normalize(value)), value, rtol=1e-12)
    scaled = {"pi0": [-0.1, 10.0], "pi05": [0.3, 0.0]}[kind]
    np.testing.assert_allclose(ours["state"].normalize(values["state"]), scaled, rtol=2e-5, atol=2e-5)


def test_padding_and_identity_leave_numbers_alone(tmp_path: Path) -> None:
    write_lerobot(tmp_path, "IDENTITY")
    values = np.array([3.0, -4.0])
    assert np.array_equal(read_normalizers(tmp_path, "pi0")["state"].normalize(values), values)
    padded = Normalizer(np.array([1.0]), np.array([0.5])).normalize(np.array([2.0, 7.0]))
    np.testing.assert_allclose(padded, [2.0, 7.0], rtol=1e-5)


def test_written_statistics_read_the_same(tmp_path: Path) -> None:
    statistics = {"state": Normalizer(*(np.array(value) for value in STATE.values()), quantiles=True)}
    write_normalizers(tmp_path, "libero", statistics | {"actions": Normalizer(np.zeros(1), np.ones(1), *np.eye(2))})
    again = read_normalizers(tmp_path, "pi05")["state"]
    assert np.array_equal(again.q99, statistics["state"].q99) and again.quantiles


def test_missing_or_several_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"accepted: assets/\*/norm_stats\.json or policy_preprocessor\.json"):
        read_normalizers(tmp_path, "pi0")
    both = {"state": Normalizer(np.zeros(1), np.ones(1)), "actions": Normalizer(np.zeros(1), np.ones(1))}
    for asset in ("droid", "libero"):
        write_normalizers(tmp_path, asset, both)
    with pytest.raises(UsageError, match="accepted: one of droid, libero"):
        read_normalizers(tmp_path, "pi0")
    assert read_normalizers(tmp_path, "pi0", "droid")["state"].std == 1
    with pytest.raises(UsageError, match="statistics of droid: q01, q99: None found"):
        read_normalizers(tmp_path, "pi05", "droid")
