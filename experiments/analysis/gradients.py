"""Cosines between gradients: pair with pair, and pair with action loss, per LLM block (Figures 1, 13, 14)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from experiments.analysis.config import GradientsConfig
from experiments.analysis.report import heatmap, line_style, new_figure, save_figure, write_json
from experiments.analysis.subject import Join, Subject
from prismatic.util.errors import UsageError
from rocket_align.analysis.gradients import GradientCosines, GradientReport

_BLOCK = re.compile(r"language_model\.(?:.*\.)?layers\.(\d+)\.")


def block_parameters(vla: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters of every block of the LLM, by the block's number.

    Raises:
        UsageError: none of them trains.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in vla.named_parameters():
        if parameter.requires_grad and (found := _BLOCK.search(name)):
            groups.setdefault(found[1], []).append(parameter)
    if not groups:
        raise UsageError("--checkpoint: no trainable parameter in the language model; accepted: LoRA, or a full model")
    return groups


def measure(config: GradientsConfig, folder: str, join: Join) -> dict[str, Any]:
    """One checkpoint's part of the report; the action loss is the last row and column of every matrix."""
    subject = Subject(config, folder, join)
    groups = block_parameters(subject.module.vla)
    if config.group not in ("all", *groups):
        raise UsageError(f"--block: {config.block} found; accepted: -1, or one of {', '.join(groups)}")
    cosines = GradientCosines(groups)
    for seen in subject.passes(gradients=True):
        with subject.autocast():
            pairs = subject.alignment.pair_losses(
                seen.hidden_states, seen.vision_start, seen.num_vision_tokens, seen.teacher
            )
        cosines.update([*pairs.unbind(), seen.action_loss])
    reports = cosines.result()
    return {
        **subject.describe(),
        "losses": [f"pair {s}-{t}" for s, t in zip(subject.align.student_layers, subject.align.teacher_layers)]
        + ["action"],
        "groups": {name: describe(report) for name, report in reports.items()},
    }


def describe(report: GradientReport) -> dict[str, Any]:
    """One group of parameters in the report, with its averages."""
    cosine = report.cosine_KK.cpu()
    pairs = cosine[:-1, :-1]
    others = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
    return {
        "cosine": cosine,
        "batch_cosine": report.batch_cosine_KK,
        "batch_cosine_std": report.batch_cosine_std_KK,
        "norm": report.norm_K,
        "mean_between_pairs": _mean(others),
        "negative_share_between_pairs": _mean((others < 0).double()[~others.isnan()]),
        "mean_with_action": _mean(cosine[-1, :-1]),
        "alignment_with_action": _summed_with_action(report),
    }


def _mean(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.mean()) if len(kept) else math.nan


def _summed_with_action(report: GradientReport) -> float:
    """Cosine between the action loss's gradient and the sum of the pairs' gradients."""
    gram = torch.nan_to_num(report.cosine_KK) * torch.outer(report.norm_K, report.norm_K)
    length = gram[:-1, :-1].sum().clamp(min=0).sqrt() * report.norm_K[-1]
    return float(gram[-1, :-1].sum() / length) if length > 0 else math.nan


def main(config: GradientsConfig, join: Join) -> int:
    """Measure, write gradients.json and gradients.png."""
    parts = [measure(config, folder, join) for folder in config.checkpoints]
    write_json(config.out_dir / "gradients.json", {"analysis": "gradients", "subjects": parts})
    draw(config, parts)
    where = "all blocks" if config.group == "all" else f"block {config.group}"
    for part in parts:
        group = part["groups"][config.group]
        print(
            f"{part['label']}, {where}: mean cosine between pairs {group['mean_between_pairs']:.3f}, "
            f"of pairs with the action loss {group['mean_with_action']:.3f}"
        )
    return 0


def draw(config: GradientsConfig, parts: list[dict[str, Any]]) -> None:
    """Above: the chosen block's matrix of every checkpoint. Below: averages over the blocks."""
    size = max(1.9, 0.32 * len(parts[0]["losses"]))
    figure = new_figure(max(5.6, (size + 0.5) * len(parts) + 0.8), size + 3.2)
    parts_of_figure: Any = figure.subfigures(2, 1, height_ratios=[size + 0.8, 2.4])
    above, below = parts_of_figure
    grid = above.subplots(1, len(parts), squeeze=False)[0]
    for axes, part in zip(grid, parts):
        labels = [name.removeprefix("pair ") for name in part["losses"]]
        matrix = part["groups"][config.group]["cosine"]
        image = heatmap(axes, matrix, limits=(-1, 1), rows=labels, columns=labels, diverging=True)
        axes.tick_params(axis="x", rotation=60)
        axes.set_title(part["label"])
    where = "all LLM blocks" if config.group == "all" else f"LLM block {config.group}"
    above.colorbar(image, ax=list(grid), label=f"gradient cosine,\n{where}", pad=0.02)
    names = ("mean_between_pairs", "mean_with_action")
    for number, (axes, name) in enumerate(zip(below.subplots(1, 2, sharey=True), names)):
        for line, part in enumerate(parts):
            blocks = [name for name in part["groups"] if name != "all"]
            values = [part["groups"][block][name] for block in blocks]
            axes.plot([int(block) for block in blocks], values, **line_style(line), label=part["label"])
        axes.axhline(0, color="0.6", lw=0.8, zorder=0)
        axes.set(xlabel="LLM block", ylabel="" if number else "mean cosine")
        axes.set_title(("between two pairs", "between a pair and the action loss")[number])
        axes.locator_params(axis="x", integer=True)
        if not number:
            axes.legend(frameon=False)
    save_figure(figure, config.out_dir / "gradients.png")
