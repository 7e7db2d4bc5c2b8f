"""Checkpoint folders of pi0 and pi0.5: names of three projects, round trips, types, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PI0ForConditionalGeneration

from prismatic.models.pi.model import PiPolicy
from prismatic.util.errors import UsageError
from tests.helpers.pi_models import PiRecord

LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDINGS = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def record(request: pytest.FixtureRequest, golden_dir: Path) -> PiRecord:
    return PiRecord(golden_dir, request.param)


def write(folder: Path, record: PiRecord, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    record.config().save_pretrained(folder)
    return folder


def loss(policy: PiPolicy, record: PiRecord) -> float:
    with torch.no_grad():
        return float(policy(**record.batch()).losses.mean())


def test_a_round_trip_is_exact(record: PiRecord, tmp_path: Path) -> None:
    weights = record.part("weights")
    policy = PiPolicy.from_pretrained(write(tmp_path / "in", record, weights))
    policy.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
    again = PiPolicy.from_pretrained(tmp_path / "out")
    assert again.config.to_dict() == policy.config.to_dict()
    assert loss(again, record) == loss(policy, record) == pytest.approx(record.facts["loss"], rel=1e-5)


def test_other_spellings_and_dead_weights_load_alike(record: PiRecord, tmp_path: Path) -> None:
    weights = record.part("weights")
    dead = {
        f"paligemma_with_expert.gemma_expert.{name}": torch.zeros(3, 2)
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    spellings = {
        "lerobot": {f"model.{name}": value for name, value in (weights | dead).items()}
        | {f"model.{LM_HEAD}": weights[EMBEDDINGS].clone()},
        "newer": {name.replace("vision_model.", ""): value for name, value in weights.items()},
        "tied": {LM_HEAD if name == EMBEDDINGS else name: value for name, value in weights.items()},
    }
    for name, stored in spellings.items():
        policy = PiPolicy.from_pretrained(write(tmp_path / name, record, stored))
        assert loss(policy, record) == pytest.approx(record.facts["loss"], rel=1e-5), name


def test_types(record: PiRecord, tmp_path: Path) -> None:
    halves = {name: value.bfloat16() for name, value in record.part("weights").items()}
    folder = write(tmp_path / "bf16", record, halves)
    assert {value.dtype for value in PiPolicy.from_pretrained(folder).parameters()} == {torch.float32}
    policy = PiPolicy.from_pretrained(folder, dtype=torch.bfloat16)
    block = policy.expert.layers[0]
    assert policy.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {value.dtype for value in block.input_layernorm.parameters()} == {torch.float32}
    assert policy.action_in_proj.weight.dtype == torch.float32
    assert loss(policy, record) == pytest.approx(record.facts["loss"], rel=0.02)


def test_bf16_norms_of_a_float32_file_are_not_rounded(record: PiRecord, tmp_path: Path) -> None:
    weights = record.part("weights")
    policy = PiPolicy.from_pretrained(write(tmp_path / "in", record, weights), dtype=torch.bfloat16)
    assert torch.equal(policy.language_model.norm.weight, weights[EMBEDDINGS.replace("embed_tokens", "norm")])


def test_transformers_reads_what_is_written(golden_dir: Path, tmp_path: Path) -> None:
    record = PiRecord(golden_dir, "pi0")
    record.policy().save_pretrained(tmp_path)
    theirs = PI0ForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs, ids = record.part("inputs"), record.part("inputs_hf")
    with torch.no_grad():
        output = theirs(
            state=inputs["state"],
            noise=inputs["noise"],
            timestep=inputs["time"],
            actions=inputs["actions"],
            pixel_values=inputs["images"],
            pixel_attention_mask=inputs["image_masks"],
            **ids,
        )
    torch.testing.assert_close(output.logits, record.part("outputs_hf")["velocity"], rtol=0, atol=1e-5)


def test_lerobot_config_and_weights_are_enough(golden_dir: Path, tmp_path: Path) -> None:
    """Sizes are read off the weights, heads are the eight that the published models have."""
    record = PiRecord(golden_dir, "pi05")
    folder = write(tmp_path / "in", record, {f"model.{name}": value for name, value in record.part("weights").items()})
    (folder / "config.json").write_text(json.dumps({"type": "pi05", "chunk_size": 10, "tokenizer_max_length": 180}))
    config = PiPolicy.from_pretrained(folder).config
    assert (config.model_type, config.chunk_size, config.prompt_length) == ("pi05", 10, 180)
    assert config.vlm_config.text_config.to_dict()["head_dim"] == record.sizes["head_dim"]
    assert config.dit_config.num_attention_heads == record.sizes["heads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(EMBEDDINGS), "1 weights missing and 0 unknown"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "0 weights missing and 1 unknown"),
        (lambda weights: weights.update({EMBEDDINGS: torch.zeros(2, 2)}), "of shape"),
    ],
)
def test_other_weights_are_refused(change: object, message: str, golden_dir: Path, tmp_path: Path) -> None:
    record = PiRecord(golden_dir, "pi0")
    weights = dict(record.part("weights"))
    change(weights)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        PiPolicy.from_pretrained(write(tmp_path / "in", record, weights))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        PiPolicy.from_pretrained(tmp_path)
