"""Fine-tune an OpenVLA model on demonstrations, with its hidden states aligned to a frozen 3D teacher (ROCKET).

    accelerate launch vla-scripts/finetune.py --vla_path openvla/openvla-7b --vggt_path VGGT-1B/model.safetensors \
        --data_root_dir DATA --dataset_name libero_4_task_suites_no_noops --recipe rocket

All of OpenVLA-OFT's and ROCKET's flags are accepted. `--recipe` sets the alignment's flags (rocket, shared, naive,
spatial_forcing, baseline); a flag given beside it wins. What ROCKET adds to training is `build_alignment`, in
experiments/join.py.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.join import (
    FinetuneConfig,
    build_alignment,
    check_resumed_alignment,
    plan_alignment,
    read_stored_targets,
)
from prismatic.util.cli import run
from prismatic.util.memory import keep_freed_memory

__all__ = [
    "FinetuneConfig", "build_alignment", "check_resumed_alignment", "main", "plan_alignment", "read_stored_targets",
]  # fmt: skip


def main(config: FinetuneConfig) -> int:
    """Train; returns 0, or after Ctrl-C 130 and after SIGTERM 143 (the checkpoint is written first)."""
    config.validate()
    align, teacher_dim = plan_alignment(config)
    check_resumed_alignment(config, align)
    from experiments.robot.probe import record_probe
    from prismatic.training.run import TrainingRun  # torch and transformers: not for --help, nor for a wrong flag

    training = TrainingRun(config, asdict(config), align.student_layers, pauses=bool(align.schedule))
    alignment, targets = build_alignment(training, align, teacher_dim)
    training.run_config["alignment"] = {**asdict(align), "widths": alignment.widths}
    training.probe = record_probe
    if training.device.type == "cpu":
        keep_freed_memory()
    state = training.fit(alignment, align.coeff_at if align.schedule else align.coeff, targets)
    return 128 + state.stopped_by if state.stopped_by else 0


if __name__ == "__main__":
    run(FinetuneConfig, main)
