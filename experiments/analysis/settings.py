"""From the flags of a command and what a checkpoint's run recorded to the flags of fine-tuning. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.analysis.config import SubjectFlags
from prismatic.checkpoint.layout import is_checkpoint, read_record
from prismatic.training.config import TrainConfig
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from prismatic.training.run import TrainingRun
    from rocket_align.config import AlignConfig
    from rocket_align.teacher.registry import TeacherInfo


# Flags that say the same in two ways: one given to a command puts away what the run recorded in the other way.
_ALTERNATIVES = (
    (("vggt_path",), ("teacher_path",)),
    (("align_layers_file",), ("vla_layers_align", "vggt_layers_align")),
)


class Join(Protocol):
    """What vla-scripts/finetune.py offers: flags, and the join of policy and alignment."""

    FinetuneConfig: Any

    def plan_alignment(self, config: Any) -> tuple[AlignConfig, int]: ...

    def build_alignment(self, training: TrainingRun, align: AlignConfig, teacher_dim: int) -> tuple[Any, Any]: ...


def training_config(flags: SubjectFlags, folder: str, join: Join) -> Any:
    """The fine-tuning script's flags: those of the checkpoint's run, with the given ones over them.

    Raises:
        UsageError: the run's file is not readable.
    """
    path = Path(folder)
    resume = path.is_dir() and is_checkpoint(path)
    values = read_record(path) if resume else {}
    given = flags.overrides()
    for one, other in _ALTERNATIVES:
        for ours, theirs in ((one, other), (other, one)):
            if any(name in given for name in ours):
                values = {name: value for name, value in values.items() if name not in theirs}
    values |= given
    if values.get("vggt_path") or values.get("teacher_path"):
        values["feature_store"] = ""  # The teacher itself sees what the student sees.
    values |= {
        "vla_path": folder, "resume": resume, "resume_step": None, "run_root_dir": Path("runs"),
        "run_id_override": "analysis", "trackers": "none", "use_val_set": False, "val_fraction": 0.0,
        "gradient_checkpointing": False,
    }  # fmt: skip
    values["data_root_dir"] = Path(values.get("data_root_dir", TrainConfig.data_root_dir))
    known = {field.name for field in fields(join.FinetuneConfig)}
    return join.FinetuneConfig(**{name: value for name, value in values.items() if name in known})


def teacher_source(config: Any) -> tuple[str, str]:
    """Path and kind of the run's teacher.

    Raises:
        UsageError: none given.
    """
    path = config.teacher
    if not path:
        raise UsageError("--vggt_path: empty; accepted: the teacher's folder, weights file or hub id")
    return path, config.teacher_type


def describe_teacher_of(config: Any) -> TeacherInfo:
    """Sizes of the run's teacher, from its config file alone.

    Raises:
        UsageError: no teacher is given, or there is none.
    """
    from rocket_align.teacher.registry import describe_teacher

    try:
        return describe_teacher(*teacher_source(config))
    except ValueError as error:
        raise UsageError(f"--vggt_path: {error}") from error
