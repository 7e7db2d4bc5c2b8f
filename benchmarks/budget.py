"""Predict memory and operations of a training step of OpenVLA-7B with VGGT-1B, from the code itself.

    python benchmarks/budget.py                                          batch 1, 4, 8 with and without checkpointing
    python benchmarks/budget.py --processes 8 --use_lora False           full fine-tuning, sharded over 8 GPUs
    python benchmarks/budget.py --measured benchmarks/results/full_size_step.json      and set beside a measured step

The training module runs forward and backward at full size on fake tensors: shapes and types pass through every
operator, nothing is computed. So the prediction follows each change of the code. Minutes on one core, 2 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.util.cli import run
from prismatic.util.files import read_json
from prismatic.util.flags import limited, names, numbers, split_names, split_numbers
from rocket_align.config import RECIPES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.full_size import Sizes
    from prismatic.training.module import TrainableVLA
    from rocket_align import VGGTTeacher

# Reported by users for one 80 GB GPU: OpenVLA-OFT's LoRA training, and the same with a VGGT teacher (GB by batch size).
PUBLISHED = {"baseline": {1: 25, 8: 62}, "rocket": {1: 30, 8: 74}}
# What a process holds on a GPU beside tensors: CUDA context, libraries' work spaces, the allocator's rounding.
FORWARD_PHASES = ("teacher forward", "student forward")
OVERHEAD_BYTES = 1_500_000_000
GPU_BYTES = {"40 GB": 40 * 10**9, "80 GB": 80 * 10**9}


class CaseFlags(Protocol):
    """Flags of a measured or predicted step."""

    views: int
    prompt_tokens: int
    lora_rank: int


class Row(TypedDict):
    """Predicted memory and operations of a step."""

    recipe: str
    pairs: int
    batch_size: int
    gradient_checkpointing: bool
    weights_bytes: dict[str, int]
    gradient_bytes: int
    optimizer_bytes: int
    kept_for_backward_bytes: int
    peak_bytes: int
    phases: dict[str, dict[str, int]]
    flops: int
    fits: dict[str, bool]


@dataclass
class BudgetConfig:
    batch_sizes: str = numbers("1,4,8", some=True, least=1)  # Comma list
    # Comma list: rocket | shared | naive | spatial_forcing | baseline
    recipes: str = names("rocket,baseline", some=True, choices=tuple(RECIPES))
    views: int = limited(2, least=1)  # Camera views of 224 pixels
    prompt_tokens: int = limited(40, least=1)  # Tokens of the instruction, BOS among them
    lora_rank: int = limited(32, least=1)
    llm_blocks: int = limited(32, least=1)  # Fewer: for a measured step of a smaller depth
    vision_blocks: int = limited(0, least=0)  # Blocks of each vision model; 0: all
    teacher_blocks: int = limited(24, least=1)
    use_lora: bool = True  # False trains every weight of the model
    processes: int = limited(1, least=1)  # Processes that --shard fsdp divides the model among; the peak is that of one
    shard_teacher: bool = False  # They divide the teacher too
    measured: str = ""  # Results of full_size_step.py to compare with; its sizes and flags go before those given here
    out: str = "benchmarks/results/budget.json"  # Results file


def main(config: BudgetConfig) -> int:
    """Predict, print the table, write the results; returns 0."""
    from benchmarks.full_size import Sizes
    from benchmarks.memory_probe import write_results

    batch_sizes, recipes = split_numbers("--batch_sizes", config.batch_sizes), split_names(config.recipes)
    measured = read_json(Path(config.measured)) if config.measured else None
    sizes = Sizes(config.llm_blocks, config.vision_blocks or None, config.teacher_blocks)
    rows = [
        predict(sizes, config, batch_size=batch, gradient_checkpointing=checkpointing, recipe=recipe)
        for recipe in recipes
        for checkpointing in (True, False)
        for batch in batch_sizes
    ]
    results: dict[str, object] = {"rows": rows}
    print_table(rows)
    if measured is not None:
        results["against_measured"] = compare_with_measured(measured, config)
    results["against_published"] = compare_with_published(rows)
    write_results(config.out, "budget", vars(config), results)
    return 0


def predict(
    sizes: Sizes, config: CaseFlags, *, batch_size: int, gradient_checkpointing: bool, recipe: str = "rocket"
) -> Row:
    """Bytes and operations of one step; `config` gives views, prompt_tokens and lora_rank."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.full_size import make_batch, teacher_targets
    from benchmarks.live_bytes import LiveBytes
    from rocket_align.pooling import sine_position_embedding

    align = sizes.alignment(recipe)
    module, teacher = build(sizes, config, gradient_checkpointing=gradient_checkpointing, recipe=recipe)
    tracker = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        module.to_empty(device="cpu").train()
        batch = make_batch(batch_size, config.views, config.prompt_tokens)
        tracker.count([*module.parameters(), *module.buffers()])
        if teacher is not None:
            teacher.to_empty(device="cpu")
            tracker.count([*teacher.parameters(), *teacher.buffers()])
        resident = tracker.live
        with torch.autocast("cpu", dtype=torch.bfloat16):
            targets = None
            with tracker.phase("teacher forward"):
                if teacher is not None:
                    with torch.no_grad():
                        targets = teacher_targets(teacher)(batch)
            with tracker.phase("student forward"):
                output = module(batch, targets)
        kept = tracker.live - resident
        with tracker.phase("backward"):
            output.loss.backward()
    sine_position_embedding.cache_clear()  # It has no values, and a later call would get it.
    trained = [p for p in module.parameters() if p.grad is not None]
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    # AdamW's two moments, which exist from the first step's end on.
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)
    weights = _weights(module, teacher)
    peak = max(phase.peak_bytes for phase in tracker.phases.values()) + moments
    if (processes := getattr(config, "processes", 1)) > 1:
        activations = max(kept, *(tracker.phases[name].peak_bytes - resident for name in FORWARD_PHASES))
        divided = [module, teacher] if teacher is not None and getattr(config, "shard_teacher", False) else [module]
        whole = resident - sum(parameter_bytes(part) for part in divided)
        peak = whole + activations + sum(sharded_bytes(part, processes) for part in divided)
    return {
        "recipe": recipe,
        "pairs": align.num_pairs,
        "batch_size": batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "weights_bytes": weights,
        "gradient_bytes": gradients,
        "optimizer_bytes": moments,
        "kept_for_backward_bytes": kept,
        "peak_bytes": peak,
        "phases": {name: vars(phase) for name, phase in tracker.phases.items()},
        "flops": sum(phase.flops for phase in tracker.phases.values()),
        "fits": {name: peak + OVERHEAD_BYTES <= size for name, size in GPU_BYTES.items()},
    }


def build(
    sizes: Sizes,
    config: CaseFlags,
    *,
    gradient_checkpointing: bool,
    recipe: str,
    device: str | torch.device = "meta",
    dtype: torch.dtype | None = None,
) -> tuple[TrainableVLA, VGGTTeacher | None]:
    """The module that a GPU trains (base weights of `dtype`, by default bf16; what trains float32), and the teacher.

    Weights are random on a real device, and without data on meta.
    """
    import torch

    from benchmarks.full_size import build_module, training_config
    from prismatic.checkpoint.folder import StartingPoint
    from prismatic.checkpoint.load import build_parts, prepare_for_training
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.vla.platforms import LIBERO
    from rocket_align import VGGTTeacher

    use_lora = getattr(config, "use_lora", True)
    training = training_config(1, gradient_checkpointing=gradient_checkpointing, lora_rank=config.lora_rank)
    training.use_lora = use_lora
    align = sizes.alignment(recipe)
    dtype = dtype or torch.bfloat16
    with torch.device(device):
        base: Any = OpenVLAForActionPrediction(sizes.student())
        for parameter in base.parameters():  # Not buffers: rotary positions stay float32.
            parameter.data = parameter.data.to(dtype if use_lora else torch.float32)
        vla = prepare_for_training(base, training, LIBERO)
        vla.vision_backbone.set_num_images_in_input(config.views)
        parts = build_parts(training, StartingPoint("", None, 0), vla, LIBERO)
        teacher = VGGTTeacher(sizes.teacher(), align.teacher_layers) if align.num_pairs else None
        module = build_module(parts, align, sizes.teacher().embed_dim)
    return module, None if teacher is None else teacher.to(dtype)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def sharded_bytes(module: nn.Module, processes: int) -> int:
    """Most bytes of weights, gradients and AdamW's moments in one of the processes that FSDP divides a module among.

    Beside its part of all of them, a process has the weights outside of the blocks, gathered, and two blocks: the one
    at work and the next, with their gradients. float32 weights that train in blocks are gathered as bf16 where no
    weight of the module is bf16 already, which is full fine-tuning.
    """
    import torch

    from prismatic.training.engine import blocks

    trains_all = not any(p.dtype == torch.bfloat16 for p in module.parameters())

    def gathered(parameters: list[nn.Parameter]) -> int:
        weights = sum(p.numel() * (2 if trains_all else p.element_size()) for p in parameters)
        return weights + sum(p.numel() * (2 if trains_all else 4) for p in parameters if p.requires_grad)

    in_blocks = [list(block.parameters()) for block in blocks(module)]
    known = {id(p) for parameters in in_blocks for p in parameters}
    outside = [p for p in module.parameters() if id(p) not in known]
    trains = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    part = -(-(parameter_bytes(module) + 3 * trains) // processes)
    return part + gathered(outside) + 2 * max(map(gathered, in_blocks), default=0)


def _weights(module: TrainableVLA, teacher: nn.Module | None) -> dict[str, int]:
    """Bytes of the weights by component; what trains is float32."""
    parts = {"student": module.vla, "action_head": module.action_head, "proprio_projector": module.proprio_projector}
    parts |= {"align_projectors": module.align_projectors, "teacher": teacher}
    return {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in parts.items()
        if part is not None
    }


def print_table(rows: Sequence[Row]) -> None:
    """One line a case."""
    print("recipe    batch  checkpointing  peak GB  kept for backward GB  TFLOP  fits 40 GB  fits 80 GB")
    for row in rows:
        fits = [("yes" if row["fits"][name] else "no") for name in GPU_BYTES]
        print(
            f"{row['recipe']:9s} {row['batch_size']:5d}  {'yes' if row['gradient_checkpointing'] else 'no':13s}  "
            f"{row['peak_bytes'] / 1e9:7.1f}  {row['kept_for_backward_bytes'] / 1e9:20.1f}  "
            f"{row['flops'] / 1e12:5.1f}  {fits[0]:10s}  {fits[1]}"
        )


def compare_with_measured(measured: dict[str, Any], config: BudgetConfig) -> dict[str, Any]:
    """The prediction for the case of `full_size_step.py` beside what it measured.

    Compared is what a step adds to the weights, which on that CPU are partly mapped files: the growth of anonymous
    memory over the models as loaded.
    """
    from benchmarks.full_size import Sizes

    flags = measured["flags"]
    row = predict(
        Sizes(**measured["sizes"]),
        BudgetConfig(**{field.name: flags[field.name] for field in fields(BudgetConfig) if field.name in flags}),
        batch_size=flags["batch_size"],
        gradient_checkpointing=flags["gradient_checkpointing"],
    )
    resident = sum(row["weights_bytes"].values())
    loaded = measured["memory"]["models loaded"]["anonymous"]
    report: dict[str, Any] = {"predicted_weights_bytes": resident}
    for name, phase in row["phases"].items():
        report[name] = {
            "predicted_bytes_over_weights": phase["peak_bytes"] - resident,
            "measured_bytes_over_weights": measured["phases"][name]["peak_anonymous"] - loaded,
            "flops": phase["flops"],
            "measured_seconds": measured["phases"][name]["seconds"],
        }
    for name in row["phases"]:
        entry = report[name]
        print(
            f"{name}: predicted {entry['predicted_bytes_over_weights'] / 1e9:.2f} GB over the weights, measured "
            f"{entry['measured_bytes_over_weights'] / 1e9:.2f}; {entry['flops'] / 1e12:.1f} TFLOP in "
            f"{entry['measured_seconds']:.0f} s"
        )
    return report


def compare_with_published(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Predictions without checkpointing beside the figures that users of OpenVLA-OFT and of ROCKET report."""
    report = []
    for row in rows:
        published = PUBLISHED.get(row["recipe"], {}).get(row["batch_size"])
        if published is None or row["gradient_checkpointing"]:
            continue
        predicted = (row["peak_bytes"] + OVERHEAD_BYTES) / 1e9
        report.append(
            {
                "recipe": row["recipe"],
                "batch_size": row["batch_size"],
                "published_gb": published,
                "predicted_gb": round(predicted, 1),
                "off_by_percent": round(100 * (predicted / published - 1), 1),
            }
        )
        print(
            f"{row['recipe']} at batch {row['batch_size']}: {predicted:.1f} GB predicted with overhead, "
            f"{published} GB published ({report[-1]['off_by_percent']:+.0f}%)"
        )
    return report


if __name__ == "__main__":
    run(BudgetConfig, main)
