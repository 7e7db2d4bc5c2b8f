"""Flags of the analysis commands and of the layer selection, and the flags of fine-tuning that follow from them.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Literal, TypeVar, get_type_hints

from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text

from experiments.join import FinetuneConfig
from experiments.mini import SCENES
from experiments.robot.policy import Device, DType, Render
from prismatic.checkpoint.layout import is_checkpoint, read_record
from prismatic.training.config import Precision
from prismatic.util.errors import UsageError
from prismatic.util.flags import check, limited, numbers, split_paths
from rocket_align.teacher.registry import TeacherInfo, describe_teacher

FlagsT = TypeVar("FlagsT")
# Aliases, since draccus finds no help beside a field whose annotation has quotes.
Rows = Literal["tokens", "samples"]
Estimator = Literal["exact", "minibatch"]
Reference = Literal["first", "mean"]
BY_POSITION = ("uniform", "balanced", "e2m_last1", "shallow", "middle", "deep")
BY_SIMILARITY = {"sim_top": "top", "sim_last": "bottom"}
STRATEGIES = (*BY_POSITION, *BY_SIMILARITY, "cka")
_STRATEGIES = ", ".join(STRATEGIES)
_CHECKPOINTS = "a checkpoint folder, or several as a comma list"
# Flags that say the same in two ways: one given to a command puts away what the run recorded in the other way.
_ALTERNATIVES = (
    (("vggt_path",), ("teacher_path",)),
    (("align_layers_file",), ("vla_layers_align", "vggt_layers_align")),
)


def with_training_flags(*names: str) -> Callable[[type[FlagsT]], type[FlagsT]]:
    """Class decorator, below `dataclass`: flags of fine-tuning with their type, limits and help, None unless given."""

    def add(flags: type[FlagsT]) -> type[FlagsT]:
        hints, training = get_type_hints(FinetuneConfig), FinetuneConfig.__dataclass_fields__
        for name in names:
            owner = next(base for base in FinetuneConfig.__mro__ if name in get_annotations(base))
            help_text = get_preferred_help_text(get_attribute_docstring(owner, name))
            limits = {key: value for key, value in training[name].metadata.items() if key != "needed"}
            limits["custom_args"] = {"help": help_text}
            flags.__annotations__[name] = hints[name] | None
            setattr(flags, name, field(default=None, metadata=limits))
        return flags

    return add


@dataclass
@with_training_flags(
    *(
        "vggt_path",
        "teacher_path",
        "teacher_type",
        "data_root_dir",
        "dataset_name",
        "dataset_file",
        "platform",
        "num_images_in_input",
    ),
    *("use_proprio", "use_l1_regression", "use_diffusion", "use_lora", "lora_rank", "recipe", "vla_layers_align"),
    *("vggt_layers_align", "align_layers_file", "share_projector", "use_matryoshka"),
)
class SubjectFlags:
    """Models and data that are measured, and how much. Flags left out are those of the checkpoint's own run."""

    # Checkpoint folders (...--STEP_chkpt) as a comma list, or a base model
    checkpoint: str = limited("", needed=_CHECKPOINTS)
    base_checkpoint: str = ""  # The base model, when it is not where the checkpoint's adapter says
    image_aug: bool = False  # Augment the images as training does
    num_samples: int = limited(64, least=1)  # Samples measured (rounded up to whole batches)
    batch_size: int = limited(8, least=1)  # Samples per forward pass
    num_workers: int = limited(0, least=0)  # Loader processes
    mixed_precision: Precision = "auto"  # auto (bf16 where the device is fast at it) | no | bf16
    seed: int = limited(0, least=0)  # Which samples

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return split_paths(self.checkpoint)

    def overrides(self) -> dict[str, object]:
        """The training flags given here, by name."""
        ours = {"checkpoint", "num_samples"}
        names = [field.name for field in fields(SubjectFlags) if field.name not in ours]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class AnalysisConfig(SubjectFlags):
    """Flags of every analysis."""

    out_dir: Path = Path("analysis")  # Folder for the JSON file and the PNG picture


LEAST_ROWS = 4  # Of the unbiased estimator.


def check_rows(flags: SubjectFlags, rows: Rows, estimator: Estimator, *, least: int = LEAST_ROWS) -> None:
    """Refuse, before anything is loaded, fewer samples than CKA is defined for where each is one row.

    Raises UsageError.
    """
    if rows != "samples":
        return
    if estimator == "minibatch" and flags.batch_size < least:
        raise UsageError(f"--batch_size: {flags.batch_size} found; accepted for minibatch: {least} or more")
    if -(-flags.num_samples // flags.batch_size) * flags.batch_size < least:
        raise UsageError(f"--num_samples: {flags.num_samples} found; accepted with --rows samples: {least} or more")


@dataclass
class CkaConfig(AnalysisConfig):
    """CKA of every hidden state of the student with every block of the teacher, and the best one-to-one matching."""

    rows: Rows = "tokens"  # A row of the features is a vision token (tokens) or a sample's mean token (samples)
    debiased: bool = True  # The unbiased estimator; False: the biased one, as released
    estimator: Estimator = "exact"  # exact | minibatch (little memory for wide models; unbiased only)

    def __post_init__(self) -> None:
        check(self)
        if self.estimator == "minibatch" and not self.debiased:
            raise UsageError("--estimator: minibatch with --debiased False; accepted: exact, or --debiased True")
        check_rows(self, self.rows, self.estimator, least=LEAST_ROWS if self.debiased else 2)


@dataclass
class GradientsConfig(AnalysisConfig):
    """Cosines between the gradients of the pairs' losses and of the action loss, for every block of the LLM."""

    num_samples: int = limited(32, least=1)  # Samples measured, as in the paper
    block: int = limited(0, least=-1)  # Block whose matrix is drawn; -1 draws all blocks together

    @property
    def group(self) -> str:
        """Name of the group of parameters whose matrix is drawn."""
        return "all" if self.block < 0 else str(self.block)


@dataclass
class ProjectorsConfig(AnalysisConfig):
    """Similarity of the pairs' projectors: of their weights, and of their outputs."""


@dataclass
class ConeConfig(AnalysisConfig):
    """Mean cosine between tokens: of every layer of student and teacher, and behind the projectors."""


@dataclass
class TheoremConfig(AnalysisConfig):
    """Both sides of the theorem's bound on gradient coherence, measured."""

    reference: Reference = "first"  # State of the common Jacobian: the first aligned one, or the mean of all


@dataclass
class StaticConfig(AnalysisConfig):
    """Share of the alignment's targets that a token's place explains alone, with and without augmentation."""

    num_samples: int = limited(512, least=2)  # Samples measured (rounded up to whole batches)


@dataclass
class DepthConfig:
    """Depth read out of every teacher layer by a linear probe, against the simulator's depth."""

    vggt_path: str = ""  # The 3D teacher: a folder, a weights file, or a hub id
    frames_dir: Path | None = None  # Frames with depth, taken as they are; default: OUT_DIR/frames, made when missing
    train_tasks: str = "libero_object:0,2;libero_spatial:0"  # Tasks the probe is fitted on: SUITE:NUMBERS[;...]
    test_tasks: str = "libero_object:5"  # Tasks it is tested on
    episodes: int = limited(3, least=1)  # Episodes a task, where frames are rendered
    frames: int = limited(8, least=1)  # Two-view frames an episode, where frames are rendered
    image_size: int = limited(128, least=1)  # Side of the pictures in pixels, where frames are rendered
    layers: str = numbers("")  # Teacher layers as a comma list; default: all
    cells: int = limited(4, least=1)  # Depth is read out as cells x cells values per teacher patch
    ridge: float = limited(1e-2, above=0)  # Penalty of the regression
    pictures: int = limited(3, least=1)  # Test frames drawn
    batch_size: int = limited(8, least=1)  # Frames per forward pass
    mixed_precision: Precision = "auto"  # auto (bf16 where the device is fast at it) | no | bf16
    seed: int = limited(0, least=0)  # Seed of the rendered frames
    out_dir: Path = Path("analysis")  # Folder for the JSON file and the PNG picture


@dataclass
class ReadoutConfig:
    """Depth and camera pose read out of a policy's own tokens by a linear probe that knows each token's place."""

    checkpoint: str = limited("", needed=_CHECKPOINTS)  # Checkpoint folders (...--STEP_chkpt) as a comma list
    base_checkpoint: str = ""  # The base model, when it is not where the checkpoint's adapter says
    unnorm_key: str = ""  # Dataset whose statistics normalize the robot's state; default: the checkpoint's first
    frames_dir: Path | None = None  # Frames with depth, taken as they are; default: OUT_DIR/frames, made when missing
    train_tasks: str = "libero_object:7"  # Tasks the probe is fitted on: SUITE:NUMBERS[;...]
    test_tasks: str = "libero_object:9"  # Tasks it is tested on
    episodes: int = limited(14, least=1)  # Episodes a task, where frames are rendered
    frames: int = limited(14, least=1)  # Two-view frames an episode, where frames are rendered
    image_size: int = limited(128, least=1)  # Side of the pictures in pixels, where frames are rendered
    # task, or moved: one object anywhere on the table; where frames are rendered
    scene: str = limited("task", choices=SCENES)
    shift: bool = True  # Take the token after each patch's, as the alignment does
    ridge: float = limited(1e-2, above=0)  # Penalty of the regression
    batch_size: int = limited(16, least=1)  # Frames per forward pass
    pictures: int = limited(4, least=0)  # Test frames drawn, with depth as each policy's tokens tell it
    seed: int = limited(0, least=0)  # Seed of the rendered frames, and of the policy's noise
    device: Device = "auto"  # auto | cpu | cuda
    dtype: DType = "auto"  # auto | float32 | bfloat16
    out_dir: Path = Path("analysis")  # Folder for the JSON file and the PNG picture

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The folders one by one."""
        return split_paths(self.checkpoint)


@dataclass
class ReachConfig:
    """Measure where the hand first closes in LIBERO's pick-and-place tasks, beside the object it is to pick up."""

    checkpoint: str = limited("", needed=_CHECKPOINTS)  # Checkpoint folders (...--STEP_chkpt) as a comma list
    base_checkpoint: str = ""  # The base model, when it is not where the checkpoint's adapter says
    task_suite_name: str = "libero_object"  # A suite of LIBERO
    task_ids: str = numbers("", least=0)  # Tasks, as in 0,3,7 or 0-4; default: all
    # task, or moved: the object put anywhere on the table, alone, and the third-person camera moved
    scene: str = limited("task", choices=SCENES)
    num_trials_per_task: int = limited(10, least=1)  # Episodes a task, from its official initial states
    max_steps: int = limited(120, least=1)  # Steps after which a hand that has not closed is given up
    env_img_res: int = limited(256, least=16, most=4096)  # Side of the rendered images in pixels
    render: Render = "protocol"  # protocol | fast, as in the evaluation
    seed: int = limited(7, least=0)  # Of the policy's randomness (diffusion noise)
    device: Device = "auto"  # auto | cpu | cuda
    dtype: DType = "auto"  # auto | float32 | bfloat16
    out_dir: Path = Path("analysis")  # Folder for the JSON file and the PNG picture

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return split_paths(self.checkpoint)


@dataclass
class SelectConfig(SubjectFlags):
    """Choose layers to align without training, and write them for finetune.py's --align_layers_file."""

    # uniform | balanced | e2m_last1 | shallow | middle | deep | sim_top | sim_last | cka
    strategy: str = limited("", needed=_STRATEGIES, choices=STRATEGIES)
    # Another strategy for the teacher's layers (not with cka)
    teacher_strategy: str = limited("", choices=STRATEGIES[:-1])
    count: int = limited(0, least=1)  # Layer pairs
    window: int = limited(1, least=1)  # sim_top, sim_last: consecutive blocks per score
    # cka: match within all layers, or within those of uniform, e2m_last1, ...
    candidates: str = limited("all", choices=("all", *BY_POSITION))
    rows: Rows = "tokens"  # cka: a row of the features is a vision token (tokens) or a sample's mean token (samples)
    estimator: Estimator = "exact"  # cka: exact | minibatch (little memory for wide models)
    out: Path = Path("align_layers.json")  # The file to write

    def validate_selection(self) -> None:
        """Raises UsageError for what cannot be selected, before anything is loaded."""
        check(self)
        if self.teacher_strategy and self.strategy == "cka":
            raise UsageError(
                "--teacher_strategy: given with --strategy cka, which matches both sides; accepted: without it"
            )
        if len(self.checkpoints) > 1:
            raise UsageError(f"--checkpoint: {len(self.checkpoints)} folders found; accepted: one")
        if self.strategy == "cka":
            check_rows(self, self.rows, self.estimator)

    def strategy_of(self, side: str) -> str:
        """The strategy of "student" or "teacher"."""
        return (self.teacher_strategy or self.strategy) if side == "teacher" else self.strategy


def training_config(flags: SubjectFlags, folder: str) -> FinetuneConfig:
    """Flags of fine-tuning: those of the checkpoint's run, with the given ones over them. Raises UsageError."""
    path = Path(folder)
    resume = path.is_dir() and is_checkpoint(path)
    values = read_record(path) if resume else {}
    given = flags.overrides()
    for pair in _ALTERNATIVES:
        for chosen, replaced in (pair, pair[::-1]):
            if any(name in given for name in chosen):
                values = {name: value for name, value in values.items() if name not in replaced}
    if numbers := values.get("platform_numbers"):
        values["platform"] = numbers  # The file that its name came from may be elsewhere.
    values |= given
    if values.get("vggt_path") or values.get("teacher_path"):
        values["feature_store"] = ""  # The teacher itself sees what the student sees.
    values |= {
        "vla_path": folder, "resume": resume, "resume_step": None, "run_root_dir": Path("runs"),
        "run_id_override": "analysis", "trackers": "none", "use_val_set": False, "val_fraction": 0.0,
        "gradient_checkpointing": False,
    }  # fmt: skip
    values["data_root_dir"] = Path(values.get("data_root_dir", FinetuneConfig.data_root_dir))
    known = {field.name for field in fields(FinetuneConfig)}
    return FinetuneConfig(**{name: value for name, value in values.items() if name in known})


def teacher_source(config: FinetuneConfig) -> tuple[str, str]:
    """Path and kind of the run's teacher. Raises UsageError when none is given."""
    path = config.teacher
    if not path:
        raise UsageError("--vggt_path: empty; accepted: the teacher's folder, weights file or hub id")
    return path, config.teacher_type


def describe_teacher_of(config: FinetuneConfig) -> TeacherInfo:
    """Sizes of the run's teacher, from its config file alone. Raises UsageError when there is none."""
    try:
        return describe_teacher(*teacher_source(config))
    except ValueError as error:
        raise UsageError(f"--vggt_path: {error}") from error
