"""The confirmation's own commands, end to end in the simulator, with budgets of a minute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.reproduce import __main__ as command
from experiments.reproduce import confirm


def test_a_seed_from_demonstrations_to_its_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regime = confirm.REGIME
    train = {**regime.train, "max_steps": 2, "save_freq": 2, "val_freq": 2, "batch_size": 2, "lr_warmup_steps": 1}
    small = replace(
        regime,
        train=train,
        final_step=2,
        curve_steps=(1, 2),
        collect={**regime.collect, "episodes": 2, "image_size": 64, "workers": 1},
        reach={**regime.reach, "num_trials_per_task": 1, "max_steps": 8, "env_img_res": 64},
    )
    monkeypatch.setattr(confirm, "REGIME", small)
    monkeypatch.setattr(confirm, "LATE_STEPS", (1, 2))
    monkeypatch.setattr(confirm, "_FRAMES", {**confirm._FRAMES, "episodes": 1, "frames": 3, "image_size": 64})
    assert command.main(["confirm", "--seeds", "5", "--out", str(tmp_path), "--parallel", "1"]) == 0
    folder = tmp_path / "results" / regime.name
    for arm in confirm.ARMS:
        record = json.loads((folder / f"{arm.name}-seed5.json").read_text())
        assert [part["step"] for part in record["reach"]] == [1, 2]
        assert len(record["readout"]["depth"]) == 7 and record["validation"]["val/num_samples"] > 50
        assert bool(record["training"].get("align_loss")) == (arm.name == "rocket")
    assert "not complete" in (folder / "verdict.md").read_text()
