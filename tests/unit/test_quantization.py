"""8-bit and 4-bit loading: what is refused where there is no GPU, and that 8-bit weights act like the model's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.robot import quantization
from experiments.robot.checkpoint import Checkpoint
from experiments.robot.quantization import check_quantization, quantization_arguments
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.util.errors import UsageError
from tests.helpers.student_helpers import tiny_batch, tiny_student

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NONE = {"load_in_8bit": False, "load_in_4bit": False, "use_film": False}


def config(**changes: bool) -> SimpleNamespace:
    return SimpleNamespace(**{**NONE, **changes})


def checkpoint(folder: Path, adapter: Path | None = None) -> Checkpoint:
    return Checkpoint("name", folder, folder, adapter, {}, {})


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_without_a_gpu_it_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}: needs an NVIDIA GPU, found device cpu; accepted here: False"):
        check_quantization(config(**{flag: True}), CPU)


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="--load_in_8bit, --load_in_4bit: both are True"):
        check_quantization(config(load_in_8bit=True, load_in_4bit=True), GPU)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--load_in_4bit: needs the package bitsandbytes: pip install"):
        check_quantization(config(load_in_4bit=True), GPU)


def test_an_adapter_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match=r"--load_in_8bit: .* only an adapter.*merge_lora_weights_and_save"):
        quantization_arguments(config(load_in_8bit=True), GPU, checkpoint(tmp_path, tmp_path / "lora_adapter"))


def test_without_the_flags_nothing_changes(tmp_path: Path) -> None:
    assert quantization_arguments(config(), CPU, checkpoint(tmp_path)) == {}


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


@pytest.mark.skipif(quantization.importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("use_film", [False, True])
def test_8_bit_weights_act_like_the_models(use_film: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library also multiplies 8-bit weights on CPUs, which serves to run this path where there is no GPU."""
    plain = tiny_student().to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    monkeypatch.setattr(quantization, "check_quantization", lambda cfg, device: "load_in_8bit")
    arguments: dict[str, Any] = quantization_arguments(config(use_film=use_film), CPU, checkpoint(tmp_path))
    vla: Any = OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16, **arguments)
    kinds = {name: type(module).__name__ for name, module in vla.named_modules()}
    assert kinds["language_model.model.layers.0.mlp.up_proj"] == "Linear8bitLt"
    assert kinds["language_model.lm_head"] == "Linear"
    assert (kinds["vision_backbone.featurizer.blocks.0.mlp.fc1"] == "Linear") == use_film
    batch = tiny_batch(plain, (9,))
    batch.pop("proprio")
    with torch.no_grad():
        expected = plain(**batch).last_hidden_state.float()
        actual = vla.eval()(**batch).last_hidden_state.float()
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.99
    assert not torch.equal(actual, expected)
