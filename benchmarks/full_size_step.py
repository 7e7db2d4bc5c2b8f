"""One ROCKET training step at real size on a CPU: OpenVLA-7B, VGGT-1B, ten layer pairs, LoRA of rank 32, in bf16.

    python benchmarks/full_size_step.py --work_dir /tmp/full_size           17 GB of disk, 24 GiB of memory, minutes
    python benchmarks/full_size_step.py --work_dir /tmp/full_size --llm_blocks 2 --vision_blocks 3 --teacher_blocks 3

Weights are random; they are written once to `--work_dir` in the checkpoints' layout and mapped from there, so that
frozen weights are pages that the kernel may drop when memory is short. The step goes through what `finetune.py` uses:
load_vla, build_parts, TrainableVLA, MultiLayerAlignment, VGGTTeacher, make_optimizer, Trainer.train_step in accelerate.

Written to `--out`: time and peak memory of every phase, bytes of every component, losses, machine.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.full_size import Sizes
    from benchmarks.memory_probe import MemoryProbe
    from prismatic.training.loop import Trainer
    from prismatic.training.module import TrainableVLA
    from prismatic.util.tensor_files import TensorSpec
    from prismatic.vla.batch import Batch

SHARD_BYTES = 2 * 10**9


@dataclass
class StepConfig:
    # Folder for the random weights (17 GB at full size); needed
    work_dir: str = limited("", needed="a folder on a local disk with 18 GB free")
    out: str = "benchmarks/results/full_size_step.json"  # Results file
    batch_size: int = limited(1, least=1)
    views: int = limited(2, least=1)  # Camera views of 224 pixels
    prompt_tokens: int = limited(40, least=1)  # Tokens of the instruction, BOS among them
    lora_rank: int = limited(32, least=1)
    gradient_checkpointing: bool = True
    steps: int = limited(1, least=1)  # Steps to measure; from the second on, the optimizer's state exists
    llm_blocks: int = limited(32, least=1)  # Fewer: a try of the script at the real widths
    vision_blocks: int = limited(0, least=0)  # Blocks of each vision model; 0: all (24 and 27)
    teacher_blocks: int = limited(24, least=1)
    num_threads: int = limited(0, least=0)  # Threads of torch; 0: as torch chooses
    seed: int = limited(0, least=0)
    keep_weights: bool = False  # Leave the random weights in work_dir for the next time


def main(config: StepConfig) -> int:
    """Write weights, run and measure, write the results; returns 0."""
    _be_modest()
    import torch

    from benchmarks.full_size import Sizes

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    sizes = Sizes(config.llm_blocks, config.vision_blocks or None, config.teacher_blocks)
    work_dir = Path(config.work_dir).expanduser()
    try:
        student, teacher = write_weights(sizes, work_dir)
        results = measure(config, sizes, student, teacher)
    finally:
        if not config.keep_weights:
            for name in ("student", "teacher"):
                shutil.rmtree(work_dir / name, ignore_errors=True)
    report(config.out, config, sizes, results)
    return 0


def _be_modest() -> None:
    """Be the one that ends if a shared machine runs out of memory, and give freed memory back at once.

    glibc keeps freed blocks below a limit that grows to 32 MB; activations of 5 to 14 MB would pile up as unused heap.
    """
    Path("/proc/self/oom_score_adj").write_text("1000")
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def write_weights(sizes: Sizes, folder: Path) -> tuple[Path, Path]:
    """Random bf16 checkpoints of both models, one tensor in memory at a time; those that are there already are kept."""
    import torch

    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from rocket_align import VGGTTeacher

    student, teacher = folder / "student", folder / "teacher"
    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(sizes.student())
        vggt = VGGTTeacher(sizes.teacher(), [sizes.teacher_blocks - 1])
    for path, module, save_config in (
        (student, vla, lambda: vla.config.save_pretrained(student)),
        (teacher, vggt, lambda: (teacher / "config.json").write_text(vggt.config.to_json())),
    ):
        _write_model(path, module, SHARD_BYTES if path is student else 10**12, save_config)
    return student, teacher


def _write_model(path: Path, module: nn.Module, shard_bytes: int, save_config: Callable[[], object]) -> None:
    """config.json and weights of the shapes of `module`; the configuration comes last and says that all is there."""
    from prismatic.util.files import read_json
    from prismatic.util.tensor_files import TensorSpec, write_model

    tensors = module.state_dict()
    import torch

    specs = [TensorSpec(name, tuple(value.shape), torch.bfloat16) for name, value in tensors.items()]
    count = sum(spec.num_bytes for spec in specs)
    stamp = path / "written.json"
    if stamp.is_file() and read_json(stamp) == {"num_bytes": count}:
        return
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if shutil.disk_usage(path).free < count:
        raise UsageError(f"--work_dir: {path} has too little space; accepted: a folder with {count / 1e9:.0f} GB free")
    print(f"writing {count / 1e9:.1f} GB of random weights: {path}", flush=True)
    by_name = {spec.name: spec for spec in specs}
    write_model(path, specs, lambda name: _random_weight(by_name[name]), shard_bytes)
    save_config()
    stamp.write_text(f'{{"num_bytes": {count}}}\n')


def _random_weight(spec: TensorSpec) -> torch.Tensor:
    """Values that keep activations finite: gains 1, biases 0, matrices normal with deviation 0.02."""
    import torch

    values = torch.empty(spec.shape, dtype=spec.dtype)
    if len(spec.shape) == 1:
        return values.fill_(0.0 if spec.name.endswith("bias") else 1.0)
    return values.normal_(std=0.02)


def measure(config: StepConfig, sizes: Sizes, student: Path, teacher_folder: Path) -> dict[str, Any]:
    """Build everything as training does, run the steps, and return what was measured."""
    import torch
    from accelerate import Accelerator

    from benchmarks.full_size import build_module, make_batch, teacher_targets, training_config
    from benchmarks.memory_probe import MemoryProbe, resident_memory
    from prismatic.checkpoint.folder import StartingPoint
    from prismatic.checkpoint.load import build_parts, load_for_training
    from prismatic.vla.platforms import LIBERO
    from rocket_align import VGGTTeacher

    training = training_config(
        config.batch_size, gradient_checkpointing=config.gradient_checkpointing, lora_rank=config.lora_rank
    )
    align = sizes.alignment()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    before = resident_memory()
    with MemoryProbe() as probe:
        probe.enter("load student, add LoRA and heads")
        start = StartingPoint(str(student), None, 0)
        vla = load_for_training(training, start, LIBERO, torch.bfloat16)
        vla.vision_backbone.set_num_images_in_input(config.views)
        parts = build_parts(training, start, vla, LIBERO)
        probe.enter("load teacher, build alignment")
        teacher = VGGTTeacher.from_pretrained(teacher_folder, align.teacher_layers, dtype=torch.bfloat16)
        module = build_module(parts, align, teacher.embed_dim)
        trainer = _make_trainer(training, accelerator, module, teacher_targets(teacher), probe)
        probe.enter(None)
        gc.collect()
        loaded = resident_memory()
        batch = make_batch(config.batch_size, config.views, config.prompt_tokens)
        losses = []
        trainer.module.train()
        for step in range(1, config.steps + 1):
            probe.suffix = f", step {step}" if step > 1 else ""
            trainer.train_step(iter([cast(Any, dict(batch))]))
            probe.enter(None)
            losses.append(trainer._averages.pop(accelerator))
    return {
        "components": _components(module, teacher, trainer),
        "memory": {"python and libraries": before, "models loaded": loaded},
        "phases": probe.to_dict(),
        "losses": losses,
        "sequence": {
            "llm": batch["input_ids"].shape[1] + module._num_vision_tokens() + 1,  # One token of proprio
            "teacher": (teacher.config.grid_size**2 + teacher.config.num_special_tokens)
            * config.views
            * config.batch_size,
        },
    }


def _make_trainer(training: Any, accelerator: Any, module: TrainableVLA, targets: Any, probe: MemoryProbe) -> Trainer:
    """The real trainer, with the probe told where teacher, forward, backward and optimizer begin."""
    from prismatic.training.engine import Engine
    from prismatic.training.loop import Trainer
    from prismatic.training.metrics import MetricLog
    from prismatic.training.schedule import make_optimizer

    optimizer, scheduler = make_optimizer(module.trainable_parameters(), training)
    engine = Engine(accelerator)
    engine.prepare(module, optimizer)

    def timed_targets(batch: Batch) -> object:
        probe.enter("teacher forward")
        return targets(batch)

    engine.module.register_forward_pre_hook(lambda *_: probe.enter("student forward"))
    engine.module.register_forward_hook(lambda *_: probe.enter("backward"))
    optimizer.register_step_pre_hook(lambda *_: probe.enter("optimizer"))
    with tempfile.TemporaryDirectory() as folder:
        log = MetricLog(Path(folder), accelerator)
    return Trainer(
        training,
        engine,
        scheduler=scheduler,
        targets=timed_targets,
        save=lambda step: None,
        log=log,
    )


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _components(module: TrainableVLA, teacher: nn.Module, trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Parameters and bytes of each part: weights, and of those that train gradients and optimizer state."""
    import torch

    parts: dict[str, Any] = {
        name: getattr(module, name) for name in ("vla", "action_head", "proprio_projector", "align_projectors")
    }
    parts["teacher"] = teacher
    state = trainer.engine.optimizer.state
    report = {}
    for name, part in parts.items():
        parameters = list(part.parameters())
        trains = [parameter for parameter in parameters if parameter.requires_grad]
        moments = [value for p in trains for value in state.get(p, {}).values() if isinstance(value, torch.Tensor)]
        report[name] = {
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in trains),
            "frozen_bytes": _num_bytes(p for p in parameters if not p.requires_grad),
            "trainable_bytes": _num_bytes(trains),
            "gradient_bytes": _num_bytes(p for p in trains if p in state),
            "optimizer_bytes": _num_bytes(moments),
        }
    return report


def report(path: str, config: StepConfig, sizes: Sizes, results: dict[str, Any]) -> None:
    """The results file, and a few lines of it on the terminal."""
    import torch

    from benchmarks.memory_probe import machine, write_results

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {**machine(), "threads": torch.get_num_threads(), "memory_bytes": memory}
    write_results(path, "full_size_step", vars(config), {"sizes": vars(sizes), "machine": facts, **results})
    for name, phase in results["phases"].items():
        print(
            f"{name:34s} {phase['seconds']:7.1f} s   anonymous {phase['peak_anonymous'] / 2**30:6.2f} GiB"
            f"   mapped {phase['peak_file'] / 2**30:6.2f} GiB"
        )
    print(f"losses: {results['losses'][-1]}")


if __name__ == "__main__":
    run(StepConfig, main)
