"""Compute a teacher's features of every frame of a data set once, for `finetune.py --feature_store`.

    python vla-scripts/build_feature_store.py --feature_store STORE --vggt_path VGGT-1B --vla_path openvla/openvla-7b \
        --data_root_dir DATA --dataset_name libero_4_task_suites_no_noops --num_images_in_input 2

Takes the flags of finetune.py, so that a training command needs only another script name; those of the student's
inputs, the data, the teacher and the layers count. Interrupted, it goes on where it stopped; `accelerate launch` and
torchrun share the work among processes. Afterwards training needs the data and the store, but no teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.join import StoreConfig
from prismatic.util.cli import run


def main(config: StoreConfig) -> None:
    """Build the store, or check it."""
    config.validate_store()
    from experiments import feature_store  # torch and transformers: not for --help, nor for a wrong flag

    if config.verify:
        feature_store.verify(config)
    else:
        feature_store.build(config)


if __name__ == "__main__":
    run(StoreConfig, main)
