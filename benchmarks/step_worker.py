"""A process of step.py: builds one way to do one step, then answers each line on its input with what a step took.

    step_worker.py CASE plain|build

Without an import of this repository's root: PYTHONPATH, one folder, says which build is measured.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch
from step_models import (
    CASES,
    Case,
    fill,
    fill_adapters,
    make_batch,
    make_heads,
    make_student,
    make_teacher,
    teacher_depth,
)


def build_step(case: Case) -> dict[str, Callable[[], object]]:
    """The parts of a step as the training loop of the build on PYTHONPATH runs them."""
    from prismatic.models.lora import add_lora
    from prismatic.training.config import TrainConfig
    from prismatic.training.module import TrainableVLA
    from prismatic.training.objectives import L1Objective, PolicyParts
    from prismatic.training.schedule import make_optimizer
    from prismatic.vla.platforms import LIBERO
    from rocket_align import MultiLayerAlignment, recipes
    from rocket_align.teacher.preprocess import unnormalize_views

    base = make_student(case.models)
    batch: Any = make_batch(base, case.batch_size)
    vla = add_lora(base)
    fill_adapters(vla)
    head, proprio = make_heads(base.llm_dim)
    depth = base.config.text_config.num_hidden_layers
    align = recipes.rocket(depth, teacher_depth(case.models)) if case.aligned else recipes.baseline()
    width = 64 if case.models == "mini" else 256
    alignment = MultiLayerAlignment(align, base.llm_dim, width)
    fill(alignment)
    module = TrainableVLA(PolicyParts(vla, head, proprio), L1Objective(LIBERO), alignment, auxiliary_coeff=align.coeff)
    optimizer, _ = make_optimizer(module.trainable_parameters(), TrainConfig())
    targets: Callable[[], object] = type(None)
    if case.aligned:
        teacher = make_teacher(case.models, align.teacher_layers)

        def online() -> object:
            return teacher(unnormalize_views(batch["pixel_values"]))

        targets = stored_targets(online(), base) if case.stored else online
    # What the build's training command does on a CPU, if it does.
    sys.path.append(str(Path(os.environ["PYTHONPATH"]) / "vla-scripts"))
    getattr(importlib.import_module("finetune"), "keep_freed_memory", lambda: None)()
    module.train()
    module.last_state_of_text = True  # as training sets it for pairs that do not read it

    def step() -> float:
        with torch.no_grad():
            wanted = targets()
        loss = module(batch, wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def only_targets() -> float:
        with torch.no_grad():
            targets()
        return 0.0

    return {"step": step, "targets": only_targets}


def stored_targets(features: Any, base: Any) -> Callable[[], object]:
    """Read back, from codes in memory, the teacher's features of the batch under crops like the augmentation's."""
    from rocket_align.pooling import student_grid
    from rocket_align.teacher.store.codec import BasisFit, StoredTeacher, StoreGeometry, encode, pool_to_grid

    backbone = base.vision_backbone
    student_hw = student_grid(backbone.get_num_patches(), 1, features.grid_hw)
    side = min(round(1.25 * student_hw[0]), features.grid_hw[0])
    pooled = pool_to_grid(features, (side, side))
    fit = BasisFit()
    fit.add(pooled)
    basis = fit.result(min(384, pooled.shape[-1]))
    codes = encode(pooled, basis, torch.int8)
    pixels = base.config.image_sizes[0]
    geometry = StoreGeometry((side, side), features.grid_hw, student_hw, features.image_hw, pixels)
    teacher = StoredTeacher(basis, geometry, position_embedding=True)
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(len(pooled), 2, 2, generator=generator) * (1 - 0.9**0.5)
    crops = torch.cat([corners, torch.full_like(corners, 0.9**0.5)], dim=2)
    return lambda: teacher(codes.values_BKVPR, crops, codes.scales_BKVP)


def growth_mb(step: Callable[[], object]) -> float:
    """Resident memory that a step adds at its peak, MB; freed memory is given back to the system before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def main(name: str, way: str) -> None:
    """Build, say the first loss, then answer."""
    torch.set_num_threads(1)
    case = CASES[name]
    if way == "plain":
        from plain_step import build_plain_step

        parts = build_plain_step(case)
    else:
        parts = build_step(case)
    answers = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps({"loss": parts["step"](), "growth_mb": growth_mb(parts["step"])}), file=answers, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        parts[line.strip()]()
        print(json.dumps(time.process_time() - started), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
