"""One rank of tests/integration/test_ddp.py: gradients of one step, before and after averaging, as norms in a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.join import FinetuneConfig, build_alignment, plan_alignment
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import L1Objective
from prismatic.training.run import TrainingRun


def _norms(module: torch.nn.Module) -> dict[str, float]:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}


def main(student: str, teacher: str, data: str, out: str) -> None:
    """Build the run exactly as the script does, take one backward pass without and one with synchronization."""
    config = FinetuneConfig(
        vla_path=student,
        vggt_path=teacher,
        data_root_dir=Path(data),
        run_root_dir=Path(out) / "runs",
        num_images_in_input=2,
        use_proprio=True,
        batch_size=2,
        num_workers=0,
        lora_rank=4,
        mixed_precision="no",
        trackers="none",
    )
    align, teacher_dim = plan_alignment(config)
    run = TrainingRun(config, asdict(config))
    alignment, targets = build_alignment(run, align, teacher_dim)
    module = TrainableVLA(run.parts, L1Objective(run.platform), alignment, auxiliary_coeff=align.coeff)
    # LoRA starts with B = 0, for which A has no gradient.
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    wrapped = run.accelerator.prepare(module)
    loader = run._loader(run.dataset)
    draws = next(iter(loader._sampler))
    batch = next(iter(loader))
    rank = run.accelerator.process_index
    with run.accelerator.no_sync(wrapped):
        run.accelerator.backward(wrapped(dict(batch), targets(batch)).loss)
    local = _norms(module)
    module.zero_grad(set_to_none=True)
    run.accelerator.backward(wrapped(dict(batch), targets(batch)).loss)
    report = {"frames": [list(draw) for draw in draws], "local": local, "synchronized": _norms(module)}
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(report))
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
