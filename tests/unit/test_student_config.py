"""The untrained mini student: its sizes, its seed, its embeddings."""

from __future__ import annotations

import pytest
import torch

from experiments.mini.make.pretrain_student import build_student

PROMPT = "In: What action should the robot take to pick up the milk and place it in the basket?\nOut:"


@pytest.fixture(scope="module")
def student():
    model, processor = build_student(3)
    return model.eval(), processor


def test_sizes(student) -> None:
    model, _ = student
    assert model.vision_backbone.get_num_patches() == 36
    assert model.vision_backbone.get_num_images_in_input() == 2
    table = model.get_input_embeddings().weight
    assert table.shape == (32064, model.llm_dim)
    assert model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    blocks = sum(parameter.numel() for parameter in model.parameters()) - table.numel()
    assert 1e6 < blocks < 5e6


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(student) -> None:
    before = torch.get_rng_state()
    again, other = build_student(3)[0], build_student(4)[0]
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(student[0].state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(student[0].state_dict()[name], other.state_dict()[name])


def test_embeddings_of_ids_that_text_reaches_are_not_zero(student) -> None:
    model, processor = student
    table = model.get_input_embeddings().weight
    ids = processor.tokenizer(f"{PROMPT} zebra 42!").input_ids + list(range(31744, 32000)) + [29871]
    assert (table[ids].abs().sum(dim=1) > 0).all()
    assert (table.abs().sum(dim=1) == 0).float().mean() > 0.9
