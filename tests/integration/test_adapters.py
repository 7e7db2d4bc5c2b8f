"""Kinds of adapters: DoRA, rank-stabilized scales, another alpha, chosen layers; trained, resumed, merged, acting."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from prismatic.checkpoint.layout import load_training_state
from prismatic.checkpoint.merge import merge_checkpoint
from prismatic.models.lora import add_lora, load_lora, merge_lora_state_dict, openvla_targets
from prismatic.util.errors import UsageError
from tests.helpers.student_helpers import tiny_student
from tests.helpers.training import trained_weights
from tests.integration.test_merge_lora_run import act

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora, rslora, chosen": {"use_dora": True, "use_rslora": True, "lora_targets": "attn.qkv,q_proj,up_proj"},
}


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True, "alpha": 5}], ids=str)
def test_the_merged_weights_are_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    peft_model = add_lora(tiny_student(), rank=4, **settings)
    torch.manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    peft_model.save_pretrained(tmp_path)
    loaded = load_lora(tiny_student(), tmp_path)
    state = loaded.get_base_model().state_dict()
    merged = merge_lora_state_dict(state, settings.get("alpha"), rank_stabilized=bool(settings.get("use_rslora")))
    expected = loaded.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_resumes_exactly_and_acts_the_same_merged(
    kind: str, finetune: Callable[..., Path], student_folder: Path, tmp_path: Path
) -> None:
    flags = {"use_film": True, "recipe": "baseline", "learning_rate": 1e-2, **KINDS[kind]}
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=2, **flags) / "run--2_chkpt"
    apart = {**flags, "merge_lora_during_training": False}
    halfway = finetune(run_root_dir=tmp_path / "b", max_steps=1, **apart) / "run--1_chkpt"
    checkpoint = finetune(run_root_dir=tmp_path / "b", vla_path=str(halfway), resume=True, max_steps=2, **apart)
    checkpoint /= "run--2_chkpt"
    for name, value in trained_weights(straight).items():
        assert torch.equal(value, trained_weights(checkpoint)[name]), name

    merged = tmp_path / "merged"
    merge_checkpoint(student_folder, checkpoint, merged, max_shard_bytes=10**9, dtype=None, overwrite=False)
    in_training = load_file(straight / "model.safetensors")
    for name, value in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(value, in_training[name], rtol=1e-4, atol=1e-5)
    expected = act(checkpoint, student_folder)
    np.testing.assert_allclose(act(merged, student_folder), expected, atol=1e-5)
    np.testing.assert_allclose(act(straight, student_folder), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_a_new_run_begins_where_a_film_policy_of_another_adapter_was(
    kind: str, finetune: Callable[..., Path], student_folder: Path, tmp_path: Path
) -> None:
    flags = {"use_film": True, "recipe": "baseline", "learning_rate": 1e-2}
    first = finetune(run_root_dir=tmp_path / "a", max_steps=2, **flags, **KINDS[kind]) / "run--2_chkpt"
    nothing = {**flags, "learning_rate": 1e-12, "weight_decay": 0.0, "max_steps": 1}
    expected = act(first, student_folder)
    for name, other in {"plain": {}, "other": KINDS["dora"], "same": KINDS[kind]}.items():
        second = finetune(run_root_dir=tmp_path / name, vla_path=str(first), **nothing, **other) / "run--1_chkpt"
        np.testing.assert_allclose(act(second, student_folder), expected, atol=1e-4)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_eight_bit_optimizer_resumes_exactly(finetune: Callable[..., Path], tmp_path: Path) -> None:
    flags = {"recipe": "baseline", "merge_lora_during_training": False, "optimizer": "adamw_8bit"}
    straight = finetune(run_root_dir=tmp_path / "a", max_steps=3, **flags) / "run--3_chkpt"
    halfway = finetune(run_root_dir=tmp_path / "b", max_steps=2, **flags) / "run--2_chkpt"
    resumed = finetune(run_root_dir=tmp_path / "b", vla_path=str(halfway), resume=True, max_steps=3, **flags)
    moments = load_training_state(resumed / "run--3_chkpt")["optimizer"]["state"]
    assert torch.uint8 in {value.dtype for value in tree_leaves(moments) if isinstance(value, torch.Tensor)}
    for name, value in trained_weights(straight).items():
        assert torch.equal(value, trained_weights(resumed / "run--3_chkpt")[name]), name


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_eight_bit_optimizer_without_its_package_is_refused(finetune: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"--optimizer: adamw_8bit needs bitsandbytes; accepted: adamw, or after pip"):
        finetune(recipe="baseline", optimizer="adamw_8bit")


def test_layers_of_no_model_are_refused_before_weights_are_read(finetune: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"--lora_targets: q_pro found; accepted: all-linear, or of down_proj"):
        finetune(recipe="baseline", lora_targets="q_pro")


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    student = tiny_student()
    assert openvla_targets(student, "all-linear") == openvla_targets(student, " all-linear")
    chosen = openvla_targets(student, "self_attn.q_proj, v_proj")
    layers = len(student.language_model.model.layers)
    assert len(chosen) == 2 * layers and all(name.endswith((".q_proj", ".v_proj")) for name in chosen)
    adapted = add_lora(tiny_student(), rank=2, target_modules=chosen)
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == 4 * layers
