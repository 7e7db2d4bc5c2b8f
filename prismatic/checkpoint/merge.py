"""Merging a LoRA adapter into its base model on disk: tensor by tensor, so memory holds a tensor and never a model.

Not obvious:
- Each sum is formed in float32 and rounded once to the type of the file.
- An adapter trained with FiLM names the vision weights as inside the FiLM wrapper; its vision LoRA is merged as well.
  The FiLM layers themselves stay in `vision_backbone--*_checkpoint.pt`, which such a policy loads over the merged
  weights.
- The base model's folder is only read. The result appears when it is complete, the index before the shards, so that an
  interrupted move is recognized and never taken for a model.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoint import layout
from prismatic.checkpoint.folder import check_weights
from prismatic.models.lora import MAGNITUDE, merge_lora_state_dict, name_without_film, own_alpha
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json
from prismatic.util.tensor_files import WEIGHTS_INDEX, TensorFiles, TensorSpec, write_model

_PEFT_PREFIX = "base_model.model."
_ELEMENTS_AT_ONCE = 2**23  # 32 MB of float32
# From the base model, as far as the checkpoint lacks them: what loading the merged folder needs beside weights.
_PROCESSOR_FILES = (
    layout.PREPROCESSOR,
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
# PEFT settings whose meaning is more than "add alpha / rank * B @ A", and the values that ask for nothing.
_PLAIN_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
}


@dataclass(frozen=True)
class LoraAdapter:
    """A PEFT adapter on disk.

    `pairs` maps the name of a base weight to those of its A, B and, with DoRA, row norms; `replaced` maps it to the
    weight that trained in full and takes its place (PEFT's modules_to_save). `alphas` are by name of a base weight.
    """

    files: TensorFiles
    pairs: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, str]
    alphas: Mapping[str, float]
    rank_stabilized: bool

    @classmethod
    def open(cls, folder: Path) -> LoraAdapter:
        """Read the configuration and headers of the adapter in `folder`.

        Raises UsageError: no adapter, a kind that is not plain LoRA, or an A without its B.
        """
        settings_file = folder / layout.ADAPTER_CONFIG.name
        settings = read_json(settings_file)
        for name, plain in _PLAIN_SETTINGS.items():
            if name in settings and settings[name] not in plain:
                raise UsageError(f"{settings_file}: {name} is {settings[name]!r}; accepted: {plain[0]!r}")
        files = TensorFiles(check_weights(folder, layout.ADAPTER_WEIGHTS))
        pairs: dict[str, tuple[str, ...]] = {}
        dora = bool(settings.get("use_dora"))
        for name_a in (name for name in files.specs if ".lora_A." in name):
            name_b = name_a.replace(".lora_A.", ".lora_B.")
            names = (name_a, name_b, name_a.split(".lora_A.")[0] + MAGNITUDE)[: 3 if dora else 2]
            if name_b not in files.specs:
                raise UsageError(f"{folder}: {name_a} has no lora_B; accepted: a whole adapter")
            if names[-1] not in files.specs:
                raise UsageError(f"{settings_file}: use_dora is True; accepted: False where there is no {names[-1]}")
            target = name_without_film(name_a.split(".lora_A.")[0].removeprefix(_PEFT_PREFIX))
            pairs[f"{target}.weight"] = names
        modules = tuple(f"{_PEFT_PREFIX}{module}." for module in settings.get("modules_to_save") or ())
        replaced = {name.removeprefix(_PEFT_PREFIX): name for name in files.specs if name.startswith(modules)}
        known = {name for pair in pairs.values() for name in pair} | set(replaced.values())
        odd = next((name for name in files.specs if name not in known and ".base_layer." not in name), None)
        if odd or not pairs:
            odd = odd or "no lora_A / lora_B pair"
            raise UsageError(f"{folder}: {odd} found; accepted: pairs of lora_A and lora_B weights")
        patterns, alpha = settings.get("alpha_pattern") or {}, float(settings["lora_alpha"])
        alphas = {target: own_alpha(target.removesuffix(".weight"), patterns, alpha) for target in pairs}
        return cls(files, pairs, replaced, alphas, bool(settings.get("use_rslora")))

    def renamed(self, rename: Callable[[str], str]) -> LoraAdapter:
        """The adapter for a base model whose files have other names of weights than its modules."""

        def keyed(held: Mapping[str, Any]) -> dict[str, Any]:
            return {rename(target): value for target, value in held.items()}

        return replace(self, pairs=keyed(self.pairs), replaced=keyed(self.replaced), alphas=keyed(self.alphas))

    def check_fits(self, base: TensorFiles, folder: Path) -> None:
        """Raise UsageError unless every pair and replacement has its weight, of the right shape, among `base`."""
        for target, name in self.replaced.items():
            held = base.specs[target].shape if target in base.specs else "missing"
            if held != self.files.specs[name].shape:
                raise UsageError(
                    f"--base_checkpoint: {target} is {held} in {folder}; accepted: {self.files.specs[name].shape}, as "
                    "in the adapter"
                )
        for target, (name_a, name_b, *_) in self.pairs.items():
            if target not in base.specs:
                raise UsageError(f"--base_checkpoint: {folder} has no {target}, which the adapter changes")
            shape_a, shape_b = self.files.specs[name_a].shape, self.files.specs[name_b].shape
            shape = base.specs[target].shape
            if (shape_b[0], math.prod(shape_a[1:]), shape_a[0]) != (shape[0], math.prod(shape[1:]), shape_b[1]):
                raise UsageError(
                    f"--base_checkpoint: {target} is {shape} in {folder}, but the adapter was trained for "
                    f"{(shape_b[0], *shape_a[1:])} (A {shape_a}, B {shape_b})"
                )

    def differs_from(self, base: TensorFiles) -> str | None:
        """Name of a frozen weight that the adapter's file carries along and `base` has with other values, or None."""
        for name in self.files.specs:
            target = name_without_film(name.removeprefix(_PEFT_PREFIX)).replace(".base_layer.", ".")
            if ".base_layer." in name and target in base.specs:
                carried, own = self.files.read(name), base.read(target)
                if carried.shape != own.shape or not torch.equal(carried.to(own.dtype), own):
                    return target
        return None

    def merged(self, target: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`weight` with the adapter's update added in float32, or what takes its place, as `dtype`."""
        if target in self.replaced:
            return self.files.read(self.replaced[target]).to(dtype)
        if target not in self.pairs:
            return weight.to(dtype)
        lora_a, lora_b, *norms = (self.files.read(name) for name in self.pairs[target])
        name = target.removesuffix(".weight")
        merged = torch.empty(weight.shape, dtype=dtype)
        # Rows at a time: float32 copies of a whole embedding matrix would take more memory than all else.
        count = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(weight.shape[1:])))
        for start in range(0, weight.shape[0], count):
            rows = slice(start, start + count)
            state = {
                f"{name}.base_layer.weight": weight[rows].float(),
                f"{name}.lora_A.default.weight": lora_a,
                f"{name}.lora_B.default.weight": lora_b[rows],
            }
            if norms:
                state[name + MAGNITUDE] = norms[0].flatten()[rows]
            merged[rows] = merge_lora_state_dict(state, self.alphas[target], rank_stabilized=self.rank_stabilized)[
                target
            ]
        return merged


@dataclass(frozen=True)
class MergeReport:
    """Outcome of a merge. `suspicious` names a weight that says the adapter was trained on another base model."""

    folder: Path
    files: tuple[Path, ...]
    num_merged: int
    num_bytes: int
    suspicious: str | None


def merge_checkpoint(
    base: Path, checkpoint: Path, output: Path, *, max_shard_bytes: int, dtype: torch.dtype | None, overwrite: bool
) -> MergeReport:
    """Merge `checkpoint`/lora_adapter into the model in `base`; the result in `output` is a checkpoint of its own.

    Args:
        output: may be `checkpoint` itself, as upstream has it; another folder gets copies of the component files too.
        dtype: of all floating-point weights; None keeps those of the base model.
        overwrite: replace merged weights that are in `output` already.

    Raises:
        UsageError: folders or files that do not fit together; nothing is written then.
    """
    if output.resolve() == base.resolve():
        raise UsageError(f"--output_dir: {output} is the base model, which is never changed; accepted: another folder")
    if _weights_in(output) and not overwrite:
        raise UsageError(f"{output}: holds merged weights; accepted: --overwrite True, or another --output_dir")
    adapter = LoraAdapter.open(checkpoint / layout.LORA_FOLDER)
    weights = TensorFiles(check_weights(base))
    if layout.is_pi(weights.specs):
        adapter = adapter.renamed(_published(weights))
    adapter.check_fits(weights, base)
    specs = [replace(spec, dtype=_target_type(spec, dtype)) for spec in weights.specs.values()]
    config = _merged_config(base, checkpoint)
    _check_space(output, sum(spec.num_bytes for spec in specs))

    def read(name: str) -> torch.Tensor:
        return adapter.merged(name, weights.read(name), _target_type(weights.specs[name], dtype))

    parent = output if output.is_dir() else output.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".merging-"))
    try:
        atomic_write(temporary / layout.MODEL_CONFIG, json.dumps(config, indent=2) + "\n")
        files = write_model(temporary, specs, read, max_shard_bytes)
        _copy_companions(base, checkpoint, output, temporary)
        _move(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return MergeReport(
        folder=output,
        files=tuple(output / file.name for file in files),
        num_merged=len(adapter.pairs) + len(adapter.replaced),
        num_bytes=sum(spec.num_bytes for spec in specs),
        suspicious=adapter.differs_from(weights),
    )


def _published(weights: TensorFiles) -> Callable[[str], str]:
    """From the names of pi0's or pi0.5's modules to those in the files of its base model."""
    from prismatic.models.pi.weights import published_name, published_names

    names = published_names(weights.specs)
    return lambda target: names.get(published_name(target), published_name(target))


def _weights_in(folder: Path) -> list[Path]:
    patterns = (*layout.MODEL_WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin.index.json")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _target_type(spec: TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype


def _merged_config(base: Path, checkpoint: Path) -> dict[str, Any]:
    """The base model's configuration with the run's platform and state in the prompt, where the run tells them."""
    file = base / layout.MODEL_CONFIG
    config = read_json(file) if file.is_file() else {}  # openpi's folders need none.
    if platform := layout.recorded_platform(checkpoint):
        config["platform"] = platform.to_json()
    record = layout.read_record(checkpoint)
    if record.get("family") == "pi05" and "use_proprio" in record:
        config["discrete_state_input"] = record["use_proprio"]
    return config


def _check_space(output: Path, needed: int) -> None:
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UsageError(f"--output_dir: {existing} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")


def _copy_companions(base: Path, checkpoint: Path, output: Path, temporary: Path) -> None:
    """Copy what the merged folder needs beside weights and does not hold yet."""
    if output.resolve() != checkpoint.resolve():
        replaced = {file.name for file in _weights_in(checkpoint)} | {layout.MODEL_CONFIG}
        for file in checkpoint.iterdir():
            if file.is_file() and file.name not in replaced and not (output / file.name).exists():
                shutil.copy2(file, temporary / file.name)
    if not (checkpoint / layout.PREPROCESSOR).is_file():
        for name in _PROCESSOR_FILES:
            if (base / name).is_file() and not (checkpoint / name).is_file():
                shutil.copyfile(base / name, temporary / name)


def _move(temporary: Path, output: Path) -> None:
    """Move a complete folder to `output`, which may exist: old weights go first, the index comes before shards."""
    if not output.exists():
        temporary.chmod(0o755)
        temporary.replace(output)
        return
    for old in _weights_in(output):
        old.unlink()
    for entry in sorted(temporary.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name)):
        entry.replace(output / entry.name)
