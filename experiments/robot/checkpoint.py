"""What a checkpoint folder holds, found out before anything is loaded. Reads JSON and file headers; needs no torch.

A folder is one of
- a merged model: config.json and weights (`model.safetensors`, shards with an index, or `pytorch_model.bin`);
- an adapter: `lora_adapter/` on top of a base model, whose place is `--base_checkpoint`, else what adapter_config.json
  says, looked up as given, beside the adapter and beside the checkpoint folder.
Either may carry component files `{name}--{step}_checkpoint.pt` and `dataset_statistics.json`, which replaces the
`norm_stats` of config.json. A folder with both merged weights and an adapter is taken as merged.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismatic.training.folders import component_file as component_file_in
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json
from prismatic.util.hub import find_folder
from prismatic.vla.platforms import platform_of_statistics, recorded_platform

COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
_SAMPLED_ABOVE = 64 * 2**20  # bytes; larger files are hashed by samples
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be loaded.

    Attributes:
        name: as the user wrote it.
        path: its folder.
        model_path: folder of the model weights and config.json: `path` itself, or the adapter's base model.
        adapter_path: the PEFT adapter to put on top, or None.
        config: contents of `model_path`/config.json, with the platform the policy was trained for.
        statistics: dataset name -> {"action": {...}, "proprio": {...}}.
        components: component name -> state-dict file.
    """

    name: str
    path: Path
    model_path: Path
    adapter_path: Path | None
    config: Mapping[str, Any]
    statistics: Mapping[str, Any]
    components: Mapping[str, Path] = field(default_factory=dict)

    @property
    def processor_path(self) -> Path:
        """Folder of tokenizer and image processor: the checkpoint's, else the base model's."""
        return self.path if (self.path / "preprocessor_config.json").is_file() else self.model_path

    def fingerprint(self) -> str:
        """Hash of every file that influences the policy (16 hex digits).

        Files over 64 MiB enter with their size and 64 evenly spaced samples of 1 MiB: a 15 GB checkpoint in a second.
        """
        files = [*_weight_files(self.model_path), self.model_path / "config.json", *self.components.values()]
        if self.adapter_path is not None:
            files += _weight_files(self.adapter_path) + [self.adapter_path / "adapter_config.json"]
        for name in ("dataset_statistics.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model"):
            files += [folder / name for folder in {self.path, self.processor_path} if (folder / name).is_file()]
        digest = hashlib.sha256()
        for file in sorted(set(files)):
            digest.update(f"{file.name}:{file.stat().st_size}:{_file_hash(file)}\n".encode())
        return digest.hexdigest()[:16]


def open_checkpoint(name: str, base_checkpoint: str | None = None) -> Checkpoint:
    """Find out what the folder or hub id `name` holds.

    Raises:
        UsageError: no such folder, no weights in it, a missing base model, damaged weights, or no statistics.
    """
    path = find_folder("--pretrained_checkpoint", name)
    adapter = path / "lora_adapter"
    if _weight_files(path):
        model_path, adapter_path = path, None
    elif (adapter / "adapter_config.json").is_file():
        model_path, adapter_path = _base_model(path, base_checkpoint), adapter
        _check_weights(adapter)
    else:
        raise UsageError(
            f"--pretrained_checkpoint: {path} holds neither model weights (model*.safetensors, pytorch_model*.bin) "
            "nor lora_adapter/adapter_config.json"
        )
    _check_weights(model_path)
    config = read_json(model_path / "config.json")
    statistics_file = path / "dataset_statistics.json"
    statistics = read_json(statistics_file) if statistics_file.is_file() else config.get("norm_stats")
    if not statistics:
        raise UsageError(
            f"--pretrained_checkpoint: {path} has no dataset_statistics.json and no norm_stats in config.json; "
            "without them actions cannot be un-normalized"
        )
    _settle_platform(config, path, adapter_path, statistics)
    return Checkpoint(name, path, model_path, adapter_path, config, statistics, _find_components(path))


def _settle_platform(
    config: dict[str, Any], path: Path, adapter_path: Path | None, statistics: Mapping[str, Any]
) -> None:
    """Put the platform the policy was trained for into `config`.

    An adapter's base model knows nothing of it: the run's record does. A model without either (upstream's) tells it by
    the widths in its statistics.
    """
    platform = recorded_platform(path) if adapter_path is not None else None
    if platform is None and "platform" not in config:
        platform = platform_of_statistics(statistics)
    if platform is not None:
        config["platform"] = platform.to_dict()


def resolve_unnorm_key(statistics: Mapping[str, Any], requested: str, suite: str) -> str:
    """Which dataset's statistics un-normalize the actions: `requested`, else the suite's, with or without "_no_noops".

    Raises:
        UsageError: that key is not among the statistics; the message lists those that are.
    """
    wanted = requested or suite
    for key in (wanted, f"{wanted}_no_noops"):
        if key in statistics:
            return key
    where = "--unnorm_key" if requested else "--unnorm_key (not given, so the suite's name is tried)"
    raise UsageError(
        f"{where}: no statistics of {wanted!r} in the checkpoint; accepted: {', '.join(sorted(statistics))}"
    )


def component_file(checkpoint: Checkpoint, name: str, flag: str) -> Path:
    """The state-dict file of component `name`, which `flag` asks for.

    Raises:
        UsageError: the checkpoint has none.
    """
    if name not in checkpoint.components:
        present = ", ".join(sorted(checkpoint.components)) or "none"
        raise UsageError(f"{flag}: {checkpoint.path} has no {name}--*_checkpoint.pt (components present: {present})")
    return checkpoint.components[name]


def check_policy_flags(config: Any, checkpoint: Checkpoint, unnorm_key: str) -> None:
    """Compare the flags of a policy (`policy_flags.PolicyFlags`) with what the checkpoint holds and records.

    Raises:
        UsageError: a component is missing, or the policy was trained with other flags (upstream's record none).
    """
    if config.use_l1_regression or config.use_diffusion:
        flag = "--use_l1_regression" if config.use_l1_regression else "--use_diffusion"
        component_file(checkpoint, "action_head", flag)
    if config.use_diffusion:
        component_file(checkpoint, "noisy_action_projector", "--use_diffusion")
    elif "noisy_action_projector" in checkpoint.components and config.use_l1_regression:
        raise UsageError(
            f"--use_l1_regression: {checkpoint.path} holds a diffusion head (noisy_action_projector); "
            "accepted: --use_l1_regression false --use_diffusion true"
        )
    if config.use_proprio:
        component_file(checkpoint, "proprio_projector", "--use_proprio")
        if "proprio" not in checkpoint.statistics[unnorm_key]:
            raise UsageError(f"--use_proprio: the statistics {unnorm_key!r} of the checkpoint have no proprio")
    if config.use_film:
        component_file(checkpoint, "vision_backbone", "--use_film")
    elif "vision_backbone" in checkpoint.components:
        raise UsageError(f"--use_film: {checkpoint.path} was trained with FiLM; accepted: --use_film true")
    record = checkpoint.path / "run_config.json"
    trained = read_json(record) if record.is_file() else {}
    for flag in ("use_l1_regression", "use_diffusion", "use_film", "use_proprio", "num_images_in_input"):
        if flag in trained and trained[flag] != getattr(config, flag):
            raise UsageError(
                f"--{flag}: found {getattr(config, flag)}; accepted: {trained[flag]}, as {record} says it was trained"
            )


def _base_model(path: Path, base_checkpoint: str | None) -> Path:
    """Folder of the model that the adapter in `path` was trained on."""
    if base_checkpoint:
        return find_folder("--base_checkpoint", base_checkpoint)
    named = read_json(path / "lora_adapter" / "adapter_config.json").get("base_model_name_or_path") or ""
    for folder in (Path(named), path / named, path.parent / named):
        if named and (folder / "config.json").is_file():
            return folder
    try:
        return find_folder("--base_checkpoint", named)
    except UsageError as error:
        raise UsageError(
            f"--base_checkpoint: {path} holds only an adapter, whose base model {named!r} was not found; "
            "give the base model's folder"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Weight files of a model or adapter; safetensors are preferred, as loaders prefer them."""
    names: Iterable[str] = (
        "model*.safetensors",
        "adapter_model.safetensors",
        "pytorch_model*.bin",
        "adapter_model.bin",
    )
    for pattern in names:
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing, incomplete or cut short (an interrupted copy or download)."""
    files = _weight_files(folder)
    if not files:
        raise UsageError(f"{folder}: no weights (model*.safetensors, pytorch_model*.bin) in this folder")
    for index in folder.glob("*.index.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise UsageError(f"{folder}: {index.name} names files that are missing: {', '.join(missing)}")
    for file in files:
        if file.suffix == ".safetensors" and file.stat().st_size != _safetensors_size(file):
            raise UsageError(f"{file}: damaged or cut short ({file.stat().st_size} bytes); copy or download it again")


def _safetensors_size(file: Path) -> int:
    """Size in bytes that the header of a safetensors file promises, -1 when there is no readable header."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else {}
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError):
        return -1


def _find_components(path: Path) -> dict[str, Path]:
    """Component files by name."""
    found = {name: component_file_in(path, name, "--pretrained_checkpoint") for name in COMPONENTS}
    return {name: file for name, file in found.items() if file is not None}


def _file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SAMPLED_ABOVE:
            digest.update(stream.read())
        else:
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
