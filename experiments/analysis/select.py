"""Layer pairs chosen without training, written as a file that finetune.py takes (--align_layers_file)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from experiments.analysis.cka import measure_cka
from experiments.analysis.config import (
    BY_POSITION,
    BY_SIMILARITY,
    SelectConfig,
    describe_teacher_of,
    teacher_source,
    training_config,
)
from experiments.analysis.loaded_checkpoint import LoadedCheckpoint
from experiments.analysis.report import Report, to_json_values
from prismatic.policies import student_depth
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_no_file
from rocket_align.analysis.importance import layer_importance, residual_stream
from rocket_align.analysis.matching import match_layers
from rocket_align.analysis.selection import select_layers
from rocket_align.layers import LayerFile, layers_by_position, read_layer_file, student_states
from rocket_align.targets import TeacherTargets
from rocket_align.teacher.registry import load_teacher
from rocket_align.teacher.vggt.teacher import VGGTTeacher

Layers = dict[str, tuple[int, ...]]


def select(config: SelectConfig) -> int:
    """Select, write the file and print the layers."""
    refuse_no_file("--out", config.out)
    (folder,) = config.checkpoints
    flags = training_config(config, folder)
    depths = {"student": student_depth(flags), "teacher": describe_teacher_of(flags).depth}
    _check_sizes(config, depths)
    origin: Report = {"strategy": config.strategy, "count": config.count, "student": folder}
    origin["teacher"] = teacher_source(flags)[0]
    if all(config.strategy_of(side) in BY_POSITION for side in depths):
        layers = {side: _by_position(config, side, depths) for side in depths}
    else:
        checkpoint = LoadedCheckpoint(config, folder, "all" if config.strategy == "cka" else "none")
        origin |= {"dataset": checkpoint.config.dataset_name, "samples": checkpoint.num_samples, "seed": config.seed}
        by_score = _by_cka if config.strategy == "cka" else _by_similarity
        layers, measured = by_score(config, checkpoint, depths)
        origin |= measured
    if config.teacher_strategy:
        origin["teacher_strategy"] = config.teacher_strategy
    file = LayerFile(layers["student"], layers["teacher"], depths["student"], depths["teacher"], to_json_values(origin))
    atomic_write(config.out, file.to_json())
    read_layer_file(config.out)
    for side in ("student", "teacher"):
        print(f"{side}: {','.join(map(str, layers[side]))} of {depths[side]} blocks")
    print(f"wrote {config.out}; use it with finetune.py --align_layers_file {config.out}")
    return 0


def _check_sizes(config: SelectConfig, depths: dict[str, int]) -> None:
    """Refuse, before anything is loaded or measured, more blocks than the models have."""
    shallow = min(depths.values())
    if config.count > shallow:
        raise UsageError(f"--count: {config.count} found; accepted: 1 to {shallow} pairs")
    for side, depth in depths.items():
        if config.strategy_of(side) in BY_SIMILARITY and config.window > depth:
            raise UsageError(f"--window: {config.window} found; accepted: 1 to {depth}, the blocks of the {side}")


def _by_position(config: SelectConfig, side: str, depths: dict[str, int], strategy: str = "") -> tuple[int, ...]:
    try:
        return layers_by_position(
            strategy or config.strategy_of(side),
            side,
            num_student_layers=depths["student"],
            num_teacher_layers=depths["teacher"],
            count=config.count,
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _by_similarity(config: SelectConfig, checkpoint: LoadedCheckpoint, depths: dict[str, int]) -> tuple[Layers, Report]:
    """Blocks that change their stream most or least, on each side that asks for it."""
    layers: Layers = {}
    scores: dict[str, list[float]] = {}
    for side in depths:
        strategy = config.strategy_of(side)
        if strategy in BY_POSITION:
            layers[side] = _by_position(config, side, depths)
            continue
        measure = student_importance if side == "student" else teacher_importance
        scores[side] = measure(checkpoint, config.window)
        blocks = select_layers(
            BY_SIMILARITY[strategy],
            num_layers=depths[side],
            count=config.count,
            scores=scores[side],
            window=config.window,
        )
        layers[side] = student_states(blocks) if side == "student" else blocks
    return layers, {"window": config.window, "scores": scores}


def _by_cka(config: SelectConfig, checkpoint: LoadedCheckpoint, depths: dict[str, int]) -> tuple[Layers, Report]:
    """The one-to-one matching of highest total CKA among the candidates."""
    candidates = {"student": range(1, depths["student"] + 1), "teacher": range(depths["teacher"])}
    rows, columns = (tuple(candidates[side]) for side in ("student", "teacher"))
    if config.candidates != "all":
        rows, columns = (_by_position(config, side, depths, config.candidates) for side in ("student", "teacher"))
    if config.count > min(len(rows), len(columns)):
        raise UsageError(f"--count: {config.count} found; accepted: 1 to {min(len(rows), len(columns))}")
    values = measure_cka(checkpoint, config.rows, debiased=True, estimator=config.estimator)  # type: ignore[arg-type]
    pairs = match_layers(values[list(rows)][:, list(columns)], config.count)
    layers = {"student": tuple(rows[row] for row, _ in pairs), "teacher": tuple(columns[column] for _, column in pairs)}
    matched = [float(values[state, block]) for state, block in zip(layers["student"], layers["teacher"])]
    scores = {"cka": values, "matched": matched}
    return layers, {"candidates": config.candidates, "rows": config.rows, "debiased": True, "scores": scores}


def student_importance(checkpoint: LoadedCheckpoint, window: int) -> list[float]:
    """Mean cosine between the input of each window of LLM blocks and its output, over all tokens that count.

    Those of padding, of missing cameras and of a letterbox's bars do not.
    """
    masks: list[Tensor] = []
    with residual_stream(checkpoint.training.family.blocks(checkpoint.training.parts)) as states:

        def streams() -> Iterator[list[Tensor]]:
            for forward in checkpoint.passes():
                # The images (and proprio) stand before the text, or behind its first token.
                text = forward.attention_mask.bool()
                extra = states[0].shape[1] - text.shape[1]
                inserted = torch.ones(len(text), extra, dtype=torch.bool, device=text.device)
                if forward.mask_BN is not None:
                    inserted[:, : forward.num_vision_tokens] = forward.mask_BN
                start = forward.vision_start
                masks[:] = [torch.cat((text[:, :start], inserted, text[:, start:]), dim=1)]
                yield list(states)

        return layer_importance(streams(), (window,), mask=_latest(masks))[window].tolist()


def _latest(values: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield values[-1]


def teacher_importance(checkpoint: LoadedCheckpoint, window: int) -> list[float]:
    """The same for the layers of the teacher (VGGT: a frame and a global block), over all tokens of all views."""
    path, kind = teacher_source(checkpoint.config)
    try:
        teacher = load_teacher(path, (-1,), kind, device=checkpoint.device, dtype=checkpoint.training.compute_dtype)
    except ValueError as error:
        raise UsageError(f"--vggt_path: {error}") from error
    targets = TeacherTargets(teacher, checkpoint.training.processor.image_processor)
    blocks, last = _teacher_blocks(teacher)
    with residual_stream(blocks, last) as states, torch.no_grad():

        def streams() -> Iterator[list[Tensor]]:
            for batch in checkpoint.batches():
                targets(batch["pixel_values"])
                yield list(states)

        return layer_importance(streams(), (window,))[window].tolist()


def _teacher_blocks(teacher: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The blocks that begin the teacher's layers, and the module that ends the last one."""
    if isinstance(teacher, VGGTTeacher):
        return list(teacher.aggregator.frame_blocks), teacher.aggregator.global_blocks[-1]
    depth = max(cast("tuple[int, ...]", teacher.layers)) + 1
    lists = (module for module in teacher.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    blocks = next((blocks for blocks in lists if len(blocks) == depth), None)
    if blocks is None:
        raise UsageError(f"--teacher_path: found no list of {depth} blocks in it; accepted: a vision transformer")
    return list(blocks), None
