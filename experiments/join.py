"""The join of policy and alignment: all that ROCKET adds to fine-tuning OpenVLA-OFT.

The only place where `prismatic` (the policy and its training) and `rocket_align` (the method) meet: `build_alignment`
makes what `TrainingRun.fit` takes, a loss on hidden states and the function that makes its targets from a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from prismatic.checkpoint.layout import RUN_CONFIG, read_record
from prismatic.training.config import TrainConfig
from prismatic.util.errors import UsageError
from prismatic.util.files import refuse_no_folder
from prismatic.util.flags import check, limited
from rocket_align.flags import AlignFlags
from rocket_align.teacher.registry import describe_teacher, load_teacher, teacher_hash
from rocket_align.teacher.store.layout import StoreDType, read_layout

if TYPE_CHECKING:
    from torch import Tensor

    from prismatic.training.run import TrainingRun
    from prismatic.vla.batch import Batch
    from rocket_align import AlignConfig, MultiLayerAlignment, TeacherFeatures
    from rocket_align.centering import Center
    from rocket_align.teacher.base import AlignmentTargets

# Makes an alignment's targets of a batch on the device.
Targets: TypeAlias = "Callable[[Batch], TeacherFeatures | AlignmentTargets | None]"


@dataclass
class FinetuneConfig(AlignFlags, TrainConfig):
    """OpenVLA-OFT's flags and ROCKET's."""

    shard_teacher: bool = False  # With --shard fsdp: divide the frozen teacher among the processes too


@dataclass
class StoreConfig(FinetuneConfig):
    """Flags of vla-scripts/build_feature_store.py: those of finetune.py, and the store's."""

    # Stored tokens a side, relative to the student's; at most the teacher's own
    grid_scale: float = limited(1.25, above=0)
    store_dtype: StoreDType = "int8"  # int8 (with a scale per token) | float16
    # Coefficients kept of a token's channels (principal directions); at most all
    components: int = limited(384, least=1)
    fit_frames: int = limited(128, least=1)  # Frames, evenly spread over the data, that the directions are fitted to
    verify: bool = False  # Read every record of a finished store and check it; builds nothing

    def validate_store(self) -> None:
        """Raises UsageError for wrong flags, before anything is loaded."""
        if not self.feature_store:
            raise UsageError("--feature_store: empty; accepted: the folder to write")
        if not self.verify:
            refuse_no_folder("--feature_store", self.feature_store)
        check(self)
        try:
            self.validate_alignment()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not self.verify and not (self.aligns and self.teacher):
            raise UsageError("--vggt_path: no teacher; accepted: this or --teacher_path, with an aligning recipe")


def plan_alignment(config: FinetuneConfig) -> tuple[AlignConfig, int]:
    """The alignment's configuration and half the teacher's channels, from the models' config files alone.

    Raises:
        UsageError: a wrong flag, or layers the models do not have.
    """
    from prismatic.policies import family_of  # torch: not for --help, nor before a wrong flag is told

    try:
        config.validate_alignment()
        if not config.aligns:
            return config.align_config(0, 0), 0
        if config.feature_store and config.use_val_set:
            raise UsageError("--use_val_set: True found; accepted with --feature_store (training frames): False")
        stored = read_layout(Path(config.feature_store)) if config.feature_store else None
        teacher = stored.teacher if stored else describe_teacher(config.teacher, config.teacher_type)
        family, start = family_of(config)
        align = config.align_config(family.depth(start.base), teacher.depth, indexing=family.indexing)
        if stored:
            stored.check_layers(align.teacher_layers, f"--feature_store: {config.feature_store}")
        return align, teacher.channels // 2
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_resumed_alignment(config: FinetuneConfig, align: AlignConfig) -> None:
    """In a resume, refuse another alignment than the checkpoint's; the weights of its terms may change.

    Raises:
        UsageError: names what differs.
    """
    if not config.resume:
        return
    record = Path(config.vla_path) / RUN_CONFIG
    before = read_record(record.parent).get("alignment") or {}
    if before:  # A checkpoint from before there were means.
        before = {"center": "none", **before}
    for name, now in asdict(align).items():
        # JSON has lists for tuples.
        now = list(now) if isinstance(now, tuple) else now
        if name not in ("coeff", "schedule", "pair_weights") and before.get(name, now) != now:
            raise UsageError(
                f"--resume: the alignment's {name} is {now}, but {before[name]} in {record}; accepted: that"
            )


def build_alignment(training: TrainingRun, align: AlignConfig, teacher_dim: int) -> tuple[MultiLayerAlignment, Targets]:
    """The alignment loss, and the function that makes its targets from a batch.

    Raises:
        UsageError: the teacher's weights, or its stored features, cannot be used.
    """
    from rocket_align.alignment import MultiLayerAlignment  # torch: as above

    flags = cast(FinetuneConfig, training.config)
    alignment = MultiLayerAlignment(align, training.family.student_dim(training.parts), teacher_dim)
    if not align.num_pairs:
        return alignment, lambda batch: None
    make_targets = read_stored_targets(training, align) if flags.feature_store else _online_targets(training, align)
    if align.center == "task":
        if training.family.name == "pi05" and flags.use_proprio:
            raise UsageError(
                "--align_center: task found; accepted for pi05, whose prompt holds the state: none, dataset"
            )
        make_targets = _with_tasks(make_targets)
    if align.center != "none" and not flags.resume:
        alignment.center = measure_center(training, alignment, make_targets)
    return alignment, make_targets


def _online_targets(training: TrainingRun, align: AlignConfig) -> Targets:
    from rocket_align.targets import TeacherTargets  # torch: as above

    flags = cast(FinetuneConfig, training.config)
    device, dtype = training.device, training.compute_dtype
    try:
        teacher = load_teacher(flags.teacher, align.teacher_layers, flags.teacher_type, device=device, dtype=dtype)
    except ValueError as error:
        raise UsageError(f"--{'teacher_path' if flags.teacher_path else 'vggt_path'}: {error}") from error
    if flags.shard_teacher:
        training.engine.shard_frozen(teacher)
    targets = TeacherTargets(teacher, training.processor.image_processor)
    return lambda batch: targets(batch["pixel_values"], _present_cameras(batch))


def _present_cameras(batch: Batch) -> Tensor | None:
    """The cameras of each sample (B, V), on the host, where a policy can do without some."""
    import torch  # as above

    cameras = batch.get("cameras")
    return None if cameras is None else torch.tensor(cameras)


def _with_tasks(make_targets: Targets) -> Targets:
    import torch  # as above

    from prismatic.vla.constants import IGNORE_INDEX
    from rocket_align.centering import task_keys

    def with_tasks(batch: Batch) -> TeacherFeatures | AlignmentTargets | None:
        targets = make_targets(batch)
        assert targets is not None
        labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORE_INDEX))
        return targets._replace(tasks=task_keys(batch["input_ids"], batch["attention_mask"], labels))

    return with_tasks


def measure_center(training: TrainingRun, alignment: MultiLayerAlignment, make_targets: Targets) -> Center:
    """Means of the targets over the first samples that training will read, as it augments them, on all processes."""
    import torch  # as above

    from rocket_align.centering import CenterMeter

    flags, accelerator = cast(FinetuneConfig, training.config), training.accelerator
    samples = flags.align_center_samples or len(training.dataset)
    num_tokens = training.family.image_tokens(training.parts) * flags.num_images_in_input
    meter = CenterMeter(by_task=alignment.config.center == "task")
    for batch in itertools.islice(training.batches(), -(-samples // (flags.batch_size * accelerator.num_processes))):
        with torch.no_grad(), accelerator.autocast():
            targets = make_targets(batch)
            assert targets is not None
            meter.update(alignment.pooled_features(targets, num_tokens), targets.tasks)
    center = meter.result()
    tasks = f" and {len(center.keys_T) - 1} tasks" if meter.by_task else ""
    accelerator.print(f"alignment: means of the targets of {meter.samples * accelerator.num_processes} samples{tasks}")
    return center


def read_stored_targets(training: TrainingRun, align: AlignConfig) -> Targets:
    """Let the loader read the feature store; returns the function that makes targets from what it read.

    Raises:
        UsageError: the store was made of other data, views or layers, or is damaged.
    """
    from rocket_align.teacher.store.reader import FeatureStore  # torch: as above

    flags = cast(FinetuneConfig, training.config)
    data, tokens = training.dataset, training.family.image_tokens(training.parts)
    try:
        store = FeatureStore(
            flags.feature_store,
            data.fingerprints(),
            align.teacher_layers,
            teacher_hash=teacher_hash(flags.teacher) if flags.teacher else None,
            views=data.views,
            view_pixels=data.image_transform.size[0],
        )
        teacher = store.teacher(tokens, position_embedding=align.teacher_pe)
    except ValueError as error:
        raise UsageError(f"--feature_store: {error}") from error
    if training.family.name != "openvla" and data.missing_views:
        raise UsageError(
            f"--feature_store: no {data.missing_views[0]} camera; accepted for {training.family.name}: all views"
        )
    data.extras = store
    teacher.to(training.device)
    return lambda batch: teacher(**batch["extras"])
