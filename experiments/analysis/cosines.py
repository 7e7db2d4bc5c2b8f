"""Cosines on checkpoints: between tokens of every layer and behind the projectors (the cone effect, Figure 4), and
between the pairs' projectors, their weights and outputs (Figure 7)."""

from __future__ import annotations

import torch

from experiments.analysis.config import ConeConfig, ProjectorsConfig
from experiments.analysis.loaded_checkpoint import LoadedCheckpoint, counted_tokens
from experiments.analysis.report import Report, heatmap, line_style, new_figure, save_figure, write_json
from prismatic.util.errors import UsageError
from rocket_align.analysis.cosines import OutputSimilarity, TokenCone, parameter_similarity

KINDS = {
    "fc1": "weights, 1st layer",
    "fc2": "weights, 2nd layer",
    "same_input": "outputs, same input",
    "own_input": "outputs, own input",
}


def measure_cone(config: ConeConfig, folder: str) -> Report:
    """One checkpoint's part of the report: student states, teacher blocks pooled to the student's tokens, and the
    aligned tokens behind each pair's projector."""
    checkpoint = LoadedCheckpoint(config, folder, teacher_layers="all")
    cones: dict[str, list[TokenCone]] = {"student": [], "teacher": [], "projected": []}
    for forward in checkpoint.passes():
        with torch.no_grad(), checkpoint.autocast():
            layers = {"student": checkpoint.student_states(forward), "teacher": checkpoint.teacher_blocks(forward)}
            if checkpoint.align.num_pairs:
                layers["projected"] = checkpoint.alignment.project(checkpoint.aligned_tokens(forward))[0]
            for name, tokens_LBND in layers.items():
                cones[name] = cones[name] or [TokenCone() for _ in tokens_LBND]
                for token_cone, tokens_BND in zip(cones[name], tokens_LBND, strict=True):
                    for (counted_BND,) in counted_tokens(forward, tokens_BND[None], by_sample=True):
                        if counted_BND.shape[1] > 1:  # Between two tokens there is an angle.
                            token_cone.update(counted_BND)
    means = {
        name: {
            "within_samples": [cone.within_samples() for cone in by_layer],
            "overall": [cone.overall() for cone in by_layer],
        }
        for name, by_layer in cones.items()
    }
    return {**checkpoint.describe(), **means}


def cone(config: ConeConfig) -> int:
    """Measure, write cone.json and cone.png."""
    parts = [measure_cone(config, folder) for folder in config.checkpoints]
    write_json(config.out_dir / "cone.json", {"analysis": "cone", "subjects": parts})
    draw_cone(config, parts)
    for part in parts:
        means = {name: part[name]["within_samples"] for name in ("student", "teacher", "projected")}
        said = ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in means.items() if values)
        print(f"{part['label']}: mean cosine between tokens of a sample, over layers: {said}")
    return 0


def draw_cone(config: ConeConfig, parts: list[Report]) -> None:
    """Student and teacher by depth; the projected tokens at their student layer."""
    figure = new_figure(6.6, 2.7)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, part in enumerate(parts):
        style = line_style(number)
        left.plot(part["student"]["within_samples"], **style, label=part["label"])
        projected = part["projected"]["within_samples"]
        if not projected:
            continue
        kind = {"independent": "independent projectors"}.get(part["projector"], "shared projector")
        right.plot(part["student_layers"], projected, **style, label=f"{part['label']}\n({kind})")
    targets = parts[0]["teacher"]["within_samples"]
    left.plot(targets, color="0.5", ls="--", marker="x", markersize=4, label="teacher, block of this number")
    if aligned := next((part for part in parts if part["student_layers"]), None):
        pair_targets = [targets[layer] for layer in aligned["teacher_layers"]]
        style = {"color": "0.5", "ls": "--", "marker": "x", "markersize": 4}
        right.plot(aligned["student_layers"], pair_targets, **style, label="its target")
    left.set(xlabel="student state / teacher block", ylabel="mean cosine between\ntokens of a sample", title="layers")
    right.set(xlabel="student state of the pair", title="behind the projectors")
    for axes in (left, right) if right.lines else (left,):
        axes.legend(frameon=False)
        axes.locator_params(axis="x", integer=True)
    save_figure(figure, config.out_dir / "cone.png")


def measure_projectors(config: ProjectorsConfig, folder: str) -> Report:
    checkpoint = LoadedCheckpoint(config, folder, teacher_layers="none")
    if not checkpoint.align.num_pairs:
        raise UsageError(
            f"{folder}: no alignment (recipe {checkpoint.config.recipe_name}); accepted: one with projectors"
        )
    outputs = OutputSimilarity(checkpoint.alignment)
    for forward in checkpoint.passes():
        with torch.no_grad(), checkpoint.autocast():
            for tokens in counted_tokens(forward, checkpoint.aligned_tokens(forward)):
                outputs.update(tokens)
    similarity = {**parameter_similarity(checkpoint.alignment), **outputs.result()}
    others = ~torch.eye(checkpoint.align.num_pairs, dtype=torch.bool)
    means = {name: float(values.cpu()[others].mean()) if others.any() else 1.0 for name, values in similarity.items()}
    return {**checkpoint.describe(), "similarity": similarity, "mean_between_pairs": means}


def projectors(config: ProjectorsConfig) -> int:
    """Measure, write projectors.json and projectors.png."""
    parts = [measure_projectors(config, folder) for folder in config.checkpoints]
    write_json(config.out_dir / "projectors.json", {"analysis": "projectors", "subjects": parts})
    draw_projectors(config, parts)
    for part in parts:
        means = ", ".join(f"{KINDS[name]} {value:.3f}" for name, value in part["mean_between_pairs"].items())
        print(f"{part['label']}: mean cosine between projectors: {means}")
    return 0


def draw_projectors(config: ProjectorsConfig, parts: list[Report]) -> None:
    """A row per checkpoint, a column per kind of similarity."""
    size = max(1.5, 0.26 * len(parts[0]["student_layers"]))
    figure = new_figure(4 * (size + 0.25) + 0.9, len(parts) * (size + 0.35) + 0.4)
    grid = figure.subplots(len(parts), len(KINDS), squeeze=False)
    for number, (row, part) in enumerate(zip(grid, parts)):
        labels = [f"{s}-{t}" for s, t in zip(part["student_layers"], part["teacher_layers"])]
        for axes, (name, title) in zip(row, KINDS.items()):
            values = part["similarity"][name].cpu()
            image = heatmap(axes, values, limits=(-1, 1), rows=labels, columns=labels, diverging=True)
            axes.tick_params(axis="x", rotation=60)
            if not number:
                axes.set_title(title)
        row[0].set_ylabel(part["label"])
    figure.colorbar(image, ax=grid.ravel().tolist(), label="cosine between projectors", pad=0.01)
    save_figure(figure, config.out_dir / "projectors.png")
