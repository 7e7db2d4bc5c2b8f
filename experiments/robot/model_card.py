"""The README of a published checkpoint, filled from its own files and, when given, results of evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report import markdown_table, percent, percent_range
from experiments.robot.checkpoint import COMPONENTS
from prismatic.training.folders import component_file
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json
from prismatic.util.hub import HUB_ID

_FLAGS = ("num_images_in_input", "use_proprio", "use_film", "use_l1_regression", "use_diffusion")
_SHOWN = (
    *_FLAGS,
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
    "vla_layers_align",
    "vggt_layers_align",
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a checkpoint.

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
    run_config: Mapping[str, Any]
    components: Mapping[str, Path]
    merged: bool

    @classmethod
    def of_checkpoint(cls, folder: Path, base_model: str = "") -> CardFacts:
        """Read them from the files of `folder`; `base_model` goes before what they say.

        Raises:
            UsageError: no statistics, so that nobody could act with the checkpoint.
        """
        run_config = _read_if_there(folder / "run_config.json")
        adapter = _read_if_there(folder / "lora_adapter" / "adapter_config.json")
        merged = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        if not merged and not adapter:
            raise UsageError(f"--checkpoint: {folder} holds neither a model nor lora_adapter/")
        statistics = _read_if_there(folder / "dataset_statistics.json") or _norm_stats(folder)
        if not statistics:
            raise UsageError(f"--checkpoint: {folder} has no dataset_statistics.json; no policy can act without it")
        components = {name: component_file(folder, name, "--checkpoint") for name in (*COMPONENTS, "align_projectors")}
        named = base_model or str(adapter.get("base_model_name_or_path") or run_config.get("vla_path") or "")
        teacher = str(run_config.get("teacher_path") or run_config.get("vggt_path") or "")
        aligned = teacher or run_config.get("feature_store")
        recipe = str(run_config.get("recipe") or ("rocket" if aligned else "baseline"))
        return cls(
            base_model=named if HUB_ID.fullmatch(named) and not Path(named).exists() else Path(named).name,
            datasets=tuple(sorted(statistics)),
            recipe=recipe if run_config else "",
            teacher=Path(teacher).name if recipe != "baseline" else "",
            step=_step_of(folder, [file for file in components.values() if file is not None]),
            run_config=run_config,
            components={name: file for name, file in components.items() if file is not None},
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
    metadata = ModelCardData(
        license=license_name,
        base_model=facts.base_model if HUB_ID.fullmatch(facts.base_model) else None,
        datasets=list(dataset_ids) or None,
        pipeline_tag="robotics",
        tags=["vision-language-action", "openvla-oft", *([facts.recipe] if facts.recipe else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    sections = [f"# {name}", _introduction(facts), "## Loading", _loading(facts, repo_id)]
    if facts.run_config:
        sections += ["## Training", _training(facts)]
    if summaries:
        sections += ["## Success rates", _table(summaries)]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _norm_stats(folder: Path) -> dict[str, Any]:
    return _read_if_there(folder / "config.json").get("norm_stats") or {}


def _step_of(folder: Path, components: Sequence[Path]) -> int | None:
    names = [folder.resolve().name, *(file.name for file in components)]
    found = (re.search(r"--(\d+)_(?:chkpt|checkpoint\.pt)$", name) for name in names)
    return next((int(match.group(1)) for match in found if match), None)


def _introduction(facts: CardFacts) -> str:
    kind = "A vision-language-action policy" if facts.merged else "A LoRA adapter of a vision-language-action policy"
    text = f"{kind} in OpenVLA-OFT's checkpoint layout"
    text += f", fine-tuned from `{facts.base_model}`" if facts.base_model else ""
    text += f" on {', '.join(f'`{name}`' for name in facts.datasets)}"
    text += f" for {facts.step:,} steps" if facts.step is not None else ""
    if facts.recipe and facts.recipe != "baseline":
        teacher = f"the 3D teacher `{facts.teacher}`" if facts.teacher else "a 3D teacher's stored features"
        text += f". Its hidden states were aligned with {teacher} (recipe `{facts.recipe}`); "
        text += "the teacher is not needed to use it"
    return text + "."


def _loading(facts: CardFacts, repo_id: str) -> str:
    flags = {
        "num_images_in_input": facts.run_config.get("num_images_in_input", 2),
        "use_proprio": "proprio_projector" in facts.components,
        "use_film": "vision_backbone" in facts.components,
        "use_diffusion": "noisy_action_projector" in facts.components,
    }
    flags["use_l1_regression"] = "action_head" in facts.components and not flags["use_diffusion"]
    words = " ".join(f"--{name} {value}" for name, value in flags.items())
    lines = [f"python vla-scripts/deploy.py --pretrained_checkpoint {repo_id} {words}"]
    suites = [name for name in facts.datasets if name.startswith("libero_")]
    if suites:
        suite = suites[0].removesuffix("_no_noops")
        command = "python experiments/robot/libero/run_libero_eval.py"
        lines.append(f"{command} --pretrained_checkpoint {repo_id} --task_suite_name {suite} {words}")
    keys = ", ".join(f"`{name}`" for name in facts.datasets)
    return "```bash\n" + "\n".join(lines) + f"\n```\n\nKeys of the statistics (`--unnorm_key`): {keys}."


def _training(facts: CardFacts) -> str:
    rows = [("data", facts.run_config.get("dataset_name")), ("recipe", facts.recipe)]
    rows += [(name, facts.run_config[name]) for name in _SHOWN if facts.run_config.get(name) is not None]
    return "\n".join(markdown_table(("flag", "value"), ((name, str(value)) for name, value in rows), text_columns=2))


def _table(summaries: Sequence[Mapping[str, Any]]) -> str:
    rows, notes = [], []
    for summary in summaries:
        for suite, row in summary["suites"].items():
            if row["success_rate"] is not None:
                episodes = str(row["successes"] + row["failures"])
                interval = percent_range(row["interval_95"], 1)
                rows.append((suite, percent(row["success_rate"]), interval, episodes, str(row["errors"])))
        if summary.get("identity", {}).get("standard_protocol") is False:
            notes.append("Some of these were not measured by LIBERO's published protocol.")
    lines = markdown_table(("suite", "success", "95% interval", "episodes", "errors"), rows)
    return "\n".join(lines) + ("\n\n" + notes[0] if notes else "")
