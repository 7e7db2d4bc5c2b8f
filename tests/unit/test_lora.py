"""Adapters: names, loading of old files, merging of state dicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from prismatic.models.film_vit_wrapper import FiLMedPrismaticVisionBackbone, load_film_backbone
from prismatic.models.lora import add_lora, load_lora, lora_target_modules, merge_lora_state_dict
from tests.helpers.student_helpers import tiny_config, tiny_student

ADAPTER = "adapter_model.safetensors"
HEAD = "base_model.model.language_model.lm_head.base_layer.weight"


def trained_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Save an adapter with non-zero update; return its weights."""
    peft_model = add_lora(tiny_student(), rank=4)
    torch.manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(folder)
    return load_file(folder / ADAPTER)


@pytest.mark.parametrize("with_base_weight", [True, False])
def test_load_lora_with_and_without_the_heads_base_weight(with_base_weight: bool, tmp_path: Path) -> None:
    trained_adapter(tmp_path)
    weights = load_file(tmp_path / ADAPTER)
    weights.pop(HEAD, None)
    if with_base_weight:
        weights[HEAD] = torch.zeros(32064, 16)
    save_file(weights, tmp_path / ADAPTER)
    peft_model = load_lora(tiny_student(), tmp_path)
    loaded = dict(peft_model.named_parameters())
    for name, value in weights.items():
        if name != HEAD:
            assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value), name
    head = peft_model.get_base_model().language_model.lm_head
    assert torch.equal(head.base_layer.weight, tiny_student().language_model.lm_head.weight)
    assert not any(p.requires_grad for p in peft_model.parameters())


def test_load_lora_for_training(tmp_path: Path) -> None:
    trained_adapter(tmp_path)
    peft_model = load_lora(tiny_student(), tmp_path, is_trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in peft_model.named_parameters())


def test_an_adapter_whose_settings_ask_for_another_package_is_refused(tmp_path: Path) -> None:
    trained_adapter(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"megatron_config": {"x": 1}}))
    with pytest.raises(ValueError, match=r"asks for a package that is not here .*megatron"):
        load_lora(tiny_student(), tmp_path)


def test_an_adapter_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    weights = trained_adapter(tmp_path)
    weights.pop("base_model.model.projector.fc1.lora_A.weight")
    save_file(weights, tmp_path / ADAPTER)
    with pytest.raises(ValueError, match=r"1 adapter weights missing.*projector.fc1.lora_A"):
        load_lora(tiny_student(), tmp_path)


def test_merged_state_dict_equals_pefts_merge(tmp_path: Path) -> None:
    trained_adapter(tmp_path)
    peft_model = load_lora(tiny_student(), tmp_path)
    merged = merge_lora_state_dict(peft_model.get_base_model().state_dict())
    expected = peft_model.merge_and_unload().state_dict()
    assert any(not torch.equal(value, tiny_student().state_dict()[name]) for name, value in merged.items())
    torch.testing.assert_close(merged, dict(expected), rtol=0, atol=1e-5)


def test_merging_takes_no_memory_of_the_gpu_that_trains() -> None:
    with FakeTensorMode():
        state = {
            "fc1.base_layer.weight": torch.empty(6, 5, dtype=torch.bfloat16, device="cuda"),
            "fc1.lora_A.default.weight": torch.empty(2, 5, device="cuda"),
            "fc1.lora_B.default.weight": torch.empty(6, 2, device="cuda"),
        }
        merged = merge_lora_state_dict(state)
    assert (merged["fc1.weight"].device.type, merged["fc1.weight"].dtype) == ("cpu", torch.bfloat16)


def test_film_checkpoint_of_a_lora_run_loads_merged(tmp_path: Path) -> None:
    """Fine-tuning adds adapters first and FiLM after them, so the saved backbone holds both."""
    trained_adapter(tmp_path)
    trained = load_lora(tiny_student(), tmp_path).get_base_model()
    trained.vision_backbone = FiLMedPrismaticVisionBackbone(trained.vision_backbone, trained.llm_dim)
    saved = {f"module.{name}": value for name, value in trained.vision_backbone.state_dict().items()}
    assert any(".lora_A." in name for name in saved)
    vla = tiny_student(seed=1)
    load_film_backbone(vla, saved)
    images, language = torch.randn(2, 6, 28, 28), torch.randn(2, vla.llm_dim)
    with torch.no_grad():
        expected = trained.vision_backbone(images, language)
        torch.testing.assert_close(vla.vision_backbone(images, language), expected, rtol=1e-4, atol=1e-5)


def test_film_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FiLM vision backbone: .* weights missing"):
        load_film_backbone(tiny_student(), {"vision_backbone.featurizer.cls_token": torch.zeros(1, 1, 16)})


def test_a_tied_head_gets_no_adapter() -> None:
    assert "lm_head" in lora_target_modules(tiny_student())
    text_config = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
    assert "lm_head" not in lora_target_modules(tiny_student(text_config=text_config))
