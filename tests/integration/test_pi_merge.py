"""Adapters of pi0 and pi0.5 merged on disk: also what trained in full, whatever names the base model's files have."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint
from prismatic.models.pi.model import PiPolicy
from prismatic.policies.pi import load_acting
from prismatic.util.errors import UsageError
from tests.helpers.tiny_pi import ROOT, write_tiny_pi


def merge(**flags: str) -> int:
    """The command, by its flags."""
    spec = importlib.util.spec_from_file_location("merge_lora", ROOT / "vla-scripts" / "merge_lora_weights_and_save.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: int = module.main(module.ConvertConfig(**flags))
    return result


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_merge_on_disk_is_that_of_training(kind: str, finetune: Callable[..., Path], tmp_path: Path) -> None:
    base = write_tiny_pi(tmp_path / kind, kind)
    if kind == "pi05":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"discrete_state_input": False}))
    ranks = {"lora_rank": 2, "lora_expert_rank": 4}
    checkpoint = finetune(vla_path=str(base), recipe="baseline", learning_rate=1e-2, **ranks) / "run--2_chkpt"
    adapter = load_file(checkpoint / "lora_adapter" / "adapter_model.safetensors")
    rank_of = {name.split(".")[2]: len(value) for name, value in adapter.items() if "lora_A" in name}
    assert rank_of == {"language_model": 2, "expert": 4}
    acting = load_acting(open_checkpoint(str(checkpoint)), torch.device("cpu"), torch.float32)
    (checkpoint / "model.safetensors").rename(tmp_path / "model.safetensors")
    adapted = load_acting(open_checkpoint(str(checkpoint)), torch.device("cpu"), torch.float32)
    (tmp_path / "model.safetensors").rename(checkpoint / "model.safetensors")
    for name, value in adapted.state_dict().items():  # By PEFT, every adapter at a scale of 1.
        torch.testing.assert_close(acting.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    # The base model as LeRobot writes it: `model.` in front, and a head that nothing uses.
    weights = {f"model.{name}": value for name, value in load_file(base / "model.safetensors").items()}
    embeddings = weights["model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]
    weights["model.paligemma_with_expert.paligemma.lm_head.weight"] = embeddings.clone()
    save_file(weights, base / "model.safetensors")

    merged = tmp_path / "merged"
    flags = {"base_checkpoint": str(base), "lora_finetuned_checkpoint_dir": str(checkpoint), "output_dir": str(merged)}
    assert merge(**flags) == 0
    expected, actual = (PiPolicy.from_pretrained(folder) for folder in (checkpoint, merged))
    before = PiPolicy.from_pretrained(base).state_dict()
    changed = [name for name, value in actual.state_dict().items() if not value.equal(before[name])]
    assert {name.partition(".")[0] for name in changed} >= {
        "vision_tower",
        "action_in_proj",
        "language_model",
        "expert",
    }
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert actual.config.platform == expected.config.platform
    # Whether the state is seen is what the run did, whatever the base model says.
    assert getattr(actual.config, "discrete_state_input", None) == (True if kind == "pi05" else None)
    acts = SimpleNamespace(use_proprio=True, num_images_in_input=2, use_diffusion=False, use_film=False)
    (checkpoint / "model.safetensors").unlink()
    for folder in (checkpoint, merged):
        opened = open_checkpoint(str(folder), str(base))
        check_policy_flags(acts, opened, next(iter(opened.statistics)))  # type: ignore[arg-type]

    weights.pop("model.action_in_proj.bias")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UsageError, match=r"--base_checkpoint: action_in_proj.bias is missing in .*; accepted: \(24,\)"):
        merge(**{**flags, "output_dir": str(tmp_path / "again")})
