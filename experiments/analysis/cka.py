"""CKA map of student states and teacher blocks with the best one-to-one matching (the paper's Figure 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.analysis.config import LEAST_ROWS, CkaConfig
from experiments.analysis.loaded_checkpoint import ForwardPass, LoadedCheckpoint, counted_tokens
from experiments.analysis.report import Report, heatmap, new_figure, save_figure, write_json
from prismatic.util.errors import UsageError
from rocket_align.analysis.cka import Estimator, StreamingCKA
from rocket_align.analysis.matching import match_layers

MATCHED = "#D55E00"


def layer_features(checkpoint: LoadedCheckpoint, forward: ForwardPass, rows: str) -> tuple[list[Tensor], list[Tensor]]:
    """Features (samples, channels) of all states of the student and all blocks of the teacher, row by row the same
    vision token (or sample): teacher patches are pooled to the student's tokens as the alignment pools them."""
    by_sample = rows == "samples"

    def features(tokens_LBND: Tensor) -> list[Tensor]:
        parts = counted_tokens(forward, tokens_LBND.float(), by_sample=by_sample)
        rows_LSD = [part.mean(dim=2) if by_sample else part.flatten(1, 2) for part in parts]
        return list(torch.cat([tokens_LBND[:, :0, 0].float(), *rows_LSD], dim=1))

    return features(checkpoint.student_states(forward)), features(checkpoint.teacher_blocks(forward))


def measure_cka(checkpoint: LoadedCheckpoint, rows: str, *, debiased: bool, estimator: Estimator) -> Tensor:
    """The map, (student states, teacher blocks), on the CPU.

    Batches are skipped that have too few rows for an estimate of their own, where the estimator makes one of each.

    Raises UsageError: too few rows in all.
    """
    streaming = StreamingCKA(debiased=debiased, estimator=estimator)
    least = LEAST_ROWS if debiased else 2
    for forward in checkpoint.passes():
        with torch.no_grad():
            students, teachers = layer_features(checkpoint, forward, rows)
            if len(students[0]) >= (least if estimator == "minibatch" else 1):
                streaming.update(students, teachers)
    if streaming.samples < least:
        raise UsageError(
            f"--num_samples: {checkpoint.flags.num_samples} found in batches of {checkpoint.flags.batch_size}, which "
            f"gives {streaming.samples} rows that count; accepted: {least} or more"
        )
    return streaming.result().cpu()


def measure(config: CkaConfig, folder: str) -> Report:
    checkpoint = LoadedCheckpoint(config, folder, teacher_layers="all")
    values = measure_cka(checkpoint, config.rows, debiased=config.debiased, estimator=config.estimator)  # type: ignore[arg-type]
    pairs = match_layers(values)
    return {
        **checkpoint.describe(),
        "cka": values,
        "matching": [{"student": s, "teacher": t, "cka": values[s, t]} for s, t in pairs],
        "matched_mean": sum(values[s, t] for s, t in pairs) / len(pairs),
    }


def cka(config: CkaConfig) -> int:
    """Measure, write cka.json and cka.png."""
    parts = [measure(config, folder) for folder in config.checkpoints]
    settings = {"rows": config.rows, "debiased": config.debiased, "estimator": config.estimator}
    write_json(config.out_dir / "cka.json", {"analysis": "cka", **settings, "subjects": parts})
    draw(config, parts)
    for part in parts:
        print(f"{part['label']}: mean CKA of the matched layers {float(part['matched_mean']):.3f}")
    return 0


def draw(config: CkaConfig, parts: list[Report]) -> None:
    """Maps side by side on one scale, matched layers in boxes."""
    from matplotlib.patches import Rectangle

    states, blocks = parts[0]["cka"].shape
    width = max(2.6, 0.9 + 0.24 * min(blocks, 24))
    figure = new_figure(0.6 + width * len(parts), max(2.4, 0.8 + 0.2 * min(states, 33)))
    grid = figure.subplots(1, len(parts), squeeze=False)[0]
    limits = min(float(part["cka"].min()) for part in parts), max(float(part["cka"].max()) for part in parts)
    for axes, part in zip(grid, parts):
        labels = [str(state) for state in range(len(part["cka"]))]
        columns = [str(block) for block in range(part["cka"].shape[1])]
        image = heatmap(axes, part["cka"], limits=limits, rows=labels, columns=columns)
        for pair in part["matching"]:
            box = Rectangle((pair["teacher"] - 0.5, pair["student"] - 0.5), 1, 1, fill=False, ec=MATCHED, lw=1.6)
            axes.add_patch(box)
        axes.set(title=part["label"], xlabel="teacher block", ylabel="student state" if axes is grid[0] else "")
    kind = "debiased" if config.debiased else "biased"
    figure.colorbar(image, ax=list(grid), label=f"linear CKA ({kind})", pad=0.02)
    save_figure(figure, config.out_dir / "cka.png")
