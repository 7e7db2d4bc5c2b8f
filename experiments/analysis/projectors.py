"""How alike the pairs' projectors are, in their weights and outputs (the paper's Figure 7)."""

from __future__ import annotations

from typing import Any

import torch

from experiments.analysis.config import ProjectorsConfig
from experiments.analysis.report import heatmap, new_figure, save_figure, write_json
from experiments.analysis.subject import Join, Subject
from prismatic.util.errors import UsageError
from rocket_align.analysis.projectors import OutputSimilarity, parameter_similarity

KINDS = {
    "fc1": "weights, 1st layer",
    "fc2": "weights, 2nd layer",
    "same_input": "outputs, same input",
    "own_input": "outputs, own input",
}


def measure(config: ProjectorsConfig, folder: str, join: Join) -> dict[str, Any]:
    """One checkpoint's part of the report."""
    subject = Subject(config, folder, join, teacher_layers="none")
    if not subject.align.num_pairs:
        raise UsageError(f"{folder}: no alignment (recipe {subject.config.recipe_name}); accepted: one with projectors")
    outputs = OutputSimilarity(subject.alignment)
    for seen in subject.passes():
        with torch.no_grad(), subject.autocast():
            tokens = subject.alignment.student_tokens(seen.hidden_states, seen.vision_start, seen.num_vision_tokens)
            outputs.update(tokens)
    similarity = {**parameter_similarity(subject.alignment), **outputs.result()}
    others = ~torch.eye(subject.align.num_pairs, dtype=torch.bool)
    means = {name: float(values.cpu()[others].mean()) if others.any() else 1.0 for name, values in similarity.items()}
    return {**subject.describe(), "similarity": similarity, "mean_between_pairs": means}


def main(config: ProjectorsConfig, join: Join) -> int:
    """Measure, write projectors.json and projectors.png."""
    parts = [measure(config, folder, join) for folder in config.checkpoints]
    write_json(config.out_dir / "projectors.json", {"analysis": "projectors", "subjects": parts})
    draw(config, parts)
    for part in parts:
        means = ", ".join(f"{KINDS[name]} {value:.3f}" for name, value in part["mean_between_pairs"].items())
        print(f"{part['label']}: mean cosine between projectors: {means}")
    return 0


def draw(config: ProjectorsConfig, parts: list[dict[str, Any]]) -> None:
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
