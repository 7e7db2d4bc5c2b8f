"""Measure on one GPU of 80 GB or more, with nothing but this checkout: random weights of real size, no network.

    python benchmarks/gpu.py                                       all of it, on the first GPU
    python benchmarks/gpu.py --device cpu --narrow True --llm_blocks 2 --vision_blocks 2 --teacher_blocks 2     its path

Steps of OpenVLA-7B (LoRA) with VGGT-1B: seconds and peak memory by batch, with and without alignment, with features as
stored ones come, checkpointing and compiled blocks; beside budget.py's prediction of memory and operations, and beside
the card's own rate of bf16 matrix products. Further: losses in bf16 against float32, the mini student on the GPU
against the CPU, and samples a second of the loader.

The results file is written after every part. A part that fails leaves its error there, and the others run; a part that
`--minutes` leaves no time for is cut off and listed as left out. Ends with 1 where a part failed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.time_limit import time_limit
from prismatic.util.cli import run
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import refuse_no_file
from prismatic.util.flags import limited, numbers, split_numbers

if TYPE_CHECKING:
    import torch

    from benchmarks.budget import Row
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
    minutes: float = limited(8.0, above=0)  # All of it is over by then
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

    def __str__(self) -> str:
        kinds = [kind for kind in ("checkpointing", "stored", "compiled") if getattr(self, kind)]
        return " ".join([f"{self.recipe:9s} batch {self.batch_size}", *kinds])


class Report:
    """Runs the parts of a benchmark, keeps what each gives, and writes all of it after each.

    Args:
        config: `minutes` that all parts together may take from now on, `out` to write to.
    """

    def __init__(self, config: GpuConfig) -> None:
        self._config, self._began = config, time.monotonic()
        self.results: dict[str, Any] = {"steps": [], "left_out": [], "failed": {}}

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work`; returns what it gives, or None where it fails or there is no time."""
        value = None
        try:
            if (left := 60 * self._config.minutes - self._seconds()) <= 0:
                raise TimeoutError
            with time_limit(left):
                value = work()
        except TimeoutError:
            self.results["left_out"].append(name)
            print(f"{name}: left out, no time", flush=True)
        except Exception as error:  # Of one part; the others have their own.
            self.results["failed"][name] = f"{type(error).__name__}: {one_line(error, 500)}"
            print(f"{name}: failed, {self.results['failed'][name]}", flush=True)
        self.write()
        return value

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def write(self, *, last: bool = False) -> None:
        """Write what there is so far."""
        from benchmarks.memory_probe import write_results

        content = self.results | {"seconds": round(self._seconds(), 1)}
        write_results(self._config.out, "gpu", vars(self._config), content, say=last)


def main(config: GpuConfig) -> int:
    """Measure, print, write the results; returns 1 where a part failed."""
    refuse_no_file("--out", config.out)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    report = Report(config)
    import torch

    from benchmarks.full_size import Sizes
    from benchmarks.memory_probe import machine

    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device: cuda found, but no GPU is here; accepted: a machine with one, or cpu")
    device = torch.device(config.device)
    torch.manual_seed(0)
    sizes = Sizes(config.llm_blocks, config.vision_blocks or None, config.teacher_blocks, config.narrow)
    results = report.results
    results |= {"sizes": vars(sizes), "machine": machine() | {"card": report.part("card", lambda: card(device))}}
    results["matmul_tflops"] = report.part("matmul rate", lambda: matmul_rate(device))
    results["mini_student"] = report.part("mini student", lambda: compare_mini(device))
    results["losses"] = report.part("losses", lambda: compare_losses(config, device))
    wanted = cases(split_numbers("--batch_sizes", config.batch_sizes))
    predictions: dict[StepCase, Row] = {}
    report.part("predictions", lambda: predictions.update(predict_cases(wanted, config, sizes)))
    for case in wanted:
        measured = report.part(str(case), lambda case=case: measure(case, config, sizes, device))  # type: ignore[misc]
        if measured is not None:
            row = vars(case) | measured | beside_prediction(measured, predictions.get(case), results["matmul_tflops"])
            results["steps"].append(row)
            print(describe_row(case, row), flush=True)
    results["loader_samples_per_second"] = report.part("loader", lambda: loader_rate(config))
    for name in ("matmul_tflops", "losses", "mini_student", "loader_samples_per_second"):
        print(f"{name}: {results[name]}")
    report.write(last=True)
    return int(bool(results["failed"]))


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
        torch.compiler.reset()  # What it compiled keeps weights alive.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "seconds": seconds,
        "samples_per_second": case.batch_size / seconds,
        "peak_bytes": peak,
        "loss": loss,
    }


def predict_cases(wanted: list[StepCase], config: GpuConfig, sizes: Sizes) -> Iterator[tuple[StepCase, Row]]:
    """Cases with what budget.py predicts of them, some at a time, each in its own process (2 GB, 10 s of a core)."""
    plain = [case for case in wanted if not (case.stored or case.compiled)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(4, os.cpu_count() or 1, len(plain))) as pool:
        yield from pool.imap(_predict, [(case, config, sizes) for case in plain])


def _predict(job: tuple[StepCase, GpuConfig, Sizes]) -> tuple[StepCase, Row]:
    from benchmarks.budget import predict

    case, config, sizes = job
    budget = predict(
        sizes, config, batch_size=case.batch_size, gradient_checkpointing=case.checkpointing, recipe=case.recipe
    )
    return case, budget


def beside_prediction(measured: dict[str, Any], budget: Row | None, matmul_tflops: float | None) -> dict[str, float]:
    """Predicted bytes and operations of a measured step, and the part of the matmul rate that it reached."""
    from benchmarks.budget import OVERHEAD_BYTES

    if budget is None:
        return {}
    facts: dict[str, float] = {
        "predicted_peak_bytes": budget["peak_bytes"],
        "overhead_bytes": OVERHEAD_BYTES,
        "flops": budget["flops"],
    }
    if "seconds" in measured and matmul_tflops:
        facts["flop_utilization"] = budget["flops"] / measured["seconds"] / 1e12 / matmul_tflops
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
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is not torch.float32)
        # Without this, convolutions of float32 on a GPU round to ten bits.
        with torch.no_grad(), autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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


def describe_row(case: StepCase, row: dict[str, Any]) -> str:
    """One line of a case."""
    predicted = f" ({row['predicted_peak_bytes'] / 1e9:.1f} predicted)" if "predicted_peak_bytes" in row else ""
    if row.get("out_of_memory"):
        return f"{case!s:40s} out of memory{predicted}"
    memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.1f} GB"
    used = f"  {row['flop_utilization']:.0%} of the matmul rate" if "flop_utilization" in row else ""
    return f"{case!s:40s} {row['seconds']:7.3f} s{memory}{predicted}{used}"


if __name__ == "__main__":
    run(GpuConfig, main)
