"""The fused layers of the language model have transformers' values and gradients, and keep its modules as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from prismatic.models import llama_layers
from tests.helpers.student_helpers import tiny_batch, tiny_student

PLAIN = {fused: plain for plain, fused in llama_layers._CLASSES.items()}


def student(*, fused: bool, **changes: Any) -> Any:
    vla = tiny_student(**changes).train()
    vla.requires_grad_(True)
    for module in vla.modules():
        if not fused and type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return vla


def run(vla: Any, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output and gradients of a loss that reads the text's rows of the last state and all rows of the others."""
    batch = {name: value for name, value in tiny_batch(vla, (9, 6)).items() if name != "proprio"}
    output = vla(**batch, output_hidden_states=True, compute_logits=False, **options)
    first = output.projector_features.shape[1]
    read = [*output.hidden_states[:-1], output.hidden_states[-1][:, first:]]
    sum((state * torch.linspace(-1, 1, state.numel()).view_as(state)).sum() for state in read).backward()
    return output, {name: p.grad for name, p in vla.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("last_state_of_text", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_those_of_transformers(last_state_of_text: bool, recompute: bool) -> None:
    fused, plain = student(fused=True), student(fused=False)
    if recompute:
        fused.recompute_activations()
    output, gradients = run(fused, last_state_of_text=last_state_of_text)
    expected, expected_gradients = run(plain)
    first = output.projector_features.shape[1] if last_state_of_text else 0
    for number, (state, other) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        rows = slice(first if number == len(output.hidden_states) - 1 else 0, None)
        torch.testing.assert_close(state[:, rows], other[:, rows], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max()) + 1e-9
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=2e-5, msg=name)


def test_grouped_keys_are_attended_to_as_transformers_does() -> None:
    text = {**tiny_student().config.text_config.to_dict(), "num_key_value_heads": 1}
    results = [run(student(fused=fused, text_config=text))[0].last_hidden_state for fused in (True, False)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_without_gradients_and_in_other_types_the_layers_are_transformers_own() -> None:
    fused, plain = student(fused=True), student(fused=False)
    batch = {name: value for name, value in tiny_batch(fused, (9, 6)).items() if name != "proprio"}
    with torch.no_grad():
        states = [
            vla(**batch, compute_logits=False, last_state_of_text=True).last_hidden_state for vla in (fused, plain)
        ]
    assert torch.equal(*states)
    with torch.autocast("cpu", torch.bfloat16):
        states = [vla(**batch, compute_logits=False).last_hidden_state for vla in (fused, plain)]
    assert torch.equal(*states)


def test_sharding_still_finds_the_layers_by_their_class_name() -> None:
    names = {type(layer).__name__ for layer in student(fused=True).language_model.model.layers}
    assert names == {modeling_llama.LlamaDecoderLayer.__name__} <= set(student(fused=True)._no_split_modules)
