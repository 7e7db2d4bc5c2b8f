"""Depth and pose read out of the shipped student's own tokens, on frames with known geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import analyze

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.analysis.config import ReadoutConfig
from experiments.analysis.readout import ReadoutStudy, cropped, read_frames
from experiments.analysis.readout_pictures import DepthPictures

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "experiments" / "mini" / "weights" / "student"
CAMERAS = np.eye(4, dtype=np.float32) + np.random.default_rng(0).normal(size=(8, 2, 4, 4)).astype(np.float32)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """The eight frames of the simulator beside the mini teacher's weights, twice, with made-up poses."""
    folder = tmp_path / "frames"
    folder.mkdir()
    with np.load(ROOT / "experiments" / "mini" / "weights" / "teacher" / "examples.npz") as archive:
        images, depths = archive["images"].transpose(0, 1, 3, 4, 2), archive["depths"]
    for task in (7, 9):
        shard: dict[str, Any] = {"states": np.zeros((8, 8)), "camera_to_world": CAMERAS}
        np.savez(folder / f"libero_object-{task}.npz", images=images, depths=depths, **shard)
    return folder


def test_tokens_are_those_of_the_policys_own_pass(frames: Path) -> None:
    config = ReadoutConfig(checkpoint=str(STUDENT), frames_dir=frames, batch_size=3)
    study = ReadoutStudy(config, str(STUDENT))
    passes: list[Any] = []
    llama = study.read.policy.vla.language_model.model
    llama.register_forward_pre_hook(lambda module, inputs, named: passes.append(named), with_kwargs=True)
    batch = next(read_frames(config, "libero_object:7"))
    states = study.read(batch.queries)
    with torch.no_grad():
        again = llama(**{**passes[-1], "output_hidden_states": True})
    expected = torch.stack([state[:, 2:74] for state in again.hidden_states])
    assert states.shape == (7, 3, 2, 36, 96)
    assert torch.equal(states.flatten(2, 3), expected.float())
    assert torch.equal(batch.poses_BVK[..., :3], torch.from_numpy(CAMERAS[:3, :, :3, 3]).double())


def test_the_crop_is_the_policys() -> None:
    depths = torch.arange(100.0).expand(1, 1, 100, 100)
    assert cropped(depths, center_crop=True)[0, 0, 0, [0, -1]].tolist() == [2, 96]
    assert cropped(depths, center_crop=False) is depths


def test_the_command(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", f"{STUDENT},{STUDENT}", "--frames_dir", str(frames), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        analyze.main(["readout", *flags])
    assert end.value.code == 0, capsys.readouterr().err
    first, second = json.loads((tmp_path / "out" / "readout.json").read_text())["subjects"]
    assert first == second and first["label"] == "student"
    assert np.array(first["depth"]).shape == np.array(first["pose"]).shape == (7, 2)
    # On the frames that the probe was fitted on, tokens tell more than the place, and no state tells all.
    assert all(0 < depth < 1 for values in first["depth"] for depth in values)
    assert (tmp_path / "out" / "readout.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "readout_depth.png").stat().st_size > 5_000
    pictures = DepthPictures.load(tmp_path / "out")
    assert pictures.images.shape[0] == 4 and pictures.labels == ("student", "student")
    assert np.array_equal(*pictures.read)
    # Read out of the tokens, the map is nearer to the true one than the mean of each place, which is zero here.
    left = np.square(pictures.read[0] - pictures.true).mean() / np.square(pictures.true).mean()
    assert pictures.true.shape == pictures.read[0].shape == (4, 12, 12) and left < 1
    with pytest.raises(SystemExit) as end:
        analyze.main(["readout", *flags, "--test_tasks", "libero_object:7"])
    assert end.value.code == 2 and "found in --train_tasks too" in capsys.readouterr().err
