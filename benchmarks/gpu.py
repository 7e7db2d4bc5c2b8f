"""Measure on one GPU of 80 GB or more, with nothing but this checkout: random weights of real size, no network.

    python benchmarks/gpu.py                                       all of it, on the first GPU
    python benchmarks/gpu.py --device cpu --narrow True --llm_blocks 2 --vision_blocks 2 --teacher_blocks 2     its path

Steps of OpenVLA-7B (LoRA) with VGGT-1B: seconds and peak memory by batch, with and without alignment, with features as
stored ones come, checkpointing and compiled blocks; beside budget.py's prediction of memory and operations, and beside
the card's own rate of bf16 matrix products. Further: losses in bf16 against float32, the mini student on the GPU
against the CPU, and samples a second of the loader. Cases that `--minutes` leaves no time for are listed as left out.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited, numbers, split_numbers

if TYPE_CHECKING:
    import torch

    from benchmarks.full_size import Sizes

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class GpuConfig:
    device: str = "cuda"  # cpu: tries the script
    batch_sizes: str = numbers("1,8", some=True, least=1)  # Comma list
    views: int = limited(2, least=1)  # Camera views of 224 pixels
    prompt_tokens: int = limited(40, least=1)  # Tokens of the instruction, BOS among them
    lora_rank: int = limited(32, least=1)
    steps: int = limited(5, least=1)  # Measured steps of a case, after two others
    minutes: float = limited(8.0, above=0)  # No case begins after this time
    llm_blocks: int = limited(32, least=2)
    vision_blocks: int = limited(0, least=0)  # Blocks of each vision model; 0: all
    teacher_blocks: int = limited(24, least=2)
    narrow: bool = False  # Widths of a few dozens, to try the script
    loader_samples: int = limited(400, least=1)
    out: str = "benchmarks/results/gpu.json"  # Results file


@dataclass(frozen=True)
class StepCase:
    """One step to measure. `stored`: the teacher's features are given, as a feature store gives them."""

    recipe: str
    batch_size: int
    checkpointing: bool
    stored: bool = False
    compiled: bool = False


def main(config: GpuConfig) -> int:
    """Measure, print, write the results; returns 0."""
    import torch

    from benchmarks.full_size import Sizes
    from benchmarks.memory_probe import machine, write_results

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device: cuda found, but no GPU is here; accepted: a machine with one, or cpu")
    began = time.monotonic()
    device = torch.device(config.device)
    torch.manual_seed(0)
    sizes = Sizes(config.llm_blocks, config.vision_blocks or None, config.teacher_blocks, config.narrow)
    results: dict[str, Any] = {"machine": machine() | {"card": card(device)}, "matmul_tflops": matmul_rate(device)}
    results["loader_samples_per_second"] = loader_rate(config)
    results["losses"] = compare_losses(config, device)
    results["mini_student"] = compare_mini(device)
    rows: list[dict[str, Any]] = []
    left_out = []
    for case in cases(split_numbers("--batch_sizes", config.batch_sizes)):
        if time.monotonic() - began > 60 * config.minutes:
            left_out.append(vars(case))
        else:
            rows.append(vars(case) | measure(case, config, sizes, device))
    for row in rows:  # The GPU is not needed any more.
        row |= predicted(row, config, sizes, results["matmul_tflops"])
        print_row(row)
    results |= {"steps": rows, "left_out": left_out, "sizes": vars(sizes)}
    write_results(config.out, "gpu", vars(config), results)
    return 0


def cases(batch_sizes: tuple[int, ...]) -> list[StepCase]:
    """The steps to measure, what matters most first."""
    plain = [
        StepCase(recipe, batch, checkpointing)
        for checkpointing in (False, True)
        for batch in batch_sizes
        for recipe in ("rocket", "baseline")
    ]
    more = [StepCase("rocket", batch, False, stored, not stored) for batch in batch_sizes for stored in (True, False)]
    return plain + more


def card(device: torch.device) -> dict[str, object]:
    """Name and memory of the GPU; of a CPU only that it is one."""
    import torch

    if device.type != "cuda":
        return {"name": "cpu"}
    facts = torch.cuda.get_device_properties(device)
    return {"name": facts.name, "memory_bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}"}


def seconds_of(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one call, mean of `times`."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def matmul_rate(device: torch.device) -> float:
    """TFLOP a second of bf16 products of square matrices, after a warm-up."""
    import torch

    side = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds_of(lambda: matrix @ matrix, device, 5)
    return 2 * side**3 / seconds_of(lambda: matrix @ matrix, device, 20) / 1e12


def measure(case: StepCase, config: GpuConfig, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Seconds, peak bytes and loss of a step, or that memory does not suffice."""
    import torch

    try:
        seconds, peak, loss = run_steps(case, config, sizes, device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "seconds": seconds,
        "samples_per_second": case.batch_size / seconds,
        "peak_bytes": peak,
        "loss": loss,
    }


def predicted(row: dict[str, Any], config: GpuConfig, sizes: Sizes, matmul_tflops: float) -> dict[str, Any]:
    """Bytes and operations that budget.py predicts of a measured step, and the part of the matmul rate it reached."""
    from benchmarks.budget import OVERHEAD_BYTES, predict

    if row["stored"] or row["compiled"]:
        return {}
    budget = predict(
        sizes,
        config,
        batch_size=row["batch_size"],
        gradient_checkpointing=row["checkpointing"],
        recipe=row["recipe"],
    )
    facts = {"predicted_peak_bytes": budget["peak_bytes"], "overhead_bytes": OVERHEAD_BYTES, "flops": budget["flops"]}
    if "seconds" in row:
        facts["flop_utilization"] = budget["flops"] / row["seconds"] / 1e12 / matmul_tflops
    return facts


def run_steps(case: StepCase, config: GpuConfig, sizes: Sizes, device: torch.device) -> tuple[float, int | None, float]:
    """Seconds a step, peak bytes of the GPU (None on a CPU) and the last loss, as `Trainer.train_step` takes a step."""
    import torch

    from benchmarks.budget import build
    from benchmarks.full_size import make_batch, teacher_targets, training_config
    from prismatic.training.schedule import make_optimizer

    module, teacher = build(sizes, config, gradient_checkpointing=case.checkpointing, recipe=case.recipe, device=device)
    module.train()
    if case.compiled:
        for block in [part for part in module.modules() if type(part).__name__ == "LlamaDecoderLayer"]:
            block.compile(backend="inductor" if device.type == "cuda" else "eager")
    training = training_config(case.batch_size, gradient_checkpointing=case.checkpointing, lora_rank=config.lora_rank)
    optimizer, _ = make_optimizer(module.trainable_parameters(), training)
    batch: Any = make_batch(case.batch_size, config.views, config.prompt_tokens)
    batch = {name: value.to(device) for name, value in batch.items()}

    def features() -> Any:
        if teacher is None:
            return None
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            return teacher_targets(teacher)(batch)

    kept = features() if case.stored else None
    losses = []

    def step() -> None:
        targets = kept if case.stored else features()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = module(batch, targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())

    seconds_of(step, device, 2)
    if case.stored:
        teacher = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(step, device, config.steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return seconds, peak, float(losses[-1])


def compare_losses(config: GpuConfig, device: torch.device) -> dict[str, float]:
    """First loss of one shallow model in float32 and, rounded to bf16 and under autocast, as training has it."""
    import torch

    from benchmarks.budget import build
    from benchmarks.full_size import Sizes, make_batch, teacher_targets

    sizes = Sizes(2, 2, 2, config.narrow)
    losses = {}
    batch = {name: value.to(device) for name, value in make_batch(2, config.views, config.prompt_tokens).items()}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        module, teacher = build(
            sizes, config, gradient_checkpointing=False, recipe="rocket", device=device, dtype=dtype
        )
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32):
            losses[name] = float(module.eval()(batch, teacher_targets(teacher)(batch)).loss)  # type: ignore[arg-type]
    return losses | {"relative_difference": abs(losses["bf16"] / losses["float32"] - 1)}


def compare_mini(device: torch.device) -> dict[str, float]:
    """Largest difference of the mini student's logits on the device to those on the CPU, in float32.

    What the CPU computes, the parity tests hold to the reference.
    """
    import torch

    from prismatic.checkpoint.load import load_model

    folder = ROOT / "experiments" / "mini" / "weights" / "student"
    model: Any = load_model(folder, "--vla_path", torch.float32, film=False).eval()
    size = model.config.image_sizes[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 6, size, size, generator=generator)
    ids = torch.randint(3, 100, (2, 12), generator=generator)
    logits = []
    for place in (torch.device("cpu"), device):
        moved = model.to(place)
        with torch.no_grad():
            mask = torch.ones_like(ids, dtype=torch.bool).to(place)
            logits.append(moved(ids.to(place), mask, pixels.to(place)).logits.float().cpu())
    return {"largest": float(logits[0].abs().max()), "largest_difference": float((logits[0] - logits[1]).abs().max())}


def loader_rate(config: GpuConfig) -> float:
    """Samples a second out of the data loader with a process a core, at most 8."""
    from benchmarks.loader import LoaderConfig, throughput

    workers = min(8, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        data = shutil.copytree(ROOT / "tests" / "golden" / "rlds", Path(folder) / "data")
        settings = LoaderConfig(rounds=1, frames_per_round=config.loader_samples, num_workers=workers)
        return throughput(settings, data)


def print_row(row: dict[str, Any]) -> None:
    """One line a case."""
    name = f"{row['recipe']:9s} batch {row['batch_size']}"
    name += "".join(f" {kind}" for kind in ("checkpointing", "stored", "compiled") if row[kind])
    if row.get("out_of_memory"):
        print(f"{name:40s} out of memory", flush=True)
        return
    memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.1f} GB"
    predicted = f" ({row['predicted_peak_bytes'] / 1e9:.1f} predicted)" if "predicted_peak_bytes" in row else ""
    used = f"  {row['flop_utilization']:.0%} of the matmul rate" if "flop_utilization" in row else ""
    print(f"{name:40s} {row['seconds']:7.3f} s{memory}{predicted}{used}", flush=True)


if __name__ == "__main__":
    run(GpuConfig, main)
