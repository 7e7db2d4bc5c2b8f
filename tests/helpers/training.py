"""Short trainings on the CPU: their data, their flags, and what they trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def writable_copy(source: Path, target: Path) -> Path:
    """A copy of a folder of the reference data, which may be write-protected."""
    shutil.copytree(source, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return target


def training_flags(vla_path: Path, data_root_dir: Path, run_root_dir: Path) -> dict[str, Any]:
    """Two steps of batches of two in this process; the run is called "run"."""
    folders = {"vla_path": str(vla_path), "data_root_dir": data_root_dir, "run_root_dir": run_root_dir}
    inputs = {"num_images_in_input": 2, "use_proprio": True, "batch_size": 2, "max_steps": 2, "num_workers": 0}
    settings = {"lora_rank": 4, "learning_rate": 1e-3, "wandb_log_freq": 1, "mixed_precision": "no", "trackers": "none"}
    return {**folders, "run_id_override": "run", **inputs, **settings}


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that was trained, by file and name."""
    adapter = load_file(checkpoint / "lora_adapter/adapter_model.safetensors")
    weights = {f"lora/{key}": value for key, value in adapter.items()}
    for file in sorted(checkpoint.glob("*--*_checkpoint.pt")):
        state = torch.load(file, weights_only=True)
        weights |= {f"{file.name.split('--')[0]}/{key}": value for key, value in state.items()}
    return weights
