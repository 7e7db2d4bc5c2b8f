"""The layout of a checkpoint folder, and of what lies beside it. Imports torch only to read a state.

{run_id}--{step}_chkpt/
    lora_adapter/                           PEFT adapter (LoRA runs)
    config.json, model.safetensors          the merged model (or the whole model without LoRA)
    tokenizer and preprocessor files        the processor
    action_head--{step}_checkpoint.pt ...   one state dict per component
    dataset_statistics.json                 replaces the `norm_stats` of config.json
    probe.safetensors                       a question to the policy and its answer, see :mod:`.probe`; ours alone
    run_config.json                         the run's flags, its platform, versions; ours alone
    training_state/state.pt                 step, optimizer, data position, random states; ours alone
    training_state/optimizer/               the optimizer of a sharded run, a file a process
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, read_json
from prismatic.vla.platforms import Platform, get_platform

LOG_FILE = "metrics.jsonl"
RUN_CONFIG = "run_config.json"
STATISTICS = "dataset_statistics.json"
MODEL_CONFIG = "config.json"
STATE_FILE = Path("training_state") / "state.pt"
OPTIMIZER_SHARDS = STATE_FILE.with_name("optimizer")
LORA_FOLDER = "lora_adapter"
ADAPTER_CONFIG = Path(LORA_FOLDER) / "adapter_config.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
# Families of policies, by the names of `--policy`.
FAMILIES = ("openvla", "pi0", "pi05")
# Published names of weights that pi0.5 or pi0 alone have: their MLPs for time differ.
PI_MARKS = {"time_mlp_in.weight": "pi05", "action_time_mlp_in.weight": "pi0"}
# Attributes of the trained module with a state-dict file of their own, as upstream names them: the policy's heads,
# the alignment's projectors, and the vision backbone with FiLM layers.
HEADS = ("action_head", "proprio_projector", "noisy_action_projector")
VISION = "vision_backbone"
POLICY_COMPONENTS = (*HEADS, VISION)
COMPONENTS = (*POLICY_COMPONENTS, "align_projectors")
# Flags that decide which parts a policy has and what it sees: trained with the one value, it cannot act with another.
POLICY_FLAGS = ("use_l1_regression", "use_diffusion", "use_film", "use_proprio", "num_images_in_input")
# Those and the flags that change a loaded policy's answers.
ACTING_FLAGS = (
    *POLICY_FLAGS,
    *("num_diffusion_steps_train", "num_diffusion_steps_inference", "center_crop", "load_in_8bit", "load_in_4bit"),
)
# Recorded where it is given; absent from a record: the policy was not told.
DELTA_FLAG = "delta_actions"
# First pattern that matches; safetensors are preferred, as loaders prefer them.
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class PolicyShape(Protocol):
    """Anything with the flags that make a policy, be it of training or of acting."""

    use_l1_regression: bool
    use_diffusion: bool
    use_film: bool
    use_proprio: bool
    num_diffusion_steps_train: int

    @property
    def num_images_in_input(self) -> int:
        """Camera views a sample."""


def checkpoint_folder(run_dir: Path, step: int, *, latest_only: bool) -> Path:
    """The folder for the checkpoint of `step`: beside the run's folder, or in it when only the latest is kept."""
    return run_dir if latest_only else run_dir.with_name(f"{run_dir.name}--{step}_chkpt")


def split_checkpoint_name(name: str) -> tuple[str, int | None]:
    """Run and step of a checkpoint folder's name `{run}--{step}_chkpt`; another name has no step."""
    named = re.search(r"--(\d+)_chkpt$", name)
    return (name[: named.start()], int(named.group(1))) if named else (name, None)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint folder of a run with the highest step, or None."""
    steps = {}
    for folder in run_dir.parent.glob("*_chkpt"):
        run, step = split_checkpoint_name(folder.name)
        if run == run_dir.name and step is not None:
            steps[step] = folder
    return steps[max(steps)] if steps else None


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is one that training wrote, rather than a base model."""
    return (folder / STATE_FILE.parent).is_dir() or (folder / LORA_FOLDER).is_dir()


def component_name(component: str, tag: str) -> str:
    """Name of a component's state-dict file; `tag` is the step, or "latest" where only one checkpoint is kept."""
    return f"{component}--{tag}_checkpoint.pt"


def component_file(folder: Path, component: str, flag: str = "--vla_path") -> Path | None:
    """The state-dict file of a component in a checkpoint folder, or None.

    Of several, it is the one of the step that the folder is named after (`...--{step}_chkpt`), else `--latest_`. Raises
    UsageError: several, and no telling which is meant; the message begins with `flag`, which named the folder.
    """
    files = {file.name: file for file in sorted(folder.glob(component_name(component, "*")))}
    _, step = split_checkpoint_name(folder.resolve().name)
    for tag in ([] if step is None else [str(step)]) + ["latest"]:
        if file := files.get(component_name(component, tag)):
            return file
    if len(files) > 1:
        raise UsageError(f"{flag}: {folder} has several files for {component}, keep one of them: {', '.join(files)}")
    return next(iter(files.values()), None)


def component_files(folder: Path, flag: str = "--vla_path", names: tuple[str, ...] = COMPONENTS) -> dict[str, Path]:
    """The state-dict files of the components that a checkpoint folder holds, by component."""
    files = {name: component_file(folder, name, flag) for name in names}
    return {name: file for name, file in files.items() if file is not None}


def is_pi(names: Iterable[str]) -> bool:
    """Tell by the names of its weights in files whether a model is pi0 or pi0.5."""
    return any(name.removeprefix("model.") in PI_MARKS for name in names)


def weight_files(folder: Path, patterns: tuple[str, ...] = (*MODEL_WEIGHTS, *ADAPTER_WEIGHTS)) -> list[Path]:
    """Weight files of a model or adapter: those of the first pattern that matches any."""
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def adapter_scaling(folder: Path) -> dict[str, Any]:
    """Arguments of `merge_lora_state_dict` that scale a checkpoint's adapters.

    A merged folder has none but, with FiLM, in the vision backbone's file: the run's flags tell their scale.
    """
    file = folder / ADAPTER_CONFIG
    settings = read_json(file) if file.is_file() else read_record(folder)
    return {"alpha": settings.get("lora_alpha") or None, "rank_stabilized": bool(settings.get("use_rslora"))}


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint's run recorded: flags by name and more; {} for upstream's checkpoints, that have none."""
    file = folder / RUN_CONFIG
    return read_json(file) if file.is_file() else {}


def recorded_policy_flags(folder: Path) -> dict[str, Any]:
    """Flags that act as a checkpoint's run trained, as far as it recorded them: inputs, heads, and the crop."""
    record = read_record(folder)
    flags = {name: record[name] for name in POLICY_FLAGS if name in record}
    return flags | ({"center_crop": record["image_aug"]} if "image_aug" in record else {})


def acting_flags(flags: object, left_out: Collection[str] = ()) -> dict[str, object]:
    """The `flags` of a policy that a record of its answers names."""
    told = {name: getattr(flags, name, None) for name in ACTING_FLAGS if name not in left_out}
    given = getattr(flags, DELTA_FLAG, "")
    return {**told, DELTA_FLAG: given} if given else told


def recorded_platform(folder: Path) -> Platform | None:
    """The platform a checkpoint folder was trained for, as its run recorded it; None where there is no record.

    Raises UsageError: the record names a platform that is not known here and does not give its numbers.
    """
    record = read_record(folder)
    if numbers := record.get("platform_numbers"):
        return Platform.from_json(numbers, str(folder / RUN_CONFIG))
    if not (named := record.get("platform")):
        return None
    try:
        return get_platform(named)
    except UsageError as error:
        example = '"platform_numbers": {"name": ..., "chunk": ..., "action_dim": ..., "proprio_dim": ..., ...}'
        raise UsageError(f"{folder / RUN_CONFIG}: {error}, or the numbers beside it, as in {example}") from error


def recorded_step(folder: Path) -> int | None:
    """Training step that the names of a folder and its component files tell, or None."""
    names = [folder.resolve().name, *(file.name for file in component_files(folder).values())]
    steps = (re.search(r"--(\d+)_(?:chkpt|checkpoint\.pt)$", name) for name in names)
    return next((int(step.group(1)) for step in steps if step), None)


def read_statistics(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Data set name -> {"action": {...}, "proprio": {...}}, else the `norm_stats` of the model's `config`, else {}.

    Raises UsageError: they have another form.
    """
    file = folder / STATISTICS
    if file.is_file():
        statistics: Any = read_json(file)
    else:
        file = folder / MODEL_CONFIG
        if config is None:
            config = read_json(file) if file.is_file() else {}
        statistics = config.get("norm_stats") or {}
    for data in statistics.values() if isinstance(statistics, Mapping) else [statistics]:
        kinds = [data.get(kind, {}) for kind in ("action", "proprio")] if isinstance(data, Mapping) else [data]
        if not all(isinstance(kind, Mapping) for kind in kinds):
            form = '{"action": {"mean": [...], ...}, "proprio": {...}}'
            raise UsageError(f"{file}: statistics of a data set are {data!r:.60}; accepted: {form}")
    return dict(statistics)


def load_training_state(folder: Path, *, lazily: bool = False) -> dict[str, Any] | None:
    """The `training_state` of a checkpoint folder, or None for a checkpoint of upstream's, which has none.

    `lazily` leaves tensors on disk until they are used: for who wants a number, not the optimizer's moments. Raises
    UsageError: the file cannot be read.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    import torch  # The checks of a folder without a state do without it.

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
    except DAMAGED as error:
        raise UsageError(f"{file}: not readable, cut off? ({one_line(error, 120)})") from error


def saved_step(folder: Path) -> int | None:
    """The step of a checkpoint folder by its training state, else by its name; None where neither tells it."""
    state = load_training_state(folder, lazily=True)
    return split_checkpoint_name(folder.name)[1] if state is None else int(state["step"])
