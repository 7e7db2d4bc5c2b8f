"""Time and peak memory of a training step's forward and backward pass: our pi0 against transformers' own.

    python benchmarks/pi_forward.py                                  minutes on two cores, 3 GB of memory

Both have the same random weights and the same batch (three cameras, a padded prompt, float32), and take turns in one
process on one thread. CPU time is compared, since other processes disturb it less. The losses have to agree.
transformers' pi0 cannot checkpoint, so ours is measured with and without. Memory is the most bytes of live tensors,
counted operator by operator: weights, gradients, activations and temporaries.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.util.cli import run
from prismatic.util.files import atomic_write
from prismatic.util.flags import limited

if TYPE_CHECKING:
    from torch import Tensor, nn

# Widths, blocks and batch. `mid` has the proportions of the published model, at an eighth of its width.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 48, "mlp": 80, "blocks": 4, "head": 8, "expert": 32, "vision": 24, "image": 42, "batch": 3},
    "mid": {"width": 256, "mlp": 2048, "blocks": 6, "head": 32, "expert": 128, "vision": 144, "image": 224, "batch": 4},
}
PROMPT, CHUNK, ACTION = 48, 50, 32


@dataclass
class PiForwardConfig:
    out: str = "benchmarks/results/pi_forward.json"  # Results file
    rounds: int = limited(15, least=3)  # Turns of every variant; the tiny model takes ten times as many
    num_threads: int = limited(1, least=1)


def main(config: PiForwardConfig) -> int:
    """Measure both sizes, print and write the results; returns 0."""
    import torch
    import transformers

    torch.set_num_threads(config.num_threads)
    results = {name: measure(name, config.rounds * (10 if name == "tiny" else 1)) for name in SIZES}
    for name, variants in results.items():
        for variant, numbers in variants.items():
            print(f"{name:5} {variant:22} " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cores": os.cpu_count()}
    atomic_write(
        Path(config.out), json.dumps({"machine": versions, "sizes": SIZES, "results": results}, indent=2) + "\n"
    )
    return 0


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds (median) and peak megabytes of each variant, with their ratios to transformers' in this run."""
    steps = variants(SIZES[name])
    losses = {variant: step() for variant, step in steps.items()}
    reference = losses["transformers"]
    if any(abs(loss - reference) > 1e-4 * abs(reference) for loss in losses.values()):
        raise RuntimeError(f"losses differ: {losses}")
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(rounds):
        for variant, step in steps.items():
            start = time.process_time()
            step()
            times[variant].append(time.process_time() - start)
    peaks = {variant: peak_bytes(step) for variant, step in steps.items()}
    return {
        variant: {
            "ms": round(1e3 * statistics.median(times[variant]), 2),
            "MB": round(peaks[variant] / 1e6, 2),
            "time_ratio": round(ratio(times[variant], times["transformers"]), 3),
            "memory_ratio": round(peaks[variant] / peaks["transformers"], 3),
        }
        for variant in steps
    }


def ratio(times: list[float], reference: list[float]) -> float:
    """Median of the ratios of neighboring turns."""
    return statistics.median(a / b for a, b in zip(times, reference))


def variants(size: dict[str, int]) -> dict[str, Callable[[], float]]:
    """One forward and backward pass each; called, they return the loss."""
    import torch
    from transformers import PI0ForConditionalGeneration

    from prismatic.models.pi.config import pi_config
    from prismatic.models.pi.model import PiPolicy

    torch.manual_seed(0)
    config = pi_config("pi0", **fields(size))
    ours, checkpointed = PiPolicy(config).train(), PiPolicy(config).train()
    checkpointed.load_state_dict(ours.state_dict())
    checkpointed.gradient_checkpointing_enable()
    theirs = PI0ForConditionalGeneration(config).train()
    unset = theirs.load_state_dict(their_names(ours.state_dict()), strict=False)
    if unset.unexpected_keys or unset.missing_keys != ["model.dit.embed_tokens.weight"]:  # which is never used
        raise RuntimeError(f"weights do not fit: {unset}")
    batch = make_batch(size, ours.tokens_per_image)
    image_token = theirs.config.vlm_config.image_token_id
    image_ids = batch["input_ids"].new_full((size["batch"], 3 * ours.tokens_per_image), image_token)
    their_batch = {
        "input_ids": torch.cat([image_ids, batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image_ids), batch["attention_mask"].long()], dim=1),
        "pixel_attention_mask": batch["image_masks"],
        "timestep": batch["time"],
        **{key: batch[key] for key in ("state", "noise", "actions", "pixel_values")},
    }
    return {
        "transformers": lambda: step(theirs, lambda: theirs(**their_batch).loss),
        "ours": lambda: step(ours, lambda: ours(**batch).losses.mean()),
        "ours, checkpointed": lambda: step(checkpointed, lambda: checkpointed(**batch).losses.mean()),
    }


def step(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Forward and backward; gradients are dropped first."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return float(value.detach())


def peak_bytes(step: Callable[[], float]) -> int:
    """Most bytes of live tensors in a step, its model's weights among them."""
    from benchmarks.live_bytes import LiveBytes

    counter = LiveBytes()
    with counter, counter.phase("step"):
        step()
    return counter.phases["step"].peak_bytes


def fields(size: dict[str, int]) -> dict[str, Any]:
    """Fields of a pi0 configuration."""
    gemma = {"model_type": "gemma", "num_hidden_layers": size["blocks"], "num_attention_heads": 8}
    gemma |= {"num_key_value_heads": 1, "head_dim": size["head"], "vocab_size": 2000}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": size["vision"],
        "intermediate_size": 4 * size["vision"],
        "num_hidden_layers": size["blocks"],
        "num_attention_heads": 4,
        "image_size": size["image"],
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = gemma | {"hidden_size": size["width"], "intermediate_size": size["mlp"]}
    expert = gemma | {"hidden_size": size["expert"], "intermediate_size": 4 * size["expert"]}
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": size["width"]}
    return {"vlm_config": vlm | {"image_token_index": 2000}, "dit_config": expert, "chunk_size": CHUNK}


def their_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by transformers' names."""
    places = {"expert": "model.dit", "action_out_proj": "action_out_proj"}
    places |= {part: f"model.vlm.{part}" for part in ("vision_tower", "multi_modal_projector", "language_model")}
    named = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        named[f"{places.get(part, f'embed_action_time.{part}')}.{rest}"] = value
    return named


def make_batch(size: dict[str, int], tokens_per_image: int) -> dict[str, Tensor]:
    """Random inputs: three cameras, prompts of different lengths."""
    import torch

    batch = size["batch"]
    lengths = torch.arange(batch)[:, None] * 7 + 20
    return {
        "pixel_values": torch.rand(batch, 3, 3, size["image"], size["image"]) * 2 - 1,
        "image_masks": torch.ones(batch, 3, dtype=torch.bool),
        "input_ids": torch.randint(5, 1999, (batch, PROMPT)),
        "attention_mask": torch.arange(PROMPT)[None] < lengths,
        "state": torch.randn(batch, ACTION),
        "actions": torch.randn(batch, CHUNK, ACTION),
        "noise": torch.randn(batch, CHUNK, ACTION),
        "time": torch.rand(batch) * 0.9 + 0.05,
    }


if __name__ == "__main__":
    run(PiForwardConfig, main)
