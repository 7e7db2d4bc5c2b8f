"""Writes checkpoint folders, atomically, with everything a true resume needs; their layout is in :mod:`.layout`.

The folder is written under another name and renamed when it is complete. Only the main process writes; the model is
merged into copies, without touching the weights that are being trained.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from prismatic.checkpoint.layout import (
    COMPONENTS,
    LORA_FOLDER,
    OPTIMIZER_SHARDS,
    RUN_CONFIG,
    STATE_FILE,
    STATISTICS,
    VISION,
    checkpoint_folder,
    component_name,
)
from prismatic.checkpoint.newest import write_checksums
from prismatic.models.lora import FULLY_TRAINED, merge_lora_state_dict, state_dict_without_film
from prismatic.util.files import atomic_path, atomic_write, storage_errors, temporary_prefix

if TYPE_CHECKING:
    from prismatic.checkpoint.probe import Probe
    from prismatic.policies.base import Processor
    from prismatic.training.engine import Engine
    from prismatic.training.module import TrainablePolicy


Weights = Mapping[str, torch.Tensor]


def _part(weights: Weights, module: torch.nn.Module, part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a submodule, from that of the module."""
    prefix = next(f"{name}." for name, candidate in module.named_modules() if candidate is part)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _save_model(folder: Path, vla: Any, weights: Weights, *, merge: bool) -> None:
    """LoRA: the adapter and, when asked, the merged model, formed from copies; else the whole model.

    The model has the plain one's names, as a merge from disk writes them: with FiLM, the vision backbone's component
    file holds the FiLM layers.
    """
    if isinstance(vla, PeftModel):
        # Without its adapters the head is the base model's; by itself PEFT would warn, and write it at every save.
        vla.save_pretrained(str(folder / LORA_FOLDER), state_dict=dict(weights), save_embedding_layers=False)
        if not merge:
            return
        base: Any = vla.get_base_model()
        lora: Any = vla.peft_config[vla.active_adapter]
        scaling = {"alpha_pattern": lora.alpha_pattern, "rank_stabilized": lora.use_rslora}
        plain = merge_lora_state_dict(_part(weights, vla, base), lora.lora_alpha, **scaling)
    else:
        base, plain = vla, dict(weights)
    base.save_pretrained(folder, state_dict=state_dict_without_film(plain))


def _random_state() -> dict[str, object]:
    state: dict[str, object] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put one process's random generators where `training_state` recorded them."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass
class CheckpointWriter:
    """Writes checkpoints of one run."""

    run_dir: Path
    module: TrainablePolicy  # Unwrapped
    engine: Engine  # Holds the module's weights and its optimizer
    processor: Processor  # Saved beside the model
    statistics: Mapping[str, object]  # Of the datasets; a policy cannot act without them
    run_config: Mapping[str, object]  # What the folder records of the run: its flags, and more
    latest_only: bool  # Keep one checkpoint, in the run's folder
    merge: bool  # Also write the merged model
    probe: Callable[[], Probe | None] | None = None  # Records what the policy answers

    def __post_init__(self) -> None:
        self._film = getattr(self.module, "use_film", False)

    def save(self, step: int, position: Mapping[str, object]) -> Path:
        """Write the checkpoint of `step` and return its folder. Call on every process; the main one writes.

        `position` is what a resume needs beside weights, optimizer and random states. Raises UsageError: it cannot be
        written; the checkpoint before is as it was.
        """
        target = checkpoint_folder(self.run_dir, step, latest_only=self.latest_only)
        temporary = target.with_name(f"{temporary_prefix(target)}tmp")
        state = {"step": step, **_training_state(self.engine), **position}
        weights = self.engine.weights(self._written)
        main = self.engine.accelerator.is_main_process
        # Where no process has the whole model, all of them answer.
        probe = self.probe() if self.probe is not None and (main or self.engine.sharded) else None
        self.engine.free_gathered()  # Else the writing process alone would, and gather again alone.
        try:
            with storage_errors(f"checkpoint of step {step}", target.parent):
                if main:
                    shutil.rmtree(temporary, ignore_errors=True)  # Of a killed process.
                    (temporary / STATE_FILE).parent.mkdir(parents=True)
                self.engine.save_optimizer(temporary / OPTIMIZER_SHARDS)
                if main:
                    self._write(temporary, weights, "latest" if self.latest_only else str(step))
                    if probe is not None:
                        probe.write(temporary)
                    with atomic_path(temporary / STATE_FILE) as file:
                        torch.save(state, file)
                    write_checksums(temporary)
                    _move_into_place(temporary, target)
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _written(self, name: str) -> bool:
        """Tell whether a checkpoint holds a tensor: of the base model only where it is merged, or with FiLM."""
        if self.merge or not isinstance(self.module.vla, PeftModel) or not name.startswith("vla."):
            return True
        return ".lora_" in name or FULLY_TRAINED in name or (self._film and f".{VISION}." in name)

    def _write(self, folder: Path, weights: Weights, tag: str) -> None:
        self.processor.save_pretrained(folder)
        _save_model(folder, self.module.vla, _part(weights, self.module, self.module.vla), merge=self.merge)
        vision = self.module.vla.vision_backbone if self._film else None
        for name in COMPONENTS:
            component = vision if name == VISION else getattr(self.module, name)
            if component is not None and (state := _part(weights, self.module, component)):
                torch.save(state, folder / component_name(name, tag))
        atomic_write(folder / STATISTICS, json.dumps(self.statistics, indent=2))
        atomic_write(folder / RUN_CONFIG, json.dumps(self.run_config, indent=2, default=str))


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename a complete folder to `target`.

    One that is there already (the latest-only checkpoint, in the run's folder) is put aside and not filled up; what
    else the run keeps there, its logs, moves on. A kill between the two renames leaves both checkpoints whole, under
    names that begin with a dot.
    """
    if not target.exists():
        temporary.replace(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(target), suffix=".old", dir=target.parent))
    target.replace(aside)
    try:
        temporary.replace(target)
    finally:
        if not target.exists():
            aside.replace(target)
    for entry in aside.iterdir():
        if not (target / entry.name).exists():
            entry.replace(target / entry.name)
    shutil.rmtree(aside)


def _training_state(engine: Engine) -> dict[str, object]:
    """Collect the optimizer, and each process's random state."""
    from accelerate.utils import gather_object

    return {
        "optimizer": engine.optimizer_state(),
        "trained": list(engine.parameters),
        "random": gather_object([_random_state()]),
        "num_processes": engine.accelerator.num_processes,
    }
