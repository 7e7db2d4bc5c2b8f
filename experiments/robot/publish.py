"""Copies of a checkpoint for others, on the model hub or in a folder, with a README filled from its own files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from experiments.report.html import render
from prismatic.checkpoint import layout
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import HUB_ID, read_json, temporary_prefix
from rocket_align.flags import recipe_of

CARD = "README.md"
_LEFT_HERE = (layout.STATE_FILE.parts[0], "tensorboard", "wandb")
# Flags of a run that tell about the machine or the account it ran on, and of no use to others.
_PRIVATE_FLAGS = ("data_root_dir", "run_root_dir", "wandb_entity", "wandb_project", "vggt_cache_dir")
_SHOWN = (
    *layout.POLICY_FLAGS,
    "platform",
    "batch_size",
    "grad_accumulation_steps",
    "learning_rate",
    "scheduler",
    "num_steps_before_decay",
    "lora_rank",
    "image_aug",
    "seed",
    "align_loss_coeff",
    "align_center",
    "align_pair_weights",
    "align_schedule",
    "vla_layers_align",
    "vggt_layers_align",
)


def published_files(folder: Path) -> list[PurePosixPath]:
    """Files others need, relative to a checkpoint folder: all but training state, logs, hidden files and code."""
    names = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and name.parts[0] not in _LEFT_HERE and file.suffix not in (".py", ".jsonl"):
            names.append(PurePosixPath(name.as_posix()))
    return [name for name in names if str(name) != CARD]


def changed_texts(folder: Path, base_model: str) -> dict[str, str]:
    """Texts that are published instead of files, by name: nothing of this machine's folders is in them.

    The run's flags lose what tells about the machine; the adapter names `base_model`, where others find it too.
    """
    texts = {}
    if record := layout.read_record(folder):
        flags = {name: value for name, value in record.items() if name not in _PRIVATE_FLAGS}
        for name, value in flags.items():
            if isinstance(value, str) and Path(value).is_absolute():
                flags[name] = Path(value).name
        texts[layout.RUN_CONFIG] = json.dumps(flags, indent=2) + "\n"
    if (folder / layout.ADAPTER_CONFIG).is_file():
        adapter = {**read_json(folder / layout.ADAPTER_CONFIG), "base_model_name_or_path": base_model}
        texts[layout.ADAPTER_CONFIG.as_posix()] = json.dumps(adapter, indent=2) + "\n"
    return texts


def write_copy(folder: Path, files: Sequence[PurePosixPath], texts: Mapping[str, str], target: Path) -> None:
    """Write the files and texts into the new folder `target`, which appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=temporary_prefix(target)))
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
        for text_name, text in texts.items():
            (temporary / text_name).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(
    folder: Path, files: Sequence[PurePosixPath], texts: Mapping[str, str], repo_id: str, *, private: bool, message: str
) -> str:
    """Commit all at once to the hub repository `repo_id`; returns its address. Raises UsageError if the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    sources: dict[str, str | bytes] = {str(name): str(folder / name) for name in files}
    sources |= {name: text.encode() for name, text in texts.items()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in sources.items()]
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message=message)
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 300)
        raise UsageError(f"--repo_id: {repo_id!r} could not be published: {reason}") from error
    return str(url)


@dataclass(frozen=True)
class CardFacts:
    """Facts of a checkpoint that its card states.

    Attributes:
        base_model: hub id (or name) of the model that was fine-tuned; "" when unknown.
        datasets: names of the data sets whose statistics the checkpoint holds.
        recipe: alignment recipe, "baseline" without alignment; "" when unknown.
        teacher: what the alignment's teacher was called in training.
        step: optimizer steps of training, None when the files do not tell.
        run_config: flags of the run, {} when unknown (a checkpoint of upstream's).
        components: component files, by name.
        merged: the folder holds a whole model; otherwise an adapter of `base_model`.
    """

    base_model: str
    datasets: tuple[str, ...]
    recipe: str
    teacher: str
    step: int | None
    run_config: Mapping[str, object]
    components: Mapping[str, Path]
    merged: bool

    @classmethod
    def from_checkpoint(cls, folder: Path, base_model: str = "") -> CardFacts:
        """Read them from `folder`; `base_model` goes before what it says. Raises UsageError: no policy can act."""
        record = layout.read_record(folder)
        adapter = read_json(folder / layout.ADAPTER_CONFIG) if (folder / layout.ADAPTER_CONFIG).is_file() else {}
        merged = bool(layout.weight_files(folder, layout.MODEL_WEIGHTS))
        if not merged and not adapter:
            raise UsageError(f"--checkpoint: {folder} holds neither a model nor {layout.ADAPTER_CONFIG}")
        statistics = layout.read_statistics(folder)
        if not statistics:
            raise UsageError(f"--checkpoint: {folder} has no {layout.STATISTICS}; no policy can act without it")
        named = base_model or str(adapter.get("base_model_name_or_path") or record.get("vla_path") or "")
        teacher = str(record.get("teacher_path") or record.get("vggt_path") or "")
        recipe = recipe_of(record) if record else ""
        return cls(
            base_model=named if HUB_ID.fullmatch(named) and not Path(named).exists() else Path(named).name,
            datasets=tuple(sorted(statistics)),
            recipe=recipe,
            teacher=Path(teacher).name if recipe not in ("", "baseline") else "",
            step=layout.recorded_step(folder),
            run_config=record,
            components=layout.component_files(folder, "--checkpoint"),
            merged=merged,
        )


def model_card(
    facts: CardFacts,
    repo_id: str,
    license_name: str,
    *,
    dataset_ids: Sequence[str] = (),
    summaries: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of README.md: metadata that the hub reads, then the same for people.

    Args:
        dataset_ids: hub ids of the training data, if they are on the hub.
        summaries: contents of `summary.json` of evaluations.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name = repo_id.rpartition("/")[2]
    results = [
        EvalResult(
            task_type="robotics",
            dataset_type=suite,
            dataset_name=suite,
            metric_type="success_rate",
            metric_name="success rate",
            metric_value=round(row["success_rate"], 4),
        )
        for summary in summaries
        for suite, row in summary["suites"].items()
        if row["success_rate"] is not None
    ]
    family = str(facts.run_config.get("family", "openvla"))
    metadata = ModelCardData(
        license=license_name,
        base_model=facts.base_model if HUB_ID.fullmatch(facts.base_model) else None,
        datasets=list(dataset_ids) or None,
        pipeline_tag="robotics",
        tags=[
            "vision-language-action",
            family.replace("openvla", "openvla-oft"),
            *([facts.recipe] if facts.recipe else []),
        ],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return render(
        "model_card.md",
        metadata=metadata.to_yaml(),
        name=name,
        facts=facts,
        repo_id=repo_id,
        flags=_acting_flags(facts),
        suite=next((key.removesuffix("_no_noops") for key in facts.datasets if key.startswith("libero_")), None),
        shown={name: facts.run_config[name] for name in _SHOWN if facts.run_config.get(name) is not None},
        summaries=summaries,
        other_protocol=any(row.get("identity", {}).get("standard_protocol") is False for row in summaries),
    )


def _acting_flags(facts: CardFacts) -> str:
    """Flags with which the checkpoint is served and evaluated, as far as its files tell."""
    flags = {
        "num_images_in_input": facts.run_config.get("num_images_in_input", 2),
        "use_proprio": facts.run_config.get("use_proprio", "proprio_projector" in facts.components),
        "use_film": layout.VISION in facts.components,
        "use_diffusion": "noisy_action_projector" in facts.components,
    }
    flags["use_l1_regression"] = "action_head" in facts.components and not flags["use_diffusion"]
    return " ".join(f"--{name} {value}" for name, value in flags.items())
