"""8-bit and 4-bit loading: what is refused where there is no GPU, and that 8-bit weights act like the model's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.robot import openvla_utils
from experiments.robot.openvla_utils import quantization
from experiments.robot.policy import PolicyFlags
from prismatic.checkpoint.folder import Checkpoint
from prismatic.checkpoint.load import load_policy_model
from prismatic.util.errors import UsageError
from tests.helpers.student_helpers import tiny_batch, tiny_student

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_without_a_gpu_it_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}: needs an NVIDIA GPU, found device cpu; accepted here: False"):
        quantization(PolicyFlags(**{flag: True}, device="cpu"))


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="--load_in_8bit, --load_in_4bit: both are True"):
        quantization(PolicyFlags(load_in_8bit=True, load_in_4bit=True))


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvla_utils, "resolve_device", lambda name: GPU)
    monkeypatch.setattr(openvla_utils.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--load_in_4bit: needs the package bitsandbytes: pip install"):
        quantization(PolicyFlags(load_in_4bit=True))


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    adapter = Checkpoint("name", tmp_path, tmp_path, tmp_path / "lora_adapter", {}, {})
    with pytest.raises(UsageError, match=r"--load_in_8bit: .* only an adapter.*merge_lora_weights_and_save"):
        load_policy_model(adapter, PolicyFlags(), GPU, torch.bfloat16, "8bit")


@pytest.mark.parametrize("script", ["experiments/robot/libero/run_libero_eval.py", "vla-scripts/deploy.py"])
def test_the_commands_say_it_in_one_line(script: str, golden_dir: Path, repo_root: Path, tmp_path: Path) -> None:
    weights = golden_dir / "openvla_tiny" / "model.safetensors"
    flags = ["--use_l1_regression", "false", "--use_proprio", "false", "--unnorm_key", "libero_tiny", "--device", "cpu"]
    command = [sys.executable, str(repo_root / script), "--pretrained_checkpoint", str(weights.parent), *flags]
    done = subprocess.run(
        [*command, "--load_in_8bit", "true"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --load_in_8bit: needs an NVIDIA GPU")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_8_bit_weights_act_like_the_models(tmp_path: Path) -> None:
    """The library also multiplies 8-bit weights on CPUs, which serves to run this path where there is no GPU."""
    plain: Any = tiny_student().to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    folder = Checkpoint("name", tmp_path, tmp_path, None, {}, plain.norm_stats)
    flags = PolicyFlags(num_images_in_input=1)
    vla = load_policy_model(folder, flags, CPU, torch.bfloat16, "8bit")
    kinds = {name: type(module).__name__ for name, module in vla.named_modules()}
    assert kinds["language_model.model.layers.0.mlp.up_proj"] == "Linear8bitLt"
    assert kinds["language_model.lm_head"] == "Linear"
    batch = tiny_batch(plain, (9,))
    batch.pop("proprio")
    with torch.no_grad():
        expected = plain(**batch).last_hidden_state.float()
        actual = vla(**batch).last_hidden_state.float()
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.99
    assert not torch.equal(actual, expected)
