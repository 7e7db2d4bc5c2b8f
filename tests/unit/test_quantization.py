"""8- and 4-bit weights through bitsandbytes, which also multiplies them on CPUs: they act nearly like the model's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from experiments.robot import openvla_utils
from experiments.robot.openvla_utils import quantization
from experiments.robot.policy import PolicyFlags
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.checkpoint.load import load_policy_model, prepare_for_training
from prismatic.checkpoint.write import _save_model
from prismatic.training.config import TrainConfig
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import LIBERO
from tests.helpers.programs import run_program
from tests.helpers.student_helpers import tiny_batch, tiny_config, tiny_student

CPU = torch.device("cpu")
WIDTH = 64  # of whole 4-bit blocks
TEXT = {**tiny_config().text_config.to_dict(), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="--load_in_8bit, --load_in_4bit: both are True"):
        quantization(PolicyFlags(load_in_8bit=True, load_in_4bit=True))


@pytest.mark.parametrize("script", ["experiments/robot/libero/run_libero_eval.py", "vla-scripts/deploy.py"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_package_the_commands_say_it_in_one_line(
    script: str, golden_dir: Path, repo_root: Path, tmp_path: Path
) -> None:
    weights = golden_dir / "openvla_tiny" / "model.safetensors"
    flags = ["--use_l1_regression", "false", "--use_proprio", "false", "--unnorm_key", "libero_tiny", "--device", "cpu"]
    command = [sys.executable, str(repo_root / script), "--pretrained_checkpoint", str(weights.parent), *flags]
    command += ["--load_in_8bit", "true"]
    done = run_program(command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --load_in_8bit: needs the package bitsandbytes")
    assert "Traceback" not in done.stderr


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvla_utils.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--load_in_4bit: needs the package bitsandbytes: pip install"):
        quantization(PolicyFlags(load_in_4bit=True))


def write_checkpoint(folder: Path, *, film: bool, merge: bool) -> str:
    """A trained-looking checkpoint, merged or an adapter on its base model."""
    base = tiny_student(text_config=TEXT).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    model = prepare_for_training(base, TrainConfig(use_film=film, lora_rank=4), LIBERO)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    _save_model(folder, model, merge=merge)
    if film:
        torch.save(base.vision_backbone.state_dict(), folder / "vision_backbone--7_checkpoint.pt")
    (folder / "dataset_statistics.json").write_text(json.dumps(base.norm_stats))
    return str(folder)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_a_quantized_policy_acts_like_the_plain_one(kind: str, film: bool, merge: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, film=film, merge=merge), str(tmp_path / "base"))
    flags = PolicyFlags(num_images_in_input=1, use_film=film)
    plain, vla = (load_policy_model(checkpoint, flags, CPU, torch.bfloat16, load_in) for load_in in ("", kind))
    layer = vla.language_model.model.layers[0].mlp.up_proj
    layer = getattr(layer, "base_layer", layer)
    assert type(layer).__name__ == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind]
    factor = {"8bit": 2, "4bit": 4}[kind]
    weight = plain.language_model.model.layers[0].mlp.up_proj.weight
    assert layer.weight.numel() * layer.weight.element_size() * factor == weight.numel() * weight.element_size()
    batch = tiny_batch(plain, (9,))
    batch.pop("proprio")
    with torch.no_grad():
        expected = plain(**batch, use_film=film).last_hidden_state.float()
        actual = vla(**batch, use_film=film).last_hidden_state.float()
    least = {"8bit": 0.999, "4bit": 0.97}[kind]
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > least
    assert not torch.equal(actual, expected)
