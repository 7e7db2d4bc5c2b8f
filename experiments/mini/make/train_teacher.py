"""Train the mini teacher: a small VGGT aggregator that learns depth, points and cameras from simulator frames.

    python -m experiments.mini.make.teacher_data --out DATA
    python -m experiments.mini.make.train_teacher --data DATA --out RUN --weights experiments/mini/weights/teacher
    python -m experiments.mini.make.train_teacher --data DATA --out CONTROL --control true --steps 1500

An interrupted run continues from its last checkpoint in `out` when started again with the same flags. `--control`
leaves the aggregator as it was initialized and trains the readouts alone: what a random network gives.
"""

from __future__ import annotations

from experiments.mini.make.teacher_data import TrainTeacherConfig
from prismatic.util.cli import run


def main(cfg: TrainTeacherConfig) -> None:
    # Late, so that --help answers without torch.
    from experiments.mini.make import teacher_training

    teacher_training.train(cfg)


if __name__ == "__main__":
    run(TrainTeacherConfig, main)
