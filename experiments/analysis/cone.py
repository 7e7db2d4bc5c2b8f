"""Cone effect: mean cosine between tokens of every layer, and behind the projectors (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.analysis.config import ConeConfig
from experiments.analysis.report import line_style, new_figure, save_figure, write_json
from experiments.analysis.subject import Join, Subject
from rocket_align.analysis.cone import TokenCone


class _Cones:
    """One `TokenCone` per layer."""

    def __init__(self) -> None:
        self._cones: list[TokenCone] = []

    def update(self, layers: Sequence[Tensor]) -> None:
        if not self._cones:
            self._cones = [TokenCone() for _ in layers]
        for cone, tokens_BND in zip(self._cones, layers, strict=True):
            cone.update(tokens_BND)

    def result(self) -> dict[str, list[float]]:
        return {
            "within_samples": [cone.within_samples() for cone in self._cones],
            "overall": [cone.overall() for cone in self._cones],
        }


def measure(config: ConeConfig, folder: str, join: Join) -> dict[str, Any]:
    """One checkpoint's part of the report: student states, teacher blocks pooled to the student's tokens, and the
    aligned tokens behind each pair's projector."""
    subject = Subject(config, folder, join, teacher_layers="all")
    assert subject.every_layer is not None
    cones = {name: _Cones() for name in ("student", "teacher", "projected")}
    for seen in subject.passes():
        with torch.no_grad(), subject.autocast():
            cones["student"].update(list(subject.student_states(seen)))
            cones["teacher"].update(list(subject.every_layer.targets(seen.teacher, seen.num_vision_tokens)))
            if subject.align.num_pairs:
                tokens = subject.alignment.student_tokens(seen.hidden_states, seen.vision_start, seen.num_vision_tokens)
                cones["projected"].update(list(subject.alignment.project(tokens)[0]))
    return {**subject.describe(), **{name: cone.result() for name, cone in cones.items()}}


def main(config: ConeConfig, join: Join) -> int:
    """Measure, write cone.json and cone.png."""
    parts = [measure(config, folder, join) for folder in config.checkpoints]
    write_json(config.out_dir / "cone.json", {"analysis": "cone", "subjects": parts})
    draw(config, parts)
    for part in parts:
        means = {name: part[name]["within_samples"] for name in ("student", "teacher", "projected")}
        said = ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in means.items() if values)
        print(f"{part['label']}: mean cosine between tokens of a sample, over layers: {said}")
    return 0


def draw(config: ConeConfig, parts: list[dict[str, Any]]) -> None:
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
        of_pairs = [targets[layer] for layer in aligned["teacher_layers"]]
        style = {"color": "0.5", "ls": "--", "marker": "x", "markersize": 4}
        right.plot(aligned["student_layers"], of_pairs, **style, label="its target")
    left.set(xlabel="student state / teacher block", ylabel="mean cosine between\ntokens of a sample", title="layers")
    right.set(xlabel="student state of the pair", title="behind the projectors")
    for axes in (left, right) if right.lines else (left,):
        axes.legend(frameon=False)
        axes.locator_params(axis="x", integer=True)
    save_figure(figure, config.out_dir / "cone.png")
