"""Training flags, named as upstream OpenVLA-OFT names them, and every check that needs no model.

`validate()` refuses wrong values and impossible combinations before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from prismatic.checkpoint.layout import LOG_FILE, is_checkpoint, split_checkpoint_name
from prismatic.util.errors import UsageError, unknown_name
from prismatic.util.hub import HUB_ID

SCHEDULERS = ("MultiStepLR", "CosineAnnealingLR")
PRECISIONS = ("auto", "no", "bf16")
TRACKERS = ("tensorboard", "wandb", "trackio", "none")


@dataclass
class TrainConfig:
    # Model and data
    vla_path: str = "openvla/openvla-7b"  # Base checkpoint: local folder or hub id; with --resume a *_chkpt folder
    data_root_dir: Path = Path("datasets/rlds")  # Folder that holds the RLDS datasets
    dataset_name: str = "libero_spatial_no_noops"  # A dataset, a comma list of datasets, or a named mixture
    run_root_dir: Path = Path("runs")  # Checkpoints and logs go below this folder
    platform: str = "libero"  # Chunk length, action and proprio sizes: libero | aloha | bridge
    shuffle_buffer_size: int = 100_000  # Accepted for compatibility: shuffling is exact and needs no buffer

    data_fraction: float = 1.0  # Part of the training episodes to use, drawn with the seed for every instruction

    # Inputs and heads
    num_images_in_input: int = 1  # The dataset's first cameras: 1 primary image, 2 adds the wrist, 3 both wrists
    use_proprio: bool = False  # Robot state as one more token
    use_film: bool = False  # Language conditions the vision backbone (FiLM)
    use_l1_regression: bool = True  # Continuous head trained with the L1 loss
    use_diffusion: bool = False  # Continuous head trained by diffusion (DDIM); neither: discrete action tokens
    num_diffusion_steps_train: int = 50  # Diffusion steps during training

    # Optimization
    batch_size: int = 8  # Samples per process and forward pass
    learning_rate: float = 5e-4  # Peak learning rate (AdamW)
    weight_decay: float = 0.01  # AdamW weight decay
    max_grad_norm: float = 0.0  # Gradient norm clip; 0 does not clip
    lr_warmup_steps: int = 0  # Linear warm-up from a tenth of the rate
    scheduler: str = "MultiStepLR"  # MultiStepLR | CosineAnnealingLR
    num_steps_before_decay: int = 100_000  # MultiStepLR: x0.1 after this many steps
    grad_accumulation_steps: int = 1  # Forward passes per optimizer step
    max_steps: int = 200_000  # Optimizer steps
    mixed_precision: str = "auto"  # auto (bf16 where the device is fast at it) | no | bf16
    gradient_checkpointing: bool = False  # Recompute the LLM's blocks in the backward pass: less memory, more time
    use_val_set: bool = False  # Measure validation losses
    val_freq: int = 10_000  # Steps between validations
    val_time_limit: int = 180  # Seconds one validation may take
    val_fraction: float = 0.0  # With --use_val_set, hold out this part of the episodes of datasets without a val split
    seed: int = 42  # Seed of initialization, shuffling and augmentation

    # Checkpoints
    save_freq: int = 10_000  # Steps between checkpoints (one is always written at the end)
    save_specific_steps: str = ""  # Further steps to save at, as a comma list
    save_latest_checkpoint_only: bool = False  # Keep one checkpoint, overwritten, in the run's folder
    resume: bool = False  # Go on from the checkpoint folder --vla_path
    resume_step: int | None = None  # Step of that checkpoint (default: read from it)
    base_checkpoint: str = ""  # With --resume: the base model, when it is not where the adapter says
    diffusion_sample_freq: int = 50  # Diffusion: steps between samplings of whole chunks to log their error; 0: never

    # Data loading
    image_aug: bool = True  # Random crop and color jitter
    num_workers: int = 1  # Loader processes

    # LoRA
    use_lora: bool = True  # False trains every weight of the model
    lora_rank: int = 32  # Rank; alpha is min(rank, 16)
    lora_dropout: float = 0.0  # Dropout on LoRA's input
    merge_lora_during_training: bool = True  # Also write the merged model into every checkpoint

    # Logging
    trackers: str = "tensorboard"  # Comma list of tensorboard | wandb | trackio | none; JSONL is always written
    wandb_entity: str = ""  # Weights & Biases entity
    wandb_project: str = "rocket-vla"  # Weights & Biases project
    wandb_log_freq: int = 10  # Steps between log lines, for every logger
    run_id_note: str | None = None  # Added at the end of the run's name
    run_id_override: str | None = None  # The run's name

    @property
    def objective(self) -> str:
        """How actions are trained: "l1", "diffusion" or "discrete" tokens."""
        if self.use_l1_regression:
            return "l1"
        return "diffusion" if self.use_diffusion else "discrete"

    @property
    def extra_save_steps(self) -> frozenset[int]:
        """`save_specific_steps` as numbers."""
        text = str(self.save_specific_steps).strip("[]() ")
        try:
            return frozenset(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise UsageError(
                f"--save_specific_steps: {self.save_specific_steps!r} is no comma list of steps, such as 1000,5000"
            ) from None

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The chosen loggers beside JSONL."""
        names = [name.strip() for name in self.trackers.split(",") if name.strip()]
        for name in names:
            if name not in TRACKERS:
                raise unknown_name("--trackers", name, TRACKERS)
        return tuple(name for name in names if name != "none")

    def validate(self) -> None:
        """Refuse what cannot run.

        Raises:
            UsageError: one line that names the flag, what was found and what is accepted.
        """
        if self.use_l1_regression and self.use_diffusion:
            raise UsageError("--use_l1_regression and --use_diffusion: both are True; accepted: at most one of them")
        if self.scheduler not in SCHEDULERS:
            raise unknown_name("--scheduler", self.scheduler, SCHEDULERS)
        if self.mixed_precision not in PRECISIONS:
            raise unknown_name("--mixed_precision", self.mixed_precision, PRECISIONS)
        if self.num_images_in_input < 1:
            raise UsageError(f"--num_images_in_input: {self.num_images_in_input} found; accepted: 1 or more")
        self._validate_numbers()
        _ = self.extra_save_steps
        for name in self.tracker_names:
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"--trackers: {name} is not installed; accepted: none, or after pip install {name}")
        self._validate_paths()

    def _validate_numbers(self) -> None:
        positive = (
            "batch_size max_steps save_freq grad_accumulation_steps wandb_log_freq lora_rank val_freq "
            "val_time_limit num_diffusion_steps_train learning_rate num_steps_before_decay"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name}: {getattr(self, name)} found; accepted: a number above 0")
        at_least_0 = "lr_warmup_steps num_workers max_grad_norm weight_decay lora_dropout diffusion_sample_freq"
        for name in at_least_0.split():
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name}: {getattr(self, name)} found; accepted: 0 or more")
        if not self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout: {self.lora_dropout} found; accepted: 0 or more, below 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed: {self.seed} found; accepted: 0 to {2**31 - 1}")
        if not 0 < self.data_fraction <= 1:
            raise UsageError(f"--data_fraction: {self.data_fraction} found; accepted: above 0, at most 1")
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"--val_fraction: {self.val_fraction} found; accepted: 0 or more, below 1")
        if self.val_fraction and not self.use_val_set:
            raise UsageError(f"--val_fraction: {self.val_fraction} without --use_val_set; accepted: 0, or both of them")

    def _validate_paths(self) -> None:
        if not Path(self.data_root_dir).is_dir():
            raise UsageError(f"--data_root_dir: no such folder: {self.data_root_dir}")
        run_dir = Path(self.run_root_dir) / self.run_id()
        if not self.resume and (run_dir / LOG_FILE).is_file():
            raise UsageError(f"--run_id_override: {run_dir} holds a run; accepted: another name, or --resume True")
        local = Path(self.vla_path)
        if self.resume and not is_checkpoint(local):
            raise UsageError(f"--resume: {local} is no checkpoint folder (a ...--STEP_chkpt with training_state/)")
        if not local.is_dir() and not HUB_ID.fullmatch(str(self.vla_path)):
            raise UsageError(
                f"--vla_path: no such folder: {self.vla_path} (and it is no hub id such as openvla/openvla-7b)"
            )
        if local.is_dir() and not self.resume and not (local / "config.json").is_file():
            raise UsageError(f"--vla_path: {local} has no config.json; accepted: a model folder, or --resume True")
        try:
            Path(self.run_root_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run_root_dir: {self.run_root_dir} cannot be a folder ({error})") from None
        if not os.access(self.run_root_dir, os.W_OK):
            raise UsageError(f"--run_root_dir: {self.run_root_dir} is not writable; accepted: a folder that is")

    def run_id(self) -> str:
        """The run's name: upstream's pattern of model, data and hyperparameters, or `run_id_override`.

        A resumed run keeps the name it began with, which that of its checkpoint folder begins with.
        """
        if self.run_id_override:
            return self.run_id_override
        folder = Path(self.vla_path).name
        if self.resume:
            return split_checkpoint_name(folder)[0]
        name = f"{folder}+{self.dataset_name}+b{self.batch_size * self.grad_accumulation_steps}"
        name += f"+lr-{self.learning_rate}"
        if self.use_lora:
            name += f"+lora-r{self.lora_rank}+dropout-{self.lora_dropout}"
        if self.image_aug:
            name += "--image_aug"
        return f"{name}--{self.run_id_note}" if self.run_id_note else name
