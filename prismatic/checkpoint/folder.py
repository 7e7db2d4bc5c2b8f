"""Opens checkpoint folders: finds out and checks what they hold before anything is loaded. Reads JSON and file headers.

A folder is one of
- a merged model: config.json and weights (`model.safetensors`, shards with an index, or `pytorch_model.bin`);
- an adapter: `lora_adapter/` on top of a base model, whose place is `--base_checkpoint`, else what adapter_config.json
  says, looked up as given, beside the adapter and beside the checkpoint folder.
A folder with both is taken as merged by :func:`open_checkpoint`, for acting, and as an adapter by
:func:`resolve_checkpoint` when training goes on. Imports no torch, but for the step of a resumed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismatic.checkpoint.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FAMILIES,
    LORA_FOLDER,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    PI_MARKS,
    POLICY_COMPONENTS,
    POLICY_FLAGS,
    PREPROCESSOR,
    RUN_CONFIG,
    STATISTICS,
    TOKENIZER,
    VISION,
    PolicyShape,
    component_files,
    component_name,
    read_record,
    read_statistics,
    recorded_platform,
    saved_step,
    weight_files,
)
from prismatic.models.pi import normalization
from prismatic.util.errors import UsageError
from prismatic.util.files import HUB_ID, find_folder, read_json
from prismatic.vla.platforms import OPENPI_NORMALIZATION, Platform, check_bounds, get_platform, platform_of_statistics

if TYPE_CHECKING:
    from prismatic.training.config import TrainConfig

# Platforms of checkpoints that openpi and LeRobot wrote, whose units are their own.
OPENPI = "openpi"
FOREIGN = (OPENPI, normalization.LEROBOT)
_SAMPLED_ABOVE = 64 * 2**20  # bytes; larger files are hashed by samples
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be loaded."""

    name: str  # As the user wrote it
    path: Path  # Its folder
    model_path: Path  # Folder of the model weights and config.json: `path` itself, or the adapter's base model
    adapter_path: Path | None  # The PEFT adapter to put on top, or None
    config: Mapping[str, Any]  # Contents of `model_path`/config.json, with the platform the policy was trained for
    statistics: Mapping[str, Any]  # Dataset name -> {"action": {...}, "proprio": {...}}
    components: Mapping[str, Path] = field(default_factory=dict)  # Component name -> state-dict file
    family: str = "openvla"  # Of the policy, see `layout.FAMILIES`

    @property
    def processor_path(self) -> Path:
        """Folder of tokenizer and image processor: the checkpoint's, else the base model's."""
        own = PREPROCESSOR if self.family == "openvla" else TOKENIZER
        return self.path if (self.path / own).is_file() else self.model_path

    @property
    def platform(self) -> Platform:
        """The robot it was trained for."""
        return get_platform(self.config.get("platform", "libero"))

    def component(self, name: str, flag: str) -> Path:
        """The state-dict file of component `name`, which `flag` asks for.

        Raises UsageError: the checkpoint has none.
        """
        if name not in self.components:
            present = ", ".join(sorted(self.components)) or "none"
            raise UsageError(f"{flag}: {self.path} has no {component_name(name, '*')} (components present: {present})")
        return self.components[name]

    def fingerprint(self) -> str:
        """Hash of every file that influences the policy (16 hex digits).

        Files over 64 MiB enter with their size and 64 evenly spaced samples of 1 MiB: a 15 GB checkpoint in a second.
        """
        files = [*weight_files(self.model_path), *self.components.values()]
        if (self.model_path / MODEL_CONFIG).is_file():
            files.append(self.model_path / MODEL_CONFIG)
        if self.adapter_path is not None:
            files += [*weight_files(self.adapter_path), self.path / ADAPTER_CONFIG]
        for name in (STATISTICS, PREPROCESSOR, TOKENIZER, "tokenizer.model"):
            files += [folder / name for folder in {self.path, self.processor_path} if (folder / name).is_file()]
        files += normalization.foreign_statistics_files(self.path)
        digest = hashlib.sha256()
        for file in sorted(set(files)):
            digest.update(f"{file.name}:{file.stat().st_size}:{_file_hash(file)}\n".encode())
        return digest.hexdigest()[:16]


def open_checkpoint(name: str, base_checkpoint: str | None = None) -> Checkpoint:
    """Find out what the folder or hub id `name` holds.

    Raises UsageError: no such folder, no weights in it, a missing base model, damaged weights, or no statistics.
    """
    path = find_folder("--pretrained_checkpoint", name)
    if weight_files(path, MODEL_WEIGHTS):
        model_path, adapter_path = path, None
    elif (path / ADAPTER_CONFIG).is_file():
        model_path, adapter_path = _base_model(path, base_checkpoint), path / LORA_FOLDER
        check_weights(adapter_path, ADAPTER_WEIGHTS)
    else:
        raise UsageError(
            f"--pretrained_checkpoint: {path} holds neither model weights ({', '.join(MODEL_WEIGHTS)}) "
            f"nor {ADAPTER_CONFIG}"
        )
    check_weights(model_path)
    config = _model_config(model_path)
    family = _told_family(model_path, config) or "openvla"
    statistics = read_statistics(path, config)
    if not statistics and family != "openvla":
        statistics = normalization.read_foreign_statistics(path)
    if not statistics:
        raise UsageError(
            f"--pretrained_checkpoint: {path} has no {STATISTICS} and no norm_stats in {MODEL_CONFIG}; "
            "without them actions cannot be un-normalized"
        )
    # An adapter's base model knows nothing of the robot: the run's record does. Statistics of a model without either
    # (upstream's) tell it by their widths.
    platform = recorded_platform(path) if adapter_path is not None else None
    if platform is None and "platform" not in config:
        platform = (
            foreign_platform(path, family, config, statistics, next(iter(statistics)))
            if family != "openvla"
            else platform_of_statistics(statistics)
        )
    if platform is not None:
        config["platform"] = platform.to_json()
    components = component_files(path, "--pretrained_checkpoint", POLICY_COMPONENTS)
    return Checkpoint(name, path, model_path, adapter_path, config, statistics, components, family)


def foreign_platform(
    path: Path, family: str, config: Mapping[str, Any], statistics: Mapping[str, Any], key: str
) -> Platform:
    """The robot of a checkpoint of openpi's or LeRobot's: the widths of the statistics `key`, its model's chunk."""
    normalizers = normalization.make_normalizers(statistics[key], key, path, quantiles=False)
    return Platform(
        normalization.LEROBOT if normalization.LEROBOT in statistics else OPENPI,
        chunk=int(config.get("chunk_size") or config.get("action_horizon") or 50),
        action_dim=len(normalizers["action"].mean),
        proprio_dim=len(normalizers["proprio"].mean) if "proprio" in normalizers else 0,
        normalization=OPENPI_NORMALIZATION[family],
    )


def resolve_unnorm_key(statistics: Collection[str], requested: str, suite: str) -> str:
    """Name the statistics that un-normalize the actions: `requested`, else the suite's, with or without "_no_noops".

    Raises UsageError: that key is not among the statistics; the message lists those that are.
    """
    wanted = requested or suite
    for key in (wanted, f"{wanted}_no_noops"):
        if key in statistics:
            return key
    where = "--unnorm_key" if requested else "--unnorm_key (not given, so the suite's name is tried)"
    raise UsageError(
        f"{where}: no statistics of {wanted!r} in the checkpoint; accepted: {', '.join(sorted(statistics))}"
    )


def check_policy_flags(flags: PolicyShape, checkpoint: Checkpoint, unnorm_key: str) -> None:
    """Compare the flags of a policy with what the checkpoint holds and records.

    Raises UsageError: a component is missing, or the policy was trained with other flags (upstream's record none).
    """
    if checkpoint.family != "openvla":
        _check_openpi_flags(flags, checkpoint, unnorm_key)
        return
    if flags.use_l1_regression or flags.use_diffusion:
        checkpoint.component("action_head", "--use_l1_regression" if flags.use_l1_regression else "--use_diffusion")
    if flags.use_diffusion:
        checkpoint.component("noisy_action_projector", "--use_diffusion")
    elif "noisy_action_projector" in checkpoint.components and flags.use_l1_regression:
        raise UsageError(
            f"--use_l1_regression: {checkpoint.path} holds a diffusion head (noisy_action_projector); "
            "accepted: --use_l1_regression false --use_diffusion true"
        )
    if flags.use_proprio:
        checkpoint.component("proprio_projector", "--use_proprio")
        if "proprio" not in checkpoint.statistics[unnorm_key]:
            raise UsageError(f"--use_proprio: the statistics {unnorm_key!r} of the checkpoint have no proprio")
    if flags.use_film:
        checkpoint.component(VISION, "--use_film")
    elif VISION in checkpoint.components:
        raise UsageError(f"--use_film: {checkpoint.path} was trained with FiLM; accepted: --use_film true")
    kinds = ("action", "proprio") if flags.use_proprio else ("action",)
    check_bounds(checkpoint.platform, checkpoint.statistics[unnorm_key], kinds, checkpoint.path)
    _check_recorded(flags, checkpoint, POLICY_FLAGS)


def _check_openpi_flags(flags: PolicyShape, checkpoint: Checkpoint, unnorm_key: str) -> None:
    for flag in ("use_diffusion", "use_film", "load_in_8bit", "load_in_4bit"):
        if getattr(flags, flag, False):
            raise UsageError(f"--{flag}: True found; accepted for {checkpoint.family}: False")
    statistics, quantiles = checkpoint.statistics[unnorm_key], checkpoint.platform.normalization == "quantiles"
    normalization.make_normalizers(statistics, unnorm_key, checkpoint.path, quantiles=quantiles)
    if flags.use_proprio and "proprio" not in statistics:
        raise UsageError(f"--use_proprio: the statistics {unnorm_key!r} of the checkpoint have no proprio")
    _check_recorded(flags, checkpoint, ("use_proprio", "num_images_in_input"))
    if checkpoint.family != "pi05" or "use_proprio" in read_record(checkpoint.path):
        return  # pi0's state is never discrete. Of an adapter the configuration is its base model's.
    told = checkpoint.config.get("discrete_state_input")
    if isinstance(told, bool) and told != flags.use_proprio:
        raise UsageError(
            f"--use_proprio: found {flags.use_proprio}; accepted: {told}, as discrete_state_input in "
            f"{checkpoint.model_path / MODEL_CONFIG} says"
        )


def _check_recorded(flags: PolicyShape, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    trained = read_record(checkpoint.path)
    for flag in names:
        if flag in trained and trained[flag] != getattr(flags, flag):
            raise UsageError(
                f"--{flag}: found {getattr(flags, flag)}; accepted: {trained[flag]}, as "
                f"{checkpoint.path / RUN_CONFIG} says it was trained"
            )


def check_weights(folder: Path, patterns: tuple[str, ...] = MODEL_WEIGHTS) -> list[Path]:
    """Weight files of a folder; refuses missing, incomplete or damaged ones (an interrupted copy or download).

    Raises UsageError: names the files.
    """
    for index in sorted(folder.glob("*.index.json")):
        shards = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise UsageError(f"{folder}: {index.name} names files that are missing: {', '.join(missing)}")
    files = weight_files(folder, patterns)
    if not files:
        raise UsageError(f"{folder}: no weights in this folder; accepted: {', '.join(patterns)}")
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file)
    return files


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # Reads the header and compares it with the file's size.
            pass
    except SafetensorError as error:
        raise UsageError(f"{file}: damaged or cut short ({error}); copy or download it again") from error


def _base_model(path: Path, base_checkpoint: str | None) -> Path:
    """Folder of the model that the adapter in `path` was trained on."""
    if base_checkpoint:
        return find_folder("--base_checkpoint", base_checkpoint)
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    for folder in (Path(named), path / named, path.parent / named):
        if named and (folder / MODEL_CONFIG).is_file():
            return folder
    try:
        return find_folder("--base_checkpoint", named)
    except UsageError as error:
        raise UsageError(
            f"--base_checkpoint: {path} holds only an adapter, whose base model {named!r} was not found; "
            "give the base model's folder"
        ) from error


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


@dataclass
class StartingPoint:
    """The start of a training: the base model; the folder whose adapter and heads it takes, if any; its step; the
    family of the policy."""

    base: str
    checkpoint: Path | None
    step: int
    kind: str = "openvla"


def resolve_checkpoint(config: TrainConfig) -> StartingPoint:
    """Resolve --vla_path and --resume.

    Raises UsageError: the checkpoint's adapter does not name its base model, its step cannot be told, the flags do not
    fit the parts it holds, or there is a model of no known family.
    """
    if not config.resume:
        # Of a hub repository the heads are wanted here; the model itself is fetched by from_pretrained.
        checkpoint = find_folder("--vla_path", str(config.vla_path), ["config.json", "*_checkpoint.pt"])
        _check_components(config, checkpoint)
        return StartingPoint(config.vla_path, checkpoint, 0, _family(config, str(checkpoint)))
    folder = Path(config.vla_path)
    if read_record(folder).get("family", "openvla") == "openvla":
        _check_components(config, folder)  # Other policies' heads are parts of the model.
    base = _base_to_resume(config, folder)
    return StartingPoint(base, folder, _step_to_resume(config, folder), _family(config, base))


def _base_to_resume(config: TrainConfig, folder: Path) -> str:
    if not config.use_lora or not (folder / ADAPTER_CONFIG).is_file():
        return str(folder)
    base = config.base_checkpoint or str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    adapter = folder / ADAPTER_CONFIG
    if not base:
        raise UsageError(f"{adapter}: names no base_model_name_or_path; accepted: the base model's folder or hub id")
    if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
        raise UsageError(f"{adapter}: no such base model: {base}; accepted: another one with --base_checkpoint")
    return base


def _step_to_resume(config: TrainConfig, folder: Path) -> int:
    if config.resume_step is not None:
        return config.resume_step
    step = saved_step(folder)
    if step is None:
        raise UsageError(f"--resume_step: {folder} does not tell its step; accepted: the step as a number")
    return step


def _check_components(config: TrainConfig, folder: Path) -> None:
    """Refuse flags that leave trained parts of a checkpoint out or, in a resume, begin others anew."""
    uses = {
        "action_head": ("--use_l1_regression, --use_diffusion", config.objective != "discrete"),
        "noisy_action_projector": ("--use_diffusion", config.objective == "diffusion"),
        "proprio_projector": ("--use_proprio", config.use_proprio),
        VISION: ("--use_film", config.use_film),
    }
    held = component_files(folder, names=tuple(uses))
    for name, (flag, used) in uses.items():
        if used != (name in held) and (config.resume or (name in held and name == VISION)):
            holds = "holds a" if name in held else "holds no"
            raise UsageError(f"{flag}: {used} found, but {folder} {holds} {name}; accepted: {not used}")


def _family(config: TrainConfig, base: str) -> str:
    """The family of the policy: the base model's own, which `--policy` may name too.

    Of a hub id nothing is known yet: it is OpenVLA's, unless `--policy` or a resumed run says otherwise.
    """
    if not Path(base).is_dir():
        return config.policy or read_record(Path(config.vla_path)).get("family", "openvla")
    file = Path(base) / MODEL_CONFIG
    told = _told_family(Path(base), _model_config(Path(base)))
    if told not in FAMILIES:
        raise UsageError(f"--vla_path: {file}: model_type {told!r} found; accepted: {', '.join(map(repr, FAMILIES))}")
    if config.policy and config.policy != told:
        raise UsageError(f"--policy: {config.policy} found, but {file} is a {told} model; accepted: {told}")
    return str(told)


def _model_config(folder: Path) -> dict[str, Any]:
    """config.json's contents; {} beside weights of openpi's, which need none."""
    file = folder / MODEL_CONFIG
    return {} if not file.is_file() and _told_family(folder, {}) else read_json(file)


def _told_family(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The family that config.json names; openpi's does not, and there the names of the weights tell."""
    if told := config.get("model_type") or config.get("type"):
        return str(told)
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(folder, MODEL_WEIGHTS[:1]):
        _check_safetensors(file)
        with safe_open(file, framework="np") as stored:
            names |= {name.removeprefix("model.") for name in stored.keys()}  # noqa: SIM118 - no dict
    return next((kind for name, kind in PI_MARKS.items() if name in names), None)
