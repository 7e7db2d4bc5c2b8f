"""Properties of the student that need no reference data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismatic.extern.hf.configuration_prismatic import VISION_BACKBONES
from prismatic.extern.hf.modeling_prismatic import ATTENTION, OpenVLAForActionPrediction, PrismaticVisionBackbone
from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead
from prismatic.models.film_vit_wrapper import FiLMedPrismaticVisionBackbone
from prismatic.models.lora import add_lora
from prismatic.models.projectors import NoisyActionProjector, ProprioProjector
from tests.helpers.student_helpers import tiny_batch, tiny_config, tiny_student

PROMPT_LENGTHS = (9, 14, 6)
INPUTS = ("input_ids", "attention_mask", "pixel_values")


def with_actions(vla: OpenVLAForActionPrediction, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Training inputs: random action tokens and the stop token after each prompt, and their labels."""
    generator = torch.Generator().manual_seed(1)
    inputs = vla._append_action_tokens(batch["input_ids"], batch["attention_mask"])
    ids = inputs.input_ids.clone()
    ids[inputs.action_mask] = torch.randint(31744, 32000, (int(inputs.action_mask.sum()),), generator=generator)
    labelled = inputs.action_mask | (inputs.attention_mask & (ids == 2))
    kept = {"attention_mask": inputs.attention_mask, "pixel_values": batch["pixel_values"]}
    return {"input_ids": ids, "labels": torch.where(labelled, ids, -100), **kept}


def gradients(vla: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Gradients of a loss that only the hidden states enter."""
    vla.zero_grad()
    output = vla(**inputs, output_hidden_states=True, **options)
    sum(hidden.float().pow(2).mean() for hidden in output.hidden_states).backward()
    return {name: p.grad.clone() for name, p in vla.named_parameters() if p.grad is not None}


def test_no_logits_means_no_head_and_the_same_gradients() -> None:
    vla = tiny_student()
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    calls: list[int] = []
    vla.language_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    without = gradients(vla, inputs, compute_logits=False)
    assert not calls
    expected = gradients(vla, inputs)
    assert calls
    torch.testing.assert_close(without, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_film", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_film: bool) -> None:
    vla = tiny_student()
    if use_film:
        vla.vision_backbone = FiLMedPrismaticVisionBackbone(vla.vision_backbone, vla.llm_dim)
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    vla.train()
    expected = gradients(vla, inputs, compute_logits=False, use_film=use_film)
    vla.recompute_activations()
    calls: list[int] = []
    block = (vla.vision_backbone.vision_backbone if use_film else vla.vision_backbone).featurizer.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(vla, inputs, compute_logits=False, use_film=use_film)
    assert len(calls) == 2  # The vision block, too, ran again in the backward pass.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_padding_does_not_change_real_tokens() -> None:
    vla = tiny_student()
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    row = 2
    length = int(inputs["attention_mask"][row].sum())
    assert length < inputs["input_ids"].shape[1]
    alone = {k: v[row : row + 1] if k == "pixel_values" else v[row : row + 1, :length] for k, v in inputs.items()}
    with torch.no_grad():
        together, single = vla(**inputs).last_hidden_state, vla(**alone).last_hidden_state
    torch.testing.assert_close(together[row : row + 1, : single.shape[1]], single, rtol=0, atol=1e-5)


def test_every_token_sees_later_tokens() -> None:
    vla = tiny_student()
    batch = tiny_batch(vla, (9,))
    inputs = {name: batch[name] for name in INPUTS}
    with torch.no_grad():
        before = vla(**inputs).last_hidden_state
        inputs["input_ids"][0, -1] += 1
        after = vla(**inputs).last_hidden_state
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-6)


def test_embeddings_of_action_tokens_do_not_matter() -> None:
    vla = tiny_student()
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    other = {**inputs, "input_ids": torch.where(inputs["labels"] > 31743, 31744, inputs["input_ids"])}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(vla(**inputs).last_hidden_state, vla(**other).last_hidden_state)


def predictors(vla: OpenVLAForActionPrediction, kind: str, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    torch.manual_seed(5)
    width = vla.llm_dim
    options: dict[str, Any] = {"proprio": batch["proprio"], "proprio_projector": ProprioProjector(width, 8)}
    if kind == "discrete":
        with torch.no_grad():  # Else a random head never prefers an action token.
            vla.language_model.lm_head.weight[:31744] = 0
            vla.language_model.lm_head.weight[32000:] = 0
    if kind in ("l1", "film"):
        options["action_head"] = L1RegressionActionHead(width, width, 7)
    if kind == "film":
        vla.vision_backbone = FiLMedPrismaticVisionBackbone(vla.vision_backbone, width)
        options["use_film"] = True
    if kind == "diffusion":
        options["action_head"] = DiffusionActionHead(width, width, 7, num_diffusion_steps_train=4)
        options["action_head"].noise_scheduler.set_timesteps(3)
        options["noisy_action_projector"] = NoisyActionProjector(width)
        options["initial_noise"] = torch.randn(len(batch["input_ids"]), 8, 7)
    return options


@pytest.mark.parametrize("kind", ["l1", "discrete", "diffusion", "film"])
def test_a_batch_of_predictions_equals_one_by_one(kind: str) -> None:
    vla = tiny_student(num_images=2)
    batch = tiny_batch(vla, PROMPT_LENGTHS)
    batch["input_ids"][1, PROMPT_LENGTHS[1] - 1] = 29871  # This prompt has the closing token, the others do not.
    options = predictors(vla, kind, batch)
    inputs = {name: batch[name] for name in INPUTS}
    actions, hidden = vla.predict_action(**inputs, **options)
    assert actions.shape == (3, 8, 7) and hidden.shape == (3, 56, vla.llm_dim)
    assert np.abs(actions[0] - actions[1]).max() > 1e-3
    for i, length in enumerate(PROMPT_LENGTHS):
        one = {k: v[i : i + 1] if k == "pixel_values" else v[i : i + 1, :length] for k, v in inputs.items()}
        per_sample = ("proprio", "initial_noise")
        chosen = {k: v[i : i + 1] if k in per_sample else v for k, v in options.items()}
        expected, expected_hidden = vla.predict_action(**one, **chosen)
        np.testing.assert_allclose(actions[i : i + 1], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(hidden[i : i + 1], expected_hidden, rtol=0, atol=1e-5)


def test_predict_action_appends_the_closing_token_once() -> None:
    vla = tiny_student()
    batch = tiny_batch(vla, (9,))
    closed = torch.cat([batch["input_ids"], torch.tensor([[29871]])], dim=1)
    open_actions, _ = vla.predict_action(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    closed_actions, _ = vla.predict_action(closed, torch.ones_like(closed), batch["pixel_values"])
    np.testing.assert_array_equal(open_actions, closed_actions)


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_number_of_images(num_images: int) -> None:
    vla = tiny_student(num_images=num_images)
    batch = tiny_batch(vla, (9, 7))
    inputs = {name: batch[name] for name in INPUTS}
    with torch.no_grad():
        features = vla(**inputs).projector_features
        first = vla.vision_backbone(batch["pixel_values"])[:, :4]
        vla.vision_backbone.set_num_images_in_input(1)
        alone = vla.vision_backbone(batch["pixel_values"][:, :6])
    assert features.shape == (2, 4 * num_images, vla.llm_dim)
    torch.testing.assert_close(first, alone)


def test_wrong_number_of_images_is_refused() -> None:
    vla = tiny_student(num_images=2)
    with pytest.raises(ValueError, match=r"pixel_values: found shape \(1, 6, 28, 28\); accepted: \(batch, 12"):
        vla.vision_backbone(torch.zeros(1, 6, 28, 28))
    with pytest.raises(ValueError, match="num_images_in_input: found 0"):
        vla.vision_backbone.set_num_images_in_input(0)


def test_wrong_proprio_is_refused() -> None:
    vla = tiny_student()
    batch = tiny_batch(vla, (9, 7))
    inputs = {name: batch[name] for name in INPUTS}
    with pytest.raises(ValueError, match=r"proprio: found shape \(8,\); accepted: \(2, 8\)"):
        vla(**inputs, proprio=torch.zeros(8), proprio_projector=ProprioProjector(vla.llm_dim, 8))


@pytest.mark.parametrize("name", sorted(VISION_BACKBONES))
def test_every_vision_backbone(name: str) -> None:
    count = len(VISION_BACKBONES[name].timm_ids)
    patch = 16 if name.startswith("in1k") else 14
    sizes = [{"embed_dim": 16, "depth": 3, "num_heads": 2}, {"embed_dim": 8, "depth": 3, "num_heads": 2}]
    config = tiny_config(vision_backbone_id=name, image_sizes=[2 * patch] * count, timm_override_kwargs=sizes[:count])
    backbone = PrismaticVisionBackbone(config).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3 * count, 2 * patch, 2 * patch))
    assert features.shape == (2, 4, backbone.embed_dim)
    assert backbone.get_num_patches() == 4 and backbone.embed_dim == (24 if count == 2 else 16)


@pytest.mark.parametrize("fused", [True, False])
def test_save_and_load(fused: bool, tmp_path: Path) -> None:
    single: dict[str, Any] = {"vision_backbone_id": "dinov2-vit-l", "image_sizes": [28]}
    single["timm_override_kwargs"] = [{"embed_dim": 16, "depth": 3, "num_heads": 2}]
    vla = tiny_student(platform="bridge", **({} if fused else single))
    vla.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(vla.state_dict())
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in names and not any("gamma" in n for n in names)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path).eval()
    again.vision_backbone.set_num_images_in_input(1)
    assert again.platform == vla.platform and again.platform.name == "bridge"
    batch = tiny_batch(vla, PROMPT_LENGTHS)
    inputs = {name: batch[name] for name in INPUTS}
    with torch.no_grad():
        assert torch.equal(vla(**inputs).logits, again(**inputs).logits)
    # Loading leaves the checkpoint alone.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    text_config = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
    vla = tiny_student(text_config=text_config)
    vla.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert again.language_model.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, vla.get_input_embeddings().weight)


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from prismatic.extern.hf import register_openvla

    register_openvla()
    register_openvla()
    tiny_student().save_pretrained(tmp_path)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), OpenVLAForActionPrediction)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "openvla"


def test_film_mean_over_padding_or_without() -> None:
    """Released checkpoints average over padding; `film_exclude_padding` makes a row independent of its neighbors."""
    vla = tiny_student()
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    text = vla.get_input_embeddings()(inputs["input_ids"]).detach()
    actions = inputs["labels"] > 31743
    kept = ~actions[0]
    mean = vla._film_language(text, inputs["attention_mask"], actions, use_film=True)
    torch.testing.assert_close(mean[0], text[0, kept].mean(dim=0))
    vla.config.film_exclude_padding = True
    kept = kept & inputs["attention_mask"][0]
    mean = vla._film_language(text, inputs["attention_mask"], actions, use_film=True)
    torch.testing.assert_close(mean[0], text[0, kept].mean(dim=0))


def test_platform_decides_the_chunk() -> None:
    statistics = {name: [value] * 14 for name, value in (("min", -1.0), ("max", 1.0))}
    vla = tiny_student(platform="ALOHA", norm_stats={"folding": {"action": statistics}})
    batch = tiny_batch(vla, (9, 7))
    actions, hidden = vla.predict_action(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    assert actions.shape == (2, 25, 14) and hidden.shape[1] == 25 * 14


def test_unnormalization_keeps_masked_numbers() -> None:
    statistics = {"q01": [-2.0] * 7, "q99": [4.0] * 7, "mask": [True] * 6 + [False]}
    vla = tiny_student(norm_stats={"some_data": {"action": statistics}})
    actions = vla._unnormalize_actions(np.full((1, 8, 7), 0.5), statistics)
    np.testing.assert_allclose(actions[..., :6], 2.5, atol=1e-6)
    np.testing.assert_array_equal(actions[..., 6], 0.5)


@pytest.mark.parametrize("key", ["libero", None])
def test_unknown_statistics_are_refused(key: str | None) -> None:
    vla = tiny_student(norm_stats={"one": {}, "two": {}})
    with pytest.raises(ValueError, match=f"unnorm_key: found {key!r}; accepted: one, two"):
        vla.get_action_stats(key)


def test_lora_leaves_the_rest_frozen_and_starts_as_the_base_model() -> None:
    vla = tiny_student()
    inputs = with_actions(vla, tiny_batch(vla, PROMPT_LENGTHS))
    with torch.no_grad():
        expected = vla(**inputs).logits
        peft_model = add_lora(vla, rank=4)
        torch.testing.assert_close(peft_model(**inputs).logits, expected)
    assert {n.split(".lora_")[1][0] for n, p in peft_model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_configuration_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match="image_sizes: found 1 entries; accepted: 2"):
        tiny_config(image_sizes=[28])
    with pytest.raises(ValueError, match="did you mean 'letterbox'"):
        tiny_config(image_resize_strategy="leterbox")
    with pytest.raises(ValueError, match=r"text_config.model_type: found 'phi'; accepted: 'llama'"):
        tiny_config(text_config={"model_type": "phi"})
    with pytest.raises(ValueError, match="timm_model_ids: found 2 ids"):
        tiny_config(use_fused_vision_backbone=False)


@pytest.mark.parametrize("kind", ["l1", "discrete", "diffusion", "film"])
def test_bfloat16_model_with_float32_heads_and_inputs(kind: str) -> None:
    vla = tiny_student()
    batch = tiny_batch(vla, PROMPT_LENGTHS)
    options = predictors(vla, kind, batch)
    inputs = {name: batch[name] for name in INPUTS}
    expected, _ = vla.predict_action(**inputs, **options)
    actions, hidden = vla.to(torch.bfloat16).predict_action(**inputs, **options)
    assert hidden.dtype == torch.bfloat16 and actions.dtype == np.float64 and np.isfinite(actions).all()
    if kind in ("l1", "film"):
        np.testing.assert_allclose(actions, expected, atol=0.1)


def test_every_attention_that_is_accepted_gives_the_same_outputs(tmp_path: Path) -> None:
    """Also beside padding, which no real token may see, and when the implementation changes later."""
    tiny_student().save_pretrained(tmp_path)
    padded = tiny_batch(tiny_student(), (9, 4))
    padded.pop("proprio")
    alone = {name: value[1:, :4] if value.ndim == 2 else value[1:] for name, value in padded.items()}
    outputs = {}
    for name in ATTENTION:
        vla = OpenVLAForActionPrediction.from_pretrained(tmp_path, attn_implementation=name).eval()
        with torch.no_grad():
            outputs[name], single = vla(**padded).last_hidden_state, vla(**alone).last_hidden_state
        torch.testing.assert_close(outputs[name][1:, : single.shape[1]], single, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[name][0], outputs["sdpa"][0], atol=1e-5, rtol=1e-4)
    vla.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(vla(**padded).last_hidden_state, outputs["sdpa"])


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "paged|eager", "nonsense"])
def test_other_attention_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    tiny_student().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attn_implementation: .* found; accepted: sdpa, eager$"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path, attn_implementation=name)
