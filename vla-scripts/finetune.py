"""Fine-tune an OpenVLA model on demonstrations, with its hidden states aligned to a frozen 3D teacher (ROCKET).

    accelerate launch vla-scripts/finetune.py --vla_path openvla/openvla-7b --vggt_path VGGT-1B/model.safetensors \
        --data_root_dir DATA --dataset_name libero_4_task_suites_no_noops --recipe rocket

All of OpenVLA-OFT's and ROCKET's flags are accepted. `--recipe` sets the alignment's flags (rocket, shared, naive,
spatial_forcing, baseline); a flag given beside it wins. What ROCKET adds to training is `build_alignment`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prismatic.training.config import TrainConfig
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from rocket_align.flags import AlignFlags

if TYPE_CHECKING:
    from prismatic.training.run import TrainingRun
    from rocket_align import AlignConfig, MultiLayerAlignment


@dataclass
class FinetuneConfig(AlignFlags, TrainConfig):
    """OpenVLA-OFT's flags and ROCKET's."""


def plan_alignment(config: FinetuneConfig) -> tuple[AlignConfig, int]:
    """The alignment's configuration and half the teacher's channels, from the models' config files alone.

    Raises:
        UsageError: a wrong flag, or layers the models do not have.
    """
    from prismatic.checkpoint.load import student_depth
    from rocket_align.teacher.registry import describe_teacher
    from rocket_align.teacher.store.layout import read_layout

    try:
        config.validate_alignment()
        if not config.aligns:
            return config.align_config(0, 0), 0
        if config.feature_store and config.use_val_set:
            raise UsageError("--use_val_set: True found; accepted with --feature_store (training frames): False")
        stored = read_layout(Path(config.feature_store)) if config.feature_store else None
        teacher = stored.teacher if stored else describe_teacher(config.teacher, config.teacher_type)
        align = config.align_config(student_depth(config), teacher.depth)
        if stored:
            stored.check_layers(align.teacher_layers, f"--feature_store: {config.feature_store}")
        return align, teacher.channels // 2
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_resumed_alignment(config: FinetuneConfig, align: AlignConfig) -> None:
    """In a resume, refuse another alignment than the checkpoint's; its coefficient may change.

    Raises:
        UsageError: names what differs.
    """
    from prismatic.checkpoint.layout import RUN_CONFIG, read_record

    if not config.resume:
        return
    record = Path(config.vla_path) / RUN_CONFIG
    before = read_record(record.parent).get("alignment") or {}
    for name, now in asdict(align).items():
        # JSON has lists for tuples.
        now = list(now) if isinstance(now, tuple) else now
        if name != "coeff" and before.get(name, now) != now:
            raise UsageError(
                f"--resume: the alignment's {name} is {now}, but {before[name]} in {record}; accepted: that"
            )


def build_alignment(
    training: TrainingRun, align: AlignConfig, teacher_dim: int
) -> tuple[MultiLayerAlignment, Callable[[dict[str, Any]], Any]]:
    """The alignment loss, and the function that makes its targets from a batch.

    Raises:
        UsageError: the teacher's weights, or its stored features, cannot be used.
    """
    from rocket_align import MultiLayerAlignment
    from rocket_align.teacher.preprocess import unnormalize_views
    from rocket_align.teacher.registry import load_teacher

    flags: Any = training.config
    alignment = MultiLayerAlignment(align, training.vla.llm_dim, teacher_dim)
    if not align.num_pairs:
        return alignment, lambda batch: None
    if flags.feature_store:
        return alignment, read_stored_targets(training, align)
    device, dtype = training.device, training.compute_dtype
    try:
        teacher = load_teacher(flags.teacher, align.teacher_layers, flags.teacher_type, device=device, dtype=dtype)
    except ValueError as error:
        raise UsageError(f"--{'teacher_path' if flags.teacher_path else 'vggt_path'}: {error}") from error
    images = training.processor.image_processor
    mean, std, channels = images.means[0], images.stds[0], 3 * len(images.means)

    def targets(batch: dict[str, Any]) -> Any:
        return teacher(unnormalize_views(batch["pixel_values"], mean, std, channels_per_view=channels))

    return alignment, targets


def read_stored_targets(training: TrainingRun, align: AlignConfig) -> Callable[[dict[str, Any]], Any]:
    """Let the loader read the feature store; returns the function that makes targets from what it read."""
    from rocket_align.teacher.registry import teacher_hash
    from rocket_align.teacher.store.reader import FeatureStore

    flags: Any = training.config
    data, backbone = training.dataset, training.vla.vision_backbone
    try:
        store = FeatureStore(
            flags.feature_store,
            data.fingerprints(),
            align.teacher_layers,
            teacher_hash=teacher_hash(flags.teacher) if flags.teacher else None,
            views=data.views,
            view_pixels=data.image_transform.size[0],
        )
        teacher = store.teacher(backbone.get_num_patches(), position_embedding=align.teacher_pe)
    except ValueError as error:
        raise UsageError(f"--feature_store: {error}") from error
    data.extras = store
    teacher.to(training.device)
    return lambda batch: teacher(**batch["extras"])


def main(config: FinetuneConfig) -> int:
    """Train; returns 0, or 130 when stopped early (the checkpoint is written first)."""
    config.validate()
    align, teacher_dim = plan_alignment(config)
    check_resumed_alignment(config, align)
    from prismatic.training.run import TrainingRun

    training = TrainingRun(config, asdict(config))
    alignment, targets = build_alignment(training, align, teacher_dim)
    training.run_config["alignment"] = {**asdict(align), "widths": alignment.widths}
    state = training.fit(alignment, align.coeff, targets)
    return 130 if state.stopped_early else 0


if __name__ == "__main__":
    run(FinetuneConfig, main)
