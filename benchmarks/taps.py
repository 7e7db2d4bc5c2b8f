"""Measure what taps cost: CPU time and peak tensor memory of a training step of a stock vision-language model.

Three steps of the same model and batch in one run: without alignment, with taps (`rocket_align.attach`), and with
`output_hidden_states=True` and slices of what it returns; each also with gradient checkpointing. The auxiliary loss is
the rows' mean square, so that a projector's cost, equal for both ways, stays out. Times are medians over interleaved
rounds; memory is counted at the operators (live_bytes.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.live_bytes import LiveBytes
from rocket_align import attach

WAYS = ("none", "taps", "hidden_states")


def build(width: int, blocks: int, side: int) -> Any:
    """A PaliGemma with random weights whose images have `side` x `side` tokens."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": width // 4,
        "vocab_size": 1001,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 14 * side,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=width, image_token_index=1000)
    return PaliGemmaForConditionalGeneration(config).train()


def make_batch(batch: int, side: int, text: int) -> dict[str, Tensor]:
    """Samples of one image and `text` words."""
    ids = torch.cat((torch.full((batch, side * side), 1000), torch.randint(0, 999, (batch, text))), dim=1)
    pixels = torch.randn(batch, 3, 14 * side, 14 * side)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": ids,
        "pixel_values": pixels,
    }


def steps(model: Any, batch: dict[str, Tensor], layers: list[int], tokens: int) -> dict[str, Callable[[], None]]:
    """One training step of each way."""

    def none() -> None:
        model(**batch).loss.backward()

    def taps() -> None:
        attached = attach(model, layers, range(tokens))
        loss = model(**batch).loss
        (loss + attached.take().float().square().mean()).backward()
        attached.detach()

    def hidden_states() -> None:
        output = model(**batch, output_hidden_states=True)
        rows = torch.stack([output.hidden_states[layer + 1][:, :tokens] for layer in layers])
        (output.loss + rows.float().square().mean()).backward()

    return {"none": none, "taps": taps, "hidden_states": hidden_states}


def measure(model: nn.Module, step: Callable[[], None]) -> tuple[float, int]:
    """CPU seconds of one step, and the most bytes of tensors beyond the weights in another."""
    model.zero_grad(set_to_none=True)
    begin = time.process_time()
    step()
    seconds = time.process_time() - begin
    model.zero_grad(set_to_none=True)
    with LiveBytes() as mode:
        mode.count(list(model.parameters()))
        weights = mode.live
        with mode.phase("step"):
            step()
    return seconds, mode.phases["step"].peak_bytes - weights


def compare(flags: argparse.Namespace, checkpointing: bool) -> dict[str, object]:
    """Medians of all ways, and their ratios to the step without alignment."""
    torch.manual_seed(0)
    model = build(flags.width, flags.blocks, flags.side)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(flags.batch_size, flags.side, flags.text)
    layers = [flags.blocks * (index + 1) // flags.taps - 2 for index in range(flags.taps)]
    ways = steps(model, batch, layers, flags.side**2)
    rows: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for way in WAYS:
        measure(model, ways[way])  # warm-up
    for _ in range(flags.rounds):
        for way in WAYS:
            rows[way].append(measure(model, ways[way]))
    result: dict[str, Any] = {
        way: {
            "cpu_s": round(statistics.median(seconds for seconds, _ in rows[way]), 3),
            "peak_mb": round(statistics.median(size for _, size in rows[way]) / 1e6, 1),
        }
        for way in WAYS
    }
    for way in WAYS[1:]:
        for name in ("cpu_s", "peak_mb"):
            result[way][f"{name}_ratio"] = round(result[way][name] / result["none"][name], 3)
    return result


def main() -> None:
    """Print the table and write it to benchmarks/results/taps.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 256, "blocks": 12, "side": 16, "text": 32, "batch_size": 2, "taps": 4, "rounds": 7}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "taps.json")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    results = {f"checkpointing_{mode}".lower(): compare(flags, mode) for mode in (False, True)}
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    sizes = {name: getattr(flags, name) for name in defaults}
    content = json.dumps({"benchmark": "taps", "flags": sizes, "machine": machine, **results}, indent=2)
    flags.out.write_text(content + "\n")
    print(content)


if __name__ == "__main__":
    main()
