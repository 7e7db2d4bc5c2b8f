"""Taps on stock models of transformers: equal to the states they return, under PEFT, checkpointing, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rocket_align
from rocket_align import TeacherTargets, VGGTTeacher, spread_views, token_mask
from rocket_align.rows import RowPicker
from rocket_align.targets import present_views
from tests.helpers.tiny_vlms import IMAGE, TEXT_WIDTH, TOKENS, paligemma, paligemma_batch, pi0, pi0_batch

LAYERS = ("embeddings", "block.0", "block.2", "final_norm")


@pytest.mark.parametrize("strategy", ["auto", "norm", "returned"])
def test_rows_are_the_states_that_the_model_returns(strategy: Any) -> None:
    model = paligemma()
    batch = paligemma_batch() | {"output_hidden_states": True}
    taps = rocket_align.attach(model, LAYERS, IMAGE, strategy=strategy, example=batch)
    returned = model(**batch).hidden_states
    expected = torch.stack([returned[index][:, :TOKENS] for index in (0, 1, 3, 4)])
    torch.testing.assert_close(taps.take(), expected, rtol=0, atol=0)
    assert taps.strategy == ("layer" if strategy == "auto" else strategy)


def test_returned_states_hold_no_last_block_before_the_norm() -> None:
    with pytest.raises(ValueError, match=r"strategy: found returned, but .* has no place for block.3"):
        rocket_align.attach(paligemma(), "-1", IMAGE, strategy="returned")
    model = paligemma()
    taps = rocket_align.attach(model, "-2", IMAGE, strategy="returned")
    model(**paligemma_batch())
    with pytest.raises(ValueError, match=r"fired in one forward pass \(returned 0\) times"):
        taps.take()


def test_vision_encoder_and_projector() -> None:
    model, batch = paligemma(), paligemma_batch()
    vision = rocket_align.attach(model, "vision.0,vision.-1", example=batch)
    projector = rocket_align.attach(model, "projector", example=batch)
    model(**batch)
    features = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(vision.take(), torch.stack([features[1], features[2]]))
    model(**batch)
    rows = projector.take()[0]
    images = model.model.get_image_features(batch["pixel_values"])
    images = getattr(images, "pooler_output", images)
    assert rows.shape == images.shape
    torch.testing.assert_close(rows / rows.norm(), images / images.norm())
    with pytest.raises(ValueError, match="taps of 2 streams"):
        rocket_align.attach(model, "projector,vision.0")


def test_pi0_of_transformers_with_missing_cameras() -> None:
    """The sequence has no place for them: tokens go to their cameras' places, and the mask leaves the others out."""
    cameras = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    model = pi0()
    taps = rocket_align.attach(model, ["block.0", "block.1", "final_norm"], IMAGE, example=pi0_batch(cameras))
    model(**pi0_batch(cameras))
    packed = taps.take()
    assert taps.mask is not None and taps.mask.sum(dim=1).tolist() == [27, 18, 9]
    tokens, mask = spread_views(packed, cameras), token_mask(cameras, 27)
    assert tokens.shape == (3, 3, 27, TEXT_WIDTH) and mask.sum(dim=1).tolist() == [27, 18, 9]
    torch.testing.assert_close(tokens[:, 1, 18:], packed[:, 1, 9:18])
    torch.testing.assert_close(tokens[:, 2, 9:18], packed[:, 2, :9])
    torch.testing.assert_close(tokens[:, 0], packed[:, 0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = paligemma().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        taps = rocket_align.attach(model, ["block.0", "final_norm"], IMAGE)
        (model(**paligemma_batch()).loss + taps.take().square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attached_first", [True, False])
def test_peft(attached_first: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = paligemma()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    taps = rocket_align.attach(model, ["block.0", "final_norm"], IMAGE) if attached_first else None
    adapted = get_peft_model(model, config)
    taps = taps or rocket_align.attach(adapted, ["block.0", "final_norm"], IMAGE)
    for _ in range(2):
        returned = adapted(**paligemma_batch(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(taps.take()[0], returned[1][:, :TOKENS])
    adapted(**paligemma_batch())
    taps.take().sum().backward()
    lora = [
        weight for name, weight in adapted.named_parameters() if "language_model.layers.0" in name and "lora" in name
    ]
    assert lora and all(weight.grad is not None for weight in lora)


def test_bf16_autocast_and_weights() -> None:
    model = paligemma().to(torch.bfloat16)
    taps = rocket_align.attach(model, ["block.1"], IMAGE)
    batch = paligemma_batch()
    model(**batch | {"pixel_values": batch["pixel_values"].bfloat16()})
    assert taps.take().dtype == torch.bfloat16


def test_generation_goes_on_with_taps() -> None:
    model = paligemma().eval()
    batch = {name: value for name, value in paligemma_batch().items() if name != "labels"}
    plain = model.generate(**batch, max_new_tokens=3, do_sample=False)
    rocket_align.attach(model, ["block.0"], range(TOKENS))
    rocket_align.attach(model, ["block.1"], IMAGE)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), plain)


def test_a_teacher_does_not_see_missing_cameras(repo_root: Path) -> None:
    teacher = VGGTTeacher.from_pretrained(repo_root / "experiments/mini/weights/teacher", layers="0,-1")
    images = torch.rand(4, 3, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    cameras = torch.tensor([[True, True, True], [True, False, True], [False] * 3, [True, False, True]])
    features = present_views(teacher, images, cameras)
    assert features[1:] == teacher(images)[1:]
    for layer, alone in zip(features.layers, teacher(images[[1, 3]][:, [0, 2]]).layers):
        torch.testing.assert_close(layer[[1, 3]][:, [0, 2]], alone)
        assert not layer[1, 1].any() and not layer[2].any() and layer[0].any()
    blank = images.clone()
    blank[1, 1] = 0
    with_blank = teacher(blank).layers[1]
    assert not torch.allclose(with_blank[1, 0], features.layers[1][1, 0], atol=1e-3)
    none = present_views(teacher, images[:1], torch.zeros(1, 3, dtype=torch.bool))
    assert none.layers[0].shape == (1, 3, *features.layers[0].shape[2:]) and not none.layers[0].any()


def test_pixels_of_another_range_are_refused(repo_root: Path) -> None:
    class Processor:
        means, stds = [(0.0,) * 3], [(1.0,) * 3]

    teacher = VGGTTeacher.from_pretrained(repo_root / "experiments/mini/weights/teacher", layers="0")
    with pytest.raises(ValueError, match="found values from -1 to 1; accepted: 0 to 1"):
        TeacherTargets(teacher, Processor())(torch.linspace(-1, 1, 3 * 84 * 84).reshape(1, 3, 84, 84))


@pytest.mark.parametrize("positions", [range(-4, 0), []], ids=str)
def test_positions_that_are_none_of_a_sequence_are_refused_at_once(positions: Any) -> None:
    with pytest.raises(ValueError, match=r"image_tokens: found .*; accepted: positions from 0 on, or a slice"):
        RowPicker(positions)
