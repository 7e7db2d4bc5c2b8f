"""A FiLM run that saved its adapter alone: merged on disk, it acts as the adapter on its base model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from experiments.robot.openvla_utils import OpenVLAPolicy
from experiments.robot.policy import PolicyFlags, Query
from prismatic.checkpoint.merge import LoraAdapter, merge_checkpoint


def act(checkpoint: Path, base: Path) -> np.ndarray:
    flags = PolicyFlags(str(checkpoint), base_checkpoint=str(base), use_film=True, device="cpu")
    policy = OpenVLAPolicy.from_checkpoint(str(checkpoint), flags, "libero_spatial_no_noops")
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return policy.act([Query(image, image[::-1], np.linspace(-0.3, 0.3, 8), "open the drawer")])


def test_a_film_run_acts_the_same_merged(finetune: Callable[..., Path], student_folder: Path, tmp_path: Path) -> None:
    flags = {"use_film": True, "merge_lora_during_training": False, "recipe": "baseline", "save_freq": 2}
    checkpoint = finetune(**flags, learning_rate=1e-2) / "run--2_chkpt"
    assert not (checkpoint / "model.safetensors").exists()
    adapter = LoraAdapter.open(checkpoint / "lora_adapter")
    assert sum(name.startswith("vision_backbone.") for name in adapter.pairs) > 10

    merged = tmp_path / "merged"
    merge_checkpoint(student_folder, checkpoint, merged, max_shard_bytes=10**9, dtype=None, overwrite=False)
    base, weights = load_file(student_folder / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name, value in weights.items() if not value.equal(base[name])}
    assert changed and changed <= set(adapter.pairs)
    assert any(name.startswith("vision_backbone.featurizer.blocks") for name in changed)
    np.testing.assert_allclose(act(merged, student_folder), act(checkpoint, student_folder), atol=1e-5)
