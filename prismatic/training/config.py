"""Training flags, named as upstream OpenVLA-OFT names them, and every check that needs no model.

`validate()` refuses wrong values and impossible combinations before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prismatic.checkpoint.layout import (
    FAMILIES,
    LOG_FILE,
    MODEL_WEIGHTS,
    is_checkpoint,
    last_checkpoint,
    saved_step,
    split_checkpoint_name,
    weight_files,
)
from prismatic.checkpoint.newest import damage, is_run, newest_checkpoint
from prismatic.util.errors import UsageError
from prismatic.util.files import HUB_ID, fitting_name, longest_name, refuse_no_folder
from prismatic.util.flags import check, limited, names, numbers, split_names, split_numbers
from prismatic.vla.datasets.dataset_file import read_datasets
from prismatic.vla.platforms import get_platform

# Aliases, since draccus finds no help beside a field whose annotation has quotes.
Precision = Literal["auto", "no", "bf16"]
Scheduler = Literal["MultiStepLR", "CosineAnnealingLR"]
Shard = Literal["auto", "none", "fsdp", "zero2", "zero3"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
_ADAPTER_FLAGS = (
    *("lora_rank", "lora_expert_rank", "lora_alpha", "lora_targets", "use_rslora", "use_dora", "lora_dropout"),
    "merge_lora_during_training",
)
TRACKERS = ("tensorboard", "wandb", "trackio", "none")


@dataclass
class TrainConfig:
    # Model and data
    policy: str = limited("", choices=FAMILIES)  # openvla | pi0 | pi05; default: what the base checkpoint is
    vla_path: str = "openvla/openvla-7b"  # Base checkpoint: local folder or hub id; with --resume a *_chkpt folder
    data_root_dir: Path = Path("datasets/rlds")  # Folder that holds the RLDS datasets
    dataset_name: str = "libero_spatial_no_noops"  # A dataset, a comma list of datasets, or a named mixture
    run_root_dir: Path = Path("runs")  # Checkpoints and logs go below this folder
    dataset_file: str = ""  # JSON or YAML file that describes datasets of your own
    platform: str = "libero"  # Chunk length, action and proprio sizes: libero | aloha | bridge | a JSON or YAML file
    shuffle_buffer_size: int = 100_000  # Accepted for compatibility: shuffling is exact and needs no buffer

    # Part of the training episodes to use, drawn with the seed for every instruction
    data_fraction: float = limited(1.0, above=0, most=1)

    # Inputs and heads
    # The dataset's first cameras: 1 primary image, 2 adds the wrist, 3 both wrists
    num_images_in_input: int = limited(1, least=1)
    use_proprio: bool = False  # Robot state as one more token
    use_film: bool = False  # Language conditions the vision backbone (FiLM)
    use_l1_regression: bool = True  # Continuous head trained with the L1 loss
    use_diffusion: bool = False  # Continuous head trained by diffusion (DDIM); neither: discrete action tokens
    num_diffusion_steps_train: int = limited(50, least=1)  # Diffusion steps during training
    # pi0, pi0.5: noises and times drawn for each sample, on one pass of the prefix
    repeated_diffusion_steps: int = limited(1, least=1)

    # Optimization
    batch_size: int = limited(8, least=1)  # Samples per process and forward pass
    learning_rate: float = limited(5e-4, above=0)  # Peak learning rate (AdamW)
    weight_decay: float = limited(0.01, least=0)  # AdamW weight decay
    adam_beta2: float = limited(0.999, least=0, below=1)  # AdamW's decay of squared gradients
    optimizer: Optimizer = "adamw"  # adamw | adamw_8bit | paged_adamw_8bit (bitsandbytes, on GPUs)
    max_grad_norm: float = limited(0.0, least=0)  # Gradient norm clip; 0 does not clip
    skip_nonfinite: bool = False  # Leave out batches whose gradient is not finite; every step waits for the device
    # Leave out batches whose loss is above this many times the median of the last 100 steps; 0: none
    skip_spikes: float = limited(0.0, least=0)
    # Decay of a moving average of the weights, which checkpoints and validation then use; 0: none
    ema_decay: float = limited(0.0, least=0, below=1)
    lr_warmup_steps: int = limited(0, least=0)  # Linear warm-up from a tenth of the rate
    scheduler: Scheduler = "MultiStepLR"  # MultiStepLR | CosineAnnealingLR
    final_learning_rate: float = limited(0.0, least=0)  # CosineAnnealingLR: where it ends
    num_steps_before_decay: int = limited(100_000, least=1)  # MultiStepLR: x0.1 after this many steps
    grad_accumulation_steps: int = limited(1, least=1)  # Forward passes per optimizer step
    max_steps: int = limited(200_000, least=1)  # Optimizer steps
    mixed_precision: Precision = "auto"  # auto (bf16 where the device is fast at it) | no | bf16
    # Divide weights, gradients and optimizer among the processes: fsdp | zero2 | zero3 | none | auto (the launcher's)
    shard: Shard = "auto"
    gradient_checkpointing: bool = False  # Recompute the LLM's blocks in the backward pass: less memory, more time
    use_val_set: bool = False  # Measure validation losses
    val_freq: int = limited(10_000, least=1)  # Steps between validations
    val_time_limit: int = limited(180, least=1)  # Seconds one validation may take
    # With --use_val_set, hold out this part of the episodes of datasets without a val split
    val_fraction: float = limited(0.0, least=0, below=1)
    seed: int = limited(42, least=0, most=2**31 - 1)  # Seed of initialization, shuffling and augmentation

    # Checkpoints
    save_freq: int = limited(10_000, least=1)  # Steps between checkpoints (one is always written at the end)
    save_specific_steps: str = numbers("")  # Further steps to save at, as a comma list
    # Newest checkpoints to keep, beside those of save_specific_steps; 0: all
    keep_checkpoints: int = limited(0, least=0)
    keep_best: bool = False  # With --keep_checkpoints and --use_val_set: also the one of least validation loss
    save_latest_checkpoint_only: bool = False  # Keep one checkpoint, overwritten, in the run's folder
    # Go on: from the checkpoint or run folder --vla_path, else from this run's newest checkpoint, else begin
    resume: bool = False
    resume_step: int | None = None  # Step of that checkpoint (default: read from it)
    base_checkpoint: str = ""  # With --resume: the base model, when it is not where the adapter says
    # Diffusion: steps between samplings of whole chunks to log their error; 0: never
    diffusion_sample_freq: int = limited(50, least=0)

    # Data loading
    image_aug: bool = True  # Random crop and color jitter
    image_crop: bool = True  # pi0, pi0.5: with --image_aug, crop too; False: colors alone
    augment_on_device: bool = False  # Augment whole batches on the training device instead of in the loader
    num_workers: int = limited(1, least=0)  # Loader processes

    # LoRA
    use_lora: bool = True  # False trains every weight of the model
    lora_rank: int = limited(32, least=1)  # Rank
    lora_expert_rank: int = limited(0, least=0)  # pi0, pi0.5: rank in the action expert; 0: that of --lora_rank
    lora_alpha: int = limited(0, least=0)  # Alpha; 0: min(rank, 16), for pi0 and pi0.5 the rank
    lora_targets: str = "all-linear"  # Layers that get an adapter, by the end of their names: q_proj,v_proj
    use_rslora: bool = False  # Scale the adapters by alpha / sqrt(rank) instead of alpha / rank
    use_dora: bool = False  # Adapters that train each row's norm apart from its direction (DoRA)
    lora_dropout: float = limited(0.0, least=0, below=1)  # Dropout on LoRA's input
    merge_lora_during_training: bool = True  # Also write the merged model into every checkpoint

    # Logging

    # Comma list of tensorboard | wandb | trackio | none; JSONL is always written
    trackers: str = names("tensorboard", choices=TRACKERS)
    wandb_entity: str = ""  # Weights & Biases entity
    wandb_project: str = "rocket-vla"  # Weights & Biases project
    wandb_log_freq: int = limited(10, least=1)  # Steps between log lines, for every logger
    run_id_note: str | None = None  # Added at the end of the run's name
    run_id_override: str | None = None  # The run's name

    def __post_init__(self) -> None:
        self.starts_anew = False  # With --resume, no checkpoint yet: what a killed start left is no run to keep

    @property
    def objective(self) -> str:
        """Objective of the actions: "l1", "diffusion" or "discrete" tokens."""
        if self.use_l1_regression:
            return "l1"
        return "diffusion" if self.use_diffusion else "discrete"

    @property
    def extra_save_steps(self) -> frozenset[int]:
        """`save_specific_steps` as numbers."""
        return frozenset(split_numbers("--save_specific_steps", self.save_specific_steps))

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The chosen loggers beside JSONL."""
        return tuple(name for name in split_names(self.trackers) if name != "none")

    def validate(self) -> None:
        """Refuse what cannot run.

        Raises UsageError: one line that names the flag, what was found and what is accepted.
        """
        check(self)
        if self.resume:
            self._find_resumed()
        self._tell_idle_adapter_flags()
        if self.use_l1_regression and self.use_diffusion:
            raise UsageError("--use_l1_regression and --use_diffusion: both are True; accepted: at most one of them")
        get_platform(self.platform)
        if self.dataset_file:
            read_datasets(Path(self.dataset_file))
        if self.val_fraction and not self.use_val_set:
            raise UsageError(f"--val_fraction: {self.val_fraction} without --use_val_set; accepted: 0, or both of them")
        if self.keep_best and not (self.keep_checkpoints and self.use_val_set):
            raise UsageError("--keep_best: True found; accepted: False, or with --keep_checkpoints and --use_val_set")
        if self.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(
                f"--optimizer: {self.optimizer} needs bitsandbytes; accepted: adamw, or after pip install bitsandbytes"
            )
        for name in self.tracker_names:
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"--trackers: {name} is not installed; accepted: none, or after pip install {name}")
        self._validate_paths()

    def _tell_idle_adapter_flags(self) -> None:
        """Without adapters a new run's settings of them change nothing; a resumed run's were given earlier."""
        idle = [f"--{name}" for name in _ADAPTER_FLAGS if getattr(self, name) != getattr(TrainConfig, name)]
        if idle and not self.use_lora and not self.resume and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: {', '.join(idle)} without effect: --use_lora is False", file=sys.stderr)

    def _find_resumed(self) -> None:
        """Let --vla_path be the checkpoint to go on from; a run that has none yet begins with --vla_path."""
        given = Path(self.vla_path)
        if is_checkpoint(given):
            if reason := damage(given):
                raise UsageError(f"--resume: {reason}; accepted: an intact checkpoint")
            return
        self.resume = False
        by_folder = not (given / "config.json").is_file() and is_run(given)
        run_dir = given if by_folder else Path(self.run_root_dir) / self.run_id()
        checkpoint = newest_checkpoint(run_dir)
        if checkpoint is None:
            if by_folder:
                raise UsageError(f"--resume: {given} has no checkpoint yet; accepted: the run's own command")
            if self.resume_step is not None:
                raise UsageError(
                    f"--resume_step: {self.resume_step} found, but {run_dir} has no checkpoint yet; accepted: none, to "
                    "begin, or the checkpoint as --vla_path"
                )
            self.starts_anew = True
            return
        step = saved_step(checkpoint) if self.resume_step is not None else None
        if step not in (None, self.resume_step):
            raise UsageError(
                f"--resume_step: {self.resume_step} found, but the newest intact checkpoint, {checkpoint}, is of step "
                f"{step}; accepted: {step} or none, or another checkpoint as --vla_path"
            )
        if not by_folder and not self.base_checkpoint:
            self.base_checkpoint = str(self.vla_path)
        self.vla_path, self.resume = str(checkpoint), True

    def _validate_paths(self) -> None:
        if not Path(self.data_root_dir).is_dir():
            raise UsageError(f"--data_root_dir: no such folder: {self.data_root_dir}")
        if ".." in Path(self.run_id()).parts or Path(self.run_id()).is_absolute():
            raise UsageError(f"--run_id_override: {self.run_id()} found; accepted: a folder in --run_root_dir")
        run_dir = Path(self.run_root_dir) / self.run_id()
        name, most = run_dir.name, self._longest_run_id()
        if len(name.encode()) > most:
            said = f"a name of {len(name.encode())} bytes found for the run; accepted: at most {most}"
            raise UsageError(f"--run_id_override: {said}, since checkpoints are named NAME--{self.max_steps}_chkpt")
        if not self.resume and not self.starts_anew:
            self._refuse_existing(run_dir)
        local = Path(self.vla_path)
        if not local.is_dir() and not HUB_ID.fullmatch(str(self.vla_path)):
            raise UsageError(
                f"--vla_path: no such folder: {self.vla_path} (and it is no hub id such as openvla/openvla-7b)"
            )
        known = (local / "config.json").is_file() or weight_files(local, MODEL_WEIGHTS[:1])  # openpi's have no config
        if local.is_dir() and not self.resume and not known:
            raise UsageError(f"--vla_path: {local} has no config.json; accepted: a model folder, or --resume True")
        try:
            Path(self.run_root_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run_root_dir: {self.run_root_dir} cannot be a folder ({error})") from None
        refuse_no_folder("--run_root_dir", self.run_root_dir)

    def _refuse_existing(self, run_dir: Path) -> None:
        """An empty log is no run: it is left when training stops before its first line."""
        log = run_dir / LOG_FILE
        if not log.is_file() or not log.stat().st_size:
            return
        checkpoint = run_dir if is_checkpoint(run_dir) else last_checkpoint(run_dir)
        going_on = "--resume True" + (f" --vla_path {checkpoint}" if checkpoint else "")
        raise UsageError(f"--run_id_override: {run_dir} holds a run; accepted: another name, or {going_on}")

    def _longest_run_id(self) -> int:
        """Bytes of the longest name that leaves room for those of the checkpoints."""
        suffix = "" if self.save_latest_checkpoint_only else f"--{self.max_steps}_chkpt"
        return longest_name(self.run_root_dir) - len(suffix)

    def run_id(self) -> str:
        """The run's name: upstream's pattern of model, data and hyperparameters, or `run_id_override`.

        Each stage of training repeats the name of the one before, so a default name is shortened where it must be.
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
        name = f"{name}--{self.run_id_note}" if self.run_id_note else name
        return fitting_name(name, self._longest_run_id())
