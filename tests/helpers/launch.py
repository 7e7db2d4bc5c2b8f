"""Launches of several processes of the training script, and what their checkpoints hold."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node"
ACCELERATE = "accelerate.commands.launch --use_fsdp --fsdp_version 2 --main_process_port 0 --num_processes"
# AdamW turns a gradient's rounding into at most a learning rate, whatever its size.
FLAGS = {"learning_rate": 2e-5, "max_grad_norm": 1.0, "merge_lora_during_training": False}


def launcher(common: dict[str, Any], file: Path) -> Callable[..., None]:
    """A function that runs the script's main with flags after flags, in the processes of one launch."""

    def run(processes: int, *cases: dict[str, Any], launcher: str = TORCHRUN, worker: str = "engine_worker.py") -> None:
        file.write_text(json.dumps([{**common, **case} for case in cases], default=str))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "vla-scripts")])
        script = str(ROOT / "tests" / "integration" / worker)
        command = [sys.executable, "-m", *launcher.split(), str(processes), script, str(file)]
        done = run_program(command, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000] + "\n...\n" + done.stderr[-4000:]

    return run


def policy_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of a policy, by file and name; its probe is no part."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted([*checkpoint.glob("model*.safetensors"), *checkpoint.glob("lora_adapter/*.safetensors")]):
        tensors |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    for file in sorted(checkpoint.glob("*_checkpoint.pt")):
        state = torch.load(file, weights_only=True)
        tensors |= {f"{file.name}/{name}": value for name, value in state.items()}
    return tensors
