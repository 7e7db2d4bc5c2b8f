"""Gradient coherence on checkpoints: cosines between gradients, pair with pair and pair with action loss, per LLM
block (Figures 1, 13, 14), and both sides of the theorem's bound."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from experiments.analysis.config import GradientsConfig, TheoremConfig
from experiments.analysis.loaded_checkpoint import LoadedCheckpoint, counted_tokens
from experiments.analysis.report import Report, heatmap, line_style, new_figure, save_figure, subfigures, write_json
from prismatic.util.errors import UsageError
from rocket_align.analysis.gradients import (
    GradientCosines,
    GradientReport,
    TheoremCheck,
    TheoremReport,
    cosines_of_gram,
)

_BLOCK = re.compile(r"language_model\.(?:.*\.)?layers\.(\d+)\.")


def block_parameters(vla: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters of every block of the LLM, by its number. Raises UsageError when none trains."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in vla.named_parameters():
        if parameter.requires_grad and (block := _BLOCK.search(name)):
            groups.setdefault(block[1], []).append(parameter)
    if not groups:
        raise UsageError("--checkpoint: no trainable parameter in the language model; accepted: LoRA, or a full model")
    return groups


def measure_gradients(config: GradientsConfig, folder: str) -> Report:
    """One checkpoint's part of the report; the action loss is the last row and column of every matrix."""
    checkpoint = LoadedCheckpoint(config, folder)
    groups = block_parameters(checkpoint.module.vla)
    if config.group not in ("all", *groups):
        raise UsageError(f"--block: {config.block} found; accepted: -1, or one of {', '.join(groups)}")
    cosines = GradientCosines(groups)
    for forward in checkpoint.passes(gradients=True):
        with checkpoint.autocast():
            pairs = checkpoint.alignment.pair_losses(
                forward.hidden_states,
                forward.vision_start,
                forward.num_vision_tokens,
                forward.teacher,
                forward.mask_BN,
            )
        cosines.update([*pairs.unbind(), forward.action_loss])
    reports = cosines.result()
    return {
        **checkpoint.describe(),
        "losses": [f"pair {s}-{t}" for s, t in zip(checkpoint.align.student_layers, checkpoint.align.teacher_layers)]
        + ["action"],
        "groups": {name: describe_group(report) for name, report in reports.items()},
    }


def describe_group(report: GradientReport) -> Report:
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


def gradients(config: GradientsConfig) -> int:
    """Measure, write gradients.json and gradients.png."""
    parts = [measure_gradients(config, folder) for folder in config.checkpoints]
    write_json(config.out_dir / "gradients.json", {"analysis": "gradients", "subjects": parts})
    draw_gradients(config, parts)
    where = "all blocks" if config.group == "all" else f"block {config.group}"
    for part in parts:
        group = part["groups"][config.group]
        print(
            f"{part['label']}, {where}: mean cosine between pairs {group['mean_between_pairs']:.3f}, "
            f"of pairs with the action loss {group['mean_with_action']:.3f}"
        )
    return 0


def draw_gradients(config: GradientsConfig, parts: list[Report]) -> None:
    """Above: the chosen block's matrix of every checkpoint. Below: averages over the blocks."""
    size = max(1.9, 0.32 * len(parts[0]["losses"]))
    figure = new_figure(max(5.6, (size + 0.5) * len(parts) + 0.8), size + 3.2)
    above, below = subfigures(figure, 2, 1, height_ratios=[size + 0.8, 2.4])
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


def measure_theorem(config: TheoremConfig, folder: str) -> Report:
    checkpoint = LoadedCheckpoint(config, folder)
    check = TheoremCheck(checkpoint.alignment, reference=config.reference)  # type: ignore[arg-type]
    for forward in checkpoint.passes():
        both = checkpoint.aligned_tokens(forward), checkpoint.aligned_targets(forward)
        for tokens, targets in zip(*(counted_tokens(forward, part) for part in both), strict=True):
            check.update(tokens, targets)
    return {**checkpoint.describe(), **describe_bound(check.result())}


def describe_bound(report: TheoremReport) -> Report:
    """The measured terms, and their averages over pairs."""
    others = ~torch.eye(len(report.inner_KK), dtype=torch.bool)
    sizes = report.inner_KK.diagonal().sqrt()
    scale = torch.outer(sizes, sizes)

    def share(values: Tensor) -> float:
        return float(values.cpu()[others].double().mean()) if others.any() else 1.0

    return {
        "tokens": report.tokens,
        "c": report.c,
        "eta": report.eta,
        "inner": report.inner_KK,
        "feature_inner": report.features_KK,
        "delta": report.delta_KK,
        "bound": report.bound_KK,
        "holds": report.holds_KK,
        "holds_for_every_pair": bool(report.holds_KK.all()),
        "cosine": cosines_of_gram(report.inner_KK),
        "feature_cosine": cosines_of_gram(report.features_KK),
        "relative_bound": report.bound_KK / scale,
        "mean_cosine": share(cosines_of_gram(report.inner_KK)),
        "mean_feature_cosine": share(cosines_of_gram(report.features_KK)),
        "mean_relative_delta": share(report.delta_KK.abs() / scale),
        "bound_above_zero_share": share(report.bound_KK > 0),
        "per_token": {
            "c": report.token_c,
            "eta": report.token_eta,
            "holds_share": share(report.token_holds_KK),
            "bound_above_zero_share": share(report.token_informative_KK),
        },
        "residual_increment": report.increment_K,
    }


def theorem(config: TheoremConfig) -> int:
    """Measure, write theorem.json and theorem.png."""
    parts = [measure_theorem(config, folder) for folder in config.checkpoints]
    write_json(
        config.out_dir / "theorem.json", {"analysis": "theorem", "reference": config.reference, "subjects": parts}
    )
    draw_theorem(config, parts)
    for part in parts:
        print(
            f"{part['label']}: c {part['c']:.3g}, eta {part['eta']:.3f}, mean cos(v_a, v_b) {part['mean_cosine']:.3f}, "
            f"mean |Delta| / |v_a||v_b| {part['mean_relative_delta']:.3f}; the bound holds for "
            f"{'every pair' if part['holds_for_every_pair'] else 'NOT every pair'}, and is above zero for "
            f"{part['bound_above_zero_share']:.0%} of them"
        )
    return 0


def draw_theorem(config: TheoremConfig, parts: list[Report]) -> None:
    """Per checkpoint the cosines of what arrives at the states; then measured inner product against bound."""
    size = max(1.9, 0.3 * len(parts[0]["student_layers"]))
    figure = new_figure((size + 0.4) * len(parts) + 3.7, size + 0.9)
    left, right = subfigures(figure, 1, 2, width_ratios=[(size + 0.4) * len(parts) + 0.7, 3.0])
    grid = left.subplots(1, len(parts), squeeze=False)[0]
    for axes, part in zip(grid, parts):
        labels = [f"{s}-{t}" for s, t in zip(part["student_layers"], part["teacher_layers"])]
        image = heatmap(axes, part["cosine"].cpu(), limits=(-1, 1), rows=labels, columns=labels, diverging=True)
        axes.tick_params(axis="x", rotation=60)
        axes.set_title(part["label"])
    left.colorbar(image, ax=list(grid), label=r"cos($v_a$, $v_b$)", pad=0.02)
    axes = right.subplots()
    lowest = 0.0
    for number, part in enumerate(parts):
        upper = torch.triu(torch.ones_like(part["inner"], dtype=torch.bool), diagonal=1).cpu()
        bound = part["relative_bound"].cpu()[upper]
        lowest = min([lowest, *bound.tolist()])  # A single pair has no bound.
        axes.plot(bound, part["cosine"].cpu()[upper], ls="", **line_style(number), label=part["label"])
    axes.plot([max(lowest, -1), 1], [max(lowest, -1), 1], color="0.5", lw=0.8, zorder=0)
    if lowest < -5:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([tick for tick in (-100, -10, -1, 0, 1) if tick >= 2 * lowest])
        axes.xaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.axvline(0, color="0.8", lw=0.8, zorder=0)
    axes.set(xlabel=r"bound / $|v_a||v_b|$", ylabel=r"$\langle v_a, v_b\rangle$ / $|v_a||v_b|$")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, config.out_dir / "theorem.png")
