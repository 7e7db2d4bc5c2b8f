"""Both sides of the theorem's bound on gradient coherence, measured on a trained model."""

from __future__ import annotations

from typing import Any

import torch

from experiments.analysis.config import TheoremConfig
from experiments.analysis.report import heatmap, line_style, new_figure, save_figure, write_json
from experiments.analysis.subject import Join, Subject
from rocket_align.analysis.gradients import cosines_of_gram
from rocket_align.analysis.theorem import TheoremCheck, TheoremReport


def measure(config: TheoremConfig, folder: str, join: Join) -> dict[str, Any]:
    """One checkpoint's part of the report."""
    subject = Subject(config, folder, join)
    check = TheoremCheck(subject.alignment, reference=config.reference)  # type: ignore[arg-type]
    for seen in subject.passes():
        tokens = subject.alignment.student_tokens(seen.hidden_states, seen.vision_start, seen.num_vision_tokens)
        check.update(tokens, subject.alignment.targets(seen.teacher, seen.num_vision_tokens))
    return {**subject.describe(), **describe(check.result())}


def describe(report: TheoremReport) -> dict[str, Any]:
    """The measured terms, and what they say."""
    others = ~torch.eye(len(report.inner_KK), dtype=torch.bool)
    sizes = report.inner_KK.diagonal().sqrt()
    scale = torch.outer(sizes, sizes)

    def share(values: Any) -> float:
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


def main(config: TheoremConfig, join: Join) -> int:
    """Measure, write theorem.json and theorem.png."""
    parts = [measure(config, folder, join) for folder in config.checkpoints]
    write_json(
        config.out_dir / "theorem.json", {"analysis": "theorem", "reference": config.reference, "subjects": parts}
    )
    draw(config, parts)
    for part in parts:
        print(
            f"{part['label']}: c {part['c']:.3g}, eta {part['eta']:.3f}, mean cos(v_a, v_b) {part['mean_cosine']:.3f}, "
            f"mean |Delta| / |v_a||v_b| {part['mean_relative_delta']:.3f}; the bound holds for "
            f"{'every pair' if part['holds_for_every_pair'] else 'NOT every pair'}, and is above zero for "
            f"{part['bound_above_zero_share']:.0%} of them"
        )
    return 0


def draw(config: TheoremConfig, parts: list[dict[str, Any]]) -> None:
    """Per checkpoint the cosines of what arrives at the states; then measured inner product against bound."""
    size = max(1.9, 0.3 * len(parts[0]["student_layers"]))
    figure = new_figure((size + 0.4) * len(parts) + 3.7, size + 0.9)
    parts_of_figure: Any = figure.subfigures(1, 2, width_ratios=[(size + 0.4) * len(parts) + 0.7, 3.0])
    left, right = parts_of_figure
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
        lowest = min(lowest, float(bound.min()))
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
