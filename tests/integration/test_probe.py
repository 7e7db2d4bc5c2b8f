"""The probe in a checkpoint: written by training, asked again by whoever loads the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.robot.acting import load_policy
from experiments.robot.policy import PolicyFlags
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.checkpoint.layout import POLICY_FLAGS, read_record
from prismatic.checkpoint.probe import PROBE, Probe
from prismatic.util.errors import UsageError
from tests.helpers.tiny_pi import write_tiny_pi


def load(folder: Path, **flags: Any) -> Any:
    """The policy with the flags that it was trained with, verified."""
    record = read_record(folder)
    named = {name: record[name] for name in POLICY_FLAGS} | {"center_crop": record["image_aug"]}
    cfg = PolicyFlags(**{**named, "verify": True, "device": "cpu", **flags})
    checkpoint = open_checkpoint(str(folder))
    return load_policy(checkpoint, cfg, next(iter(checkpoint.statistics)))


@pytest.mark.parametrize("family", ["openvla", "diffusion", "pi0", "pi05"])
def test_a_loaded_checkpoint_answers_as_in_training_and_a_changed_one_is_refused(
    family: str, finetune: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"recipe": "baseline", "save_freq": 2}
    steps = {}
    if family == "diffusion":
        steps = {"num_diffusion_steps_train": 3}
        flags |= {"use_l1_regression": False, "use_diffusion": True, **steps}
        steps["num_diffusion_steps_inference"] = 3
    elif family != "openvla":
        flags["vla_path"] = str(write_tiny_pi(tmp_path / "base", family))
    folder = finetune(**flags) / "run--2_chkpt"
    load(folder, **steps)
    assert "probe: the recorded actions, but for " in capsys.readouterr().out
    probe = Probe.read(folder)
    assert probe.images.shape == (2, 240, 320, 3) and probe.precision == "float32"
    with pytest.raises(UsageError, match=r"--verify: actions .* of their range away from the recorded ones"):
        load(folder, **steps, **({"use_proprio": False} if family == "pi05" else {"num_images_in_input": 1}))
    weights = load_file(folder / "model.safetensors")
    changed = {name: value + 0.3 * torch.randn_like(value.float()).to(value.dtype) for name, value in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"--verify: actions .* of their range away from the recorded ones"):
        load(folder, **steps)


def test_no_probe_a_damaged_one_and_another_chunk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--verify: no {PROBE} found"):
        Probe.read(tmp_path)
    probe = Probe(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(8), np.ones((2, 7)), "go", "data", "float32")
    probe.write(tmp_path)
    again = Probe.read(tmp_path)
    assert (again.instruction, again.dataset) == ("go", "data") and np.array_equal(again.actions, probe.actions)
    statistics = {"q01": [-1.0] * 7, "q99": [3.0] * 7}
    assert again.deviation(np.full((2, 7), 1.4), statistics) == pytest.approx(0.1)
    with pytest.raises(UsageError, match=r"--verify: actions of \(3, 7\) found; accepted: \(2, 7\)"):
        again.deviation(np.ones((3, 7)), statistics)
    (tmp_path / PROBE).write_bytes((tmp_path / PROBE).read_bytes()[:40])
    with pytest.raises(UsageError, match="not a readable probe"):
        Probe.read(tmp_path)
