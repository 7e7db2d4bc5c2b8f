"""Two gloo processes: an aligned model in DDP or FSDP2 gets the mean of both gradients, projectors included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.programs import run_program
from tests.integration.taps_worker import build, gradients, step


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_the_mean_over_processes(kind: str, repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    arguments = [*command, "tests/integration/taps_worker.py", kind, str(tmp_path)]
    done = run_program(arguments, cwd=repo_root, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    module = build()
    for rank in range(2):
        step(module, rank)
    expected = {name: gradient / 2 for name, gradient in gradients(module).items()}
    assert any("alignment" in name for name in expected)
    for rank in range(2):
        reduced = load_file(tmp_path / f"{kind}{rank}.safetensors")
        assert expected.keys() == reduced.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(reduced[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
