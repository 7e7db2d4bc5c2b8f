"""Choose the layers to align without training; the file it writes goes into finetune.py --align_layers_file FILE.

    python vla-scripts/select_layers.py --strategy uniform --count 8 --checkpoint openvla/openvla-7b --vggt_path VGGT-1B
    python vla-scripts/select_layers.py --strategy cka --count 8 --checkpoint openvla/openvla-7b --vggt_path VGGT-1B \
        --data_root_dir DATA --dataset_name libero_spatial_no_noops --num_images_in_input 2 --use_proprio True

Strategies: by position (only the models' config files are read) uniform = balanced (evenly spread, last block
included), e2m_last1 (early to middle and the last: the paper's recipe), shallow, middle, deep; by the cosine between
the input and the output of blocks, or of windows of blocks (--window), sim_top (highest) and sim_last (lowest); cka
(matched one to one for the highest total CKA).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis.config import SelectConfig
from prismatic.util.cli import run


def main(config: SelectConfig) -> int:
    """Select and write; returns 0."""
    config.validate_selection()
    from experiments.analysis.select import select  # torch and transformers: not for --help, nor for a wrong flag

    return select(config)


if __name__ == "__main__":
    run(SelectConfig, main)
