"""Training on wide pictures, whose views have bars: stored features and a running teacher give the same loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import build_feature_store
from experiments.robot.robotwin.convert import ConvertConfig, convert
from prismatic.training.metrics import read_log
from tests.helpers.robotwin_files import make_episode, write_legacy
from tests.helpers.tiny_pi import write_tiny_pi


def test_the_store_gives_the_online_loss_where_views_have_bars(
    teacher_folder: Path, tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    """Without augmentation, and with a grid as fine as the teacher's own."""
    write_legacy(tmp_path / "data", 0, make_episode(30, 0))
    convert(ConvertConfig(data_dir=tmp_path / "data", out=tmp_path / "rlds", format="rlds"))
    flags: dict[str, Any] = {
        "vla_path": str(write_tiny_pi(tmp_path / "base", "pi0", width=16)),
        "data_root_dir": tmp_path / "rlds",
        "dataset_name": "robotwin_lift_pot_clean",
        "platform": "aloha_agilex",
        "num_images_in_input": 3,
        "use_proprio": True,
        "vggt_path": str(teacher_folder),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    exact = {"store_dtype": "float16", "grid_scale": 9.0, "num_workers": 0, "mixed_precision": "no"}
    store = str(tmp_path / "store")
    build_feature_store.main(build_feature_store.StoreConfig(**flags, **exact, feature_store=store))
    flags |= {"image_aug": False, "merge_lora_during_training": False}
    losses = [
        [row["align_loss"] for row in read_log(runs / "run" / "metrics.jsonl")]
        for stored in ("", store)
        for runs in [finetune(**flags, feature_store=stored, run_root_dir=tmp_path / f"runs{bool(stored)}")]
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
