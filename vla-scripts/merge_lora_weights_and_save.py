"""Merge a LoRA adapter into its base model, so that the checkpoint loads faster and anywhere.

    python vla-scripts/merge_lora_weights_and_save.py --base_checkpoint openvla/openvla-7b \
        --lora_finetuned_checkpoint_dir runs/my-run--50005_chkpt

The merged model goes into the checkpoint's own folder, or to `--output_dir`. It works on the CPU, one tensor at a time
(about 2 GB of memory for OpenVLA-7B); the base model's folder is only read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.robot.policy import DType
from prismatic.checkpoint.layout import LORA_FOLDER
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import find_folder, refuse_no_folder
from prismatic.util.flags import check, limited

_ADAPTED = "a checkpoint folder with lora_adapter/"


@dataclass
class ConvertConfig:
    """OpenVLA-OFT's flags, and ours from `output_dir` on."""

    base_checkpoint: str = "openvla/openvla-7b"  # Model that the adapter was trained on: folder or hub id (owner/name)
    lora_finetuned_checkpoint_dir: str = limited("", needed=_ADAPTED)  # Checkpoint folder with lora_adapter/
    output_dir: str = ""  # Where the merged checkpoint goes; default: into lora_finetuned_checkpoint_dir
    max_shard_size: str = "5GB"  # Larger models are split into files of at most this size
    dtype: DType = "auto"  # Type of the merged weights: auto (the base model's), bfloat16 or float32
    overwrite: bool = False  # Replace merged weights that are there already


def main(config: ConvertConfig) -> int:
    """Merge and say what was written; returns 0."""
    check(config)
    checkpoint = Path(config.lora_finetuned_checkpoint_dir).expanduser()
    if not (checkpoint / LORA_FOLDER).is_dir():
        raise UsageError(f"--lora_finetuned_checkpoint_dir: {checkpoint} has no folder {LORA_FOLDER}")
    refuse_no_folder("--output_dir", config.output_dir or checkpoint)
    import torch

    from prismatic.checkpoint.merge import merge_checkpoint
    from prismatic.util.tensor_files import parse_size

    max_shard_bytes = parse_size(config.max_shard_size, "--max_shard_size")
    report = merge_checkpoint(
        find_folder("--base_checkpoint", config.base_checkpoint),
        checkpoint,
        Path(config.output_dir).expanduser() if config.output_dir else checkpoint,
        max_shard_bytes=max_shard_bytes,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        overwrite=config.overwrite,
    )
    if report.suspicious:
        print(
            f"warning: {report.suspicious} in the adapter's file differs from the base model's; "
            "an adapter works only on the model that it was trained on",
            file=sys.stderr,
        )
    size = f"{report.num_bytes / 1e9:.2f} GB in {len(report.files)} file{'s' if len(report.files) > 1 else ''}"
    print(f"merged {report.num_merged} weights; {size}: {report.folder}")
    return 0


if __name__ == "__main__":
    run(ConvertConfig, main)
