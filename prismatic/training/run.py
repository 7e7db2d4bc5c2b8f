"""One training run, from flags to checkpoints: builds the parts, restores a checkpoint, runs the loop."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import TensorBoardTracker
from accelerate.utils import set_seed
from torch import nn

from prismatic.checkpoint.folder import resolve_checkpoint
from prismatic.checkpoint.layout import (
    LOG_FILE,
    OPTIMIZER_SHARDS,
    RUN_CONFIG,
    component_file,
    load_training_state,
    read_record,
)
from prismatic.checkpoint.load import load_component
from prismatic.checkpoint.newest import checkpoints_of, remove_older
from prismatic.checkpoint.write import CheckpointWriter, restore_random_state
from prismatic.policies import get_family
from prismatic.training.config import TrainConfig
from prismatic.training.ema import WeightAverage, load_trained_weights, trained_weights
from prismatic.training.launch import make_engine
from prismatic.training.loop import Targets, Trainer, TrainState
from prismatic.training.metrics import MetricLog, read_log
from prismatic.training.module import Coefficient, TrainablePolicy, count_parameters, move_batch
from prismatic.training.precision import base_weights_dtype
from prismatic.training.schedule import make_optimizer, make_schedule
from prismatic.training.validation import Validator
from prismatic.util.errors import UsageError
from prismatic.util.versions import code_version, package_versions
from prismatic.vla.datasets import MixtureLoader, MixtureSampler, RLDSDataset, make_dataloader
from prismatic.vla.datasets.dataset_file import register_datasets
from prismatic.vla.datasets.device_augmentation import defer

if TYPE_CHECKING:
    from prismatic.checkpoint.probe import Probe
    from prismatic.policies.base import PolicyFamily, Processor
    from prismatic.vla.batch import Batch
    from prismatic.vla.platforms import Platform

# What a checkpoint records that differs between a run and its resumption, or does not shape training.
NOT_COMPARED_ON_RESUME = {
    *("vla_path", "base_checkpoint", "resume", "resume_step", "max_steps"),
    *("run_root_dir", "run_id_override", "run_id_note", "keep_checkpoints", "keep_best", "code", "versions"),
}


def changed_flags(before: dict[str, Any], flags: dict[str, Any]) -> list[str]:
    """Those of `flags` that differ from what a run recorded `before`, but for where a resumed run has its own."""
    now = json.loads(json.dumps(flags, default=str))
    differing = [name for name in now if name in before.keys() - NOT_COMPARED_ON_RESUME and now[name] != before[name]]
    return [f"--{name} {now[name]} (was {before[name]})" for name in differing]


def make_dataset(
    config: TrainConfig, family: PolicyFamily, processor: Processor, platform: Platform, *, train: bool
) -> RLDSDataset:
    """The training data of the flags (augmented where they say so), or the validation split without augmentation."""
    if config.dataset_file:
        register_datasets(Path(config.dataset_file))
    transform = family.batch_transform(config, processor, platform)
    image_transform = family.image_transform(
        processor, image_aug=config.image_aug and train, image_crop=config.image_crop
    )
    if config.augment_on_device and config.image_aug and train:
        transform, image_transform = defer(transform, image_transform, getattr(processor, "image_processor", None))
    return RLDSDataset(
        config.data_root_dir,
        config.dataset_name,
        transform,
        image_transform.size,
        image_transform=image_transform,
        train=train,
        platform=platform,
        seed=config.seed,
        fraction=config.data_fraction,
        holdout=config.val_fraction if config.use_val_set else 0.0,
    )


class TrainingRun:
    """Holds one run's parts. `fit` takes the auxiliary loss, which this module knows nothing about.

    Args:
        config: validated flags.
        run_config: flags to record in checkpoints, beside the platform's numbers and the versions of code and packages.
        states: the student's hidden states that the auxiliary loss will use.
        pauses: the auxiliary loss is left out at some steps, so what it alone trains gets no gradient then.
    """

    def __init__(
        self, config: TrainConfig, run_config: dict[str, Any], states: Sequence[int] = (), *, pauses: bool = False
    ) -> None:
        self.config, self._states = config, states
        # Records for a checkpoint what the policy answers; evaluation, which knows how to ask, gives it.
        self.probe: Callable[[TrainingRun, TrainablePolicy], Probe | None] | None = None
        self.start = resolve_checkpoint(config)
        self.family = get_family(self.start.kind)
        self.family.check(config, self.start)
        self.platform = self.family.platform(config, self.start.base)
        self.run_config = {
            **run_config,
            "platform_numbers": self.platform.to_json(),  # Where the model is opened, its name may mean nothing.
            "family": self.family.name,
            "code": code_version(),
            "versions": package_versions(),
        }
        self.run_dir = Path(config.run_root_dir) / config.run_id()
        self.engine = make_engine(
            config.shard,
            config.mixed_precision,
            trains_all=not config.use_lora,
            unused_parameters=self.family.unused_parameters or pauses,
            log_with=self._trackers() or None,
            project_dir=str(config.run_root_dir),
        )
        if config.optimizer != "adamw" and (self.engine.sharded or not self.engine.gives_access):
            raise UsageError(
                f"--optimizer: {config.optimizer} found in a sharded run; accepted: adamw, or --shard none"
            )
        self.accelerator = self.engine.accelerator
        for flag in ("skip_nonfinite", "skip_spikes", "ema_decay"):
            if getattr(config, flag) and not self.engine.gives_access:
                raise UsageError(f"--{flag}: {getattr(config, flag)} found with ZeRO; accepted: --shard fsdp, or 0")
        self.device = self.accelerator.device
        self.compute_dtype = self.engine.compute_dtype
        set_seed(config.seed)
        weights_dtype = base_weights_dtype(self.compute_dtype, self.device, frozen=config.use_lora)
        self.processor = self.family.load_processor(self.start.base)
        self.dataset = self._dataset(train=True)
        self.parts = self.family.build(
            config, self.start, self.platform, weights_dtype, states=states, report=self.accelerator.print
        )

    @property
    def vla(self) -> Any:
        """The model, or the PEFT wrapper that passes attributes on to it."""
        return self.parts.vla

    def make_module(self, auxiliary: nn.Module, auxiliary_coeff: Coefficient) -> TrainablePolicy:
        """The module that training wraps, with this auxiliary loss."""
        return self.family.trainable(self.config, self.parts, self.platform, self.processor, auxiliary, auxiliary_coeff)

    def _dataset(self, *, train: bool) -> RLDSDataset:
        return make_dataset(self.config, self.family, self.processor, self.platform, train=train)

    def _loader(self, dataset: RLDSDataset) -> MixtureLoader:
        accelerator = self.accelerator
        sampler = MixtureSampler(
            dataset,
            self.config.batch_size,
            self.config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return make_dataloader(dataset, sampler, self.family.collator(self.processor), self.config.num_workers)

    def batches(self) -> Iterator[Batch]:
        """The training data in training's order, endless, on the device; for who looks instead of training."""
        for batch in self._loader(self.dataset):
            yield move_batch(batch, self.device)

    def fit(self, auxiliary: nn.Module, auxiliary_coeff: Coefficient, targets: Targets) -> TrainState:
        """Train to the end (or to a stop) with the given auxiliary loss; checkpoints are written on the way.

        Its coefficient is a number, or a function of the optimizer step.
        """
        config, accelerator = self.config, self.accelerator
        if accelerator.process_index:
            # All processes made the same weights; noise and dropout are to differ.
            set_seed(config.seed, device_specific=True)
        module = self.make_module(auxiliary, auxiliary_coeff)
        module.last_state_of_text = self.family.depth(self.start.base) not in self._states
        optimizer, scheduler = make_optimizer(module.trainable_parameters(), config)
        loader = self._loader(self.dataset)
        self._restore_auxiliary(module)
        self._describe(module)
        self.engine.prepare(module, optimizer)
        average = WeightAverage(self.engine, config.ema_decay) if config.ema_decay else None
        restored = self._restore(loader)
        if self.start.step:
            scheduler = make_schedule(optimizer, config, self.start.step)
        # ZeRO's stage 3 gathers for the passes that it was shown.
        answers = self.engine.gives_access or not self.engine.sharded
        writer = CheckpointWriter(
            self.run_dir,
            module,
            self.engine,
            processor=self.processor,
            statistics=self.dataset.dataset_statistics,
            run_config=self.run_config,
            latest_only=config.save_latest_checkpoint_only,
            merge=config.merge_lora_during_training,
            probe=functools.partial(self.probe, self, module) if self.probe is not None and answers else None,
        )

        def save(step: int) -> None:
            position = {"sampler": loader.state_dict(), "losses": list(trainer.losses)}
            if average is None:
                folder = writer.save(step, position)
            else:
                position["unaveraged"] = trained_weights(self.engine)
                with average.applied():
                    folder = writer.save(step, position)
            if accelerator.is_main_process:
                accelerator.print(f"saved {folder}")
                self._remove_older()
            accelerator.wait_for_everyone()

        if accelerator.log_with:
            accelerator.init_trackers(config.wandb_project, init_kwargs=self._tracker_options())
        with contextlib.closing(MetricLog(self.run_dir, accelerator, last_step=self.start.step)) as log:
            trainer = Trainer(
                config,
                self.engine,
                scheduler=scheduler,
                targets=targets,
                save=save,
                log=log,
            )
            trainer.loader, trainer.average = loader, average
            if config.use_val_set:
                collate = self.family.collator(self.processor)
                trainer.validate = Validator(
                    config, self.engine, module, self._dataset(train=False), collate=collate, targets=targets
                )
            trainer.losses.extend(restored.get("losses", ()))
            if "random" in restored:
                restore_random_state(restored["random"])
            state = trainer.fit(iter(loader), self.start.step)
        accelerator.end_training()
        return state

    def _remove_older(self) -> None:
        config = self.config
        if not config.keep_checkpoints or config.save_latest_checkpoint_only:
            return
        kept = set(config.extra_save_steps)
        if config.keep_best:
            saved = checkpoints_of(self.run_dir)
            losses = {row["step"]: row["val/loss"] for row in read_log(self.run_dir / LOG_FILE) if "val/loss" in row}
            kept |= {int(step) for step in sorted(losses.keys() & saved.keys(), key=losses.__getitem__)[:1]}
        remove_older(self.run_dir, config.keep_checkpoints, kept)

    def _restore_auxiliary(self, module: TrainablePolicy) -> None:
        if not self.config.resume or self.start.checkpoint is None or not module.align_projectors.state_dict():
            return
        if file := component_file(self.start.checkpoint, "align_projectors"):
            load_component(module.align_projectors, file)

    def _restore(self, loader: MixtureLoader) -> dict[str, Any]:
        """Load a checkpoint's optimizer and data position; return what the loop restores.

        Raises UsageError: damaged files, or an optimizer of other parameters than train here.
        """
        if not self.config.resume or self.start.checkpoint is None:
            return {}
        for line in changed_flags(read_record(self.start.checkpoint), self.run_config):
            self.accelerator.print(f"other than the run it goes on with: {line}")
        state = load_training_state(self.start.checkpoint)
        if state is None:
            self.accelerator.print("the checkpoint has no training_state: optimizer and data start anew")
            return {}
        try:
            self.engine.load_optimizer(state["optimizer"], self.start.checkpoint / OPTIMIZER_SHARDS)
        except ValueError as error:
            raise UsageError(
                f"--resume: the optimizer in {self.start.checkpoint} belongs to other parameters than train here; "
                f"accepted: the flags in its {RUN_CONFIG}"
            ) from error
        if trained := state.get("unaveraged"):
            load_trained_weights(self.engine, trained)  # The folder's weights are their average.
        loader.load_state_dict(state["sampler"])
        if state["num_processes"] != self.accelerator.num_processes:
            # The data go on at the same draw; only the random numbers of diffusion and pooling cannot.
            self.accelerator.print(f"the checkpoint was written by {state['num_processes']} processes")
            return {"losses": state.get("losses", ())}
        return {"losses": state.get("losses", ()), "random": state["random"][self.accelerator.process_index]}

    def _trackers(self) -> list[str | TensorBoardTracker]:
        """The chosen loggers beside JSONL: TensorBoard in the run's folder, the others by name for accelerate."""
        place = (self.run_dir.name, self.config.run_root_dir)
        return [TensorBoardTracker(*place) if name == "tensorboard" else name for name in self.config.tracker_names]

    def _tracker_options(self) -> dict[str, dict[str, str | None]]:
        name = self.run_dir.name
        return {"wandb": {"entity": self.config.wandb_entity or None, "name": name}, "trackio": {"name": name}}

    def _describe(self, module: TrainablePolicy) -> None:
        for name in ("vla", "action_head", "proprio_projector", "noisy_action_projector", "align_projectors"):
            trainable, total = count_parameters(getattr(module, name))
            if total:
                self.accelerator.print(f"{name}: {trainable:,} of {total:,} parameters train")
