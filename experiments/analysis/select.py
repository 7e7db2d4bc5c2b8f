"""Layer pairs chosen without training, written as a file that finetune.py takes (--align_layers_file)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments.analysis.config import BY_POSITION, BY_SIMILARITY, SelectConfig
from experiments.analysis.report import plain
from experiments.analysis.settings import Join, describe_teacher_of, teacher_source, training_config
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write
from prismatic.util.flags import check
from rocket_align.analysis.pairs import layers_by_position, student_states
from rocket_align.analysis.selection import select_layers
from rocket_align.layer_file import LayerFile, read_layer_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.analysis.subject import Subject


def check_flags(config: SelectConfig) -> None:
    """Raises UsageError for what cannot be selected."""
    check(config)
    if config.teacher_strategy and config.strategy == "cka":
        raise UsageError(
            "--teacher_strategy: given with --strategy cka, which matches both sides; accepted: without it"
        )


def main(config: SelectConfig, join: Join) -> int:
    """Select, write the file and print the layers."""
    from prismatic.checkpoint.load import student_depth

    check_flags(config)
    if len(config.checkpoints) > 1:
        raise UsageError(f"--checkpoint: {len(config.checkpoints)} folders found; accepted: one")
    (folder,) = config.checkpoints
    flags = training_config(config, folder, join)
    depths = {"student": student_depth(flags), "teacher": describe_teacher_of(flags).depth}
    _check_sizes(config, depths)
    made: dict[str, Any] = {"strategy": config.strategy, "count": config.count, "student": folder}
    made["teacher"] = teacher_source(flags)[0]
    if config.strategy in BY_POSITION and (config.teacher_strategy or config.strategy) in BY_POSITION:
        layers = {side: _by_position(config, side, depths) for side in depths}
    else:
        from experiments.analysis.subject import Subject

        subject = Subject(config, folder, join, teacher_layers="all" if config.strategy == "cka" else "none")
        made |= {"dataset": subject.config.dataset_name, "samples": subject.num_samples, "seed": config.seed}
        layers, measured = (_by_cka if config.strategy == "cka" else _by_similarity)(config, subject, depths)
        made |= measured
    if config.teacher_strategy:
        made["teacher_strategy"] = config.teacher_strategy
    file = LayerFile(layers["student"], layers["teacher"], depths["student"], depths["teacher"], plain(made))
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
        if _strategy_of(config, side) in BY_SIMILARITY and config.window > depth:
            raise UsageError(f"--window: {config.window} found; accepted: 1 to {depth}, the blocks of the {side}")


def _strategy_of(config: SelectConfig, side: str) -> str:
    return (config.teacher_strategy or config.strategy) if side == "teacher" else config.strategy


def _by_position(config: SelectConfig, side: str, depths: dict[str, int], strategy: str = "") -> tuple[int, ...]:
    try:
        return layers_by_position(
            strategy or _strategy_of(config, side),
            side,
            num_student_layers=depths["student"],
            num_teacher_layers=depths["teacher"],
            count=config.count,
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _by_similarity(
    config: SelectConfig, subject: Subject, depths: dict[str, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Blocks that change their stream most or least, on each side that asks for it."""
    layers: dict[str, tuple[int, ...]] = {}
    scores: dict[str, list[float]] = {}
    for side in depths:
        strategy = _strategy_of(config, side)
        if strategy in BY_POSITION:
            layers[side] = _by_position(config, side, depths)
            continue
        measure = student_importance if side == "student" else teacher_importance
        scores[side] = measure(subject, config.window)
        blocks = select_layers(
            BY_SIMILARITY[strategy],
            num_layers=depths[side],
            count=config.count,
            scores=scores[side],
            window=config.window,
        )
        layers[side] = student_states(blocks) if side == "student" else blocks
    return layers, {"window": config.window, "scores": scores}


def _by_cka(
    config: SelectConfig, subject: Subject, depths: dict[str, int]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The one-to-one matching of highest total CKA among the candidates."""
    from experiments.analysis.cka import measure_cka
    from rocket_align.analysis.matching import match_layers

    candidates = {"student": range(1, depths["student"] + 1), "teacher": range(depths["teacher"])}
    rows, columns = (tuple(candidates[side]) for side in ("student", "teacher"))
    if config.candidates != "all":
        rows, columns = (_by_position(config, side, depths, config.candidates) for side in ("student", "teacher"))
    if config.count > min(len(rows), len(columns)):
        raise UsageError(f"--count: {config.count} found; accepted: 1 to {min(len(rows), len(columns))}")
    values = measure_cka(subject, config.rows, debiased=True, estimator=config.estimator)  # type: ignore[arg-type]
    pairs = match_layers(values[list(rows)][:, list(columns)], config.count)
    layers = {"student": tuple(rows[row] for row, _ in pairs), "teacher": tuple(columns[column] for _, column in pairs)}
    matched = [float(values[state, block]) for state, block in zip(layers["student"], layers["teacher"])]
    scores = {"cka": values, "matched": matched}
    return layers, {"candidates": config.candidates, "rows": config.rows, "debiased": True, "scores": scores}


def student_importance(subject: Subject, window: int) -> list[float]:
    """Mean cosine between the input of each window of LLM blocks and its output, over all tokens but padding."""
    import torch

    from rocket_align.analysis.importance import layer_importance, residual_stream

    masks: list[Tensor] = []
    with residual_stream(subject.module.vla.language_model.model.layers) as states:

        def streams() -> Iterator[list[Tensor]]:
            for seen in subject.passes():
                # The images (and proprio) stand behind the first token of the text.
                text = seen.attention_mask.bool()
                extra = states[0].shape[1] - text.shape[1]
                inserted = torch.ones(len(text), extra, dtype=torch.bool, device=text.device)
                masks[:] = [torch.cat((text[:, :1], inserted, text[:, 1:]), dim=1)]
                yield list(states)

        return layer_importance(streams(), (window,), mask=_latest(masks))[window].tolist()


def _latest(values: list[Any]) -> Iterator[Any]:
    while True:
        yield values[-1]


def teacher_importance(subject: Subject, window: int) -> list[float]:
    """The same for the layers of the teacher (VGGT: a frame and a global block), over all tokens of all views."""
    import torch

    from rocket_align.analysis.importance import layer_importance, residual_stream
    from rocket_align.teacher.preprocess import unnormalize_views
    from rocket_align.teacher.registry import load_teacher

    path, kind = teacher_source(subject.config)
    try:
        teacher: Any = load_teacher(path, (-1,), kind, device=subject.device, dtype=subject.training.compute_dtype)
    except ValueError as error:
        raise UsageError(f"--vggt_path: {error}") from error
    images = subject.training.processor.image_processor
    mean, std, channels = images.means[0], images.stds[0], 3 * len(images.means)
    blocks, last = _teacher_blocks(teacher)
    with residual_stream(blocks, last) as states, torch.no_grad():

        def streams() -> Iterator[list[Tensor]]:
            for batch in subject.batches():
                teacher(unnormalize_views(batch["pixel_values"], mean, std, channels_per_view=channels))
                yield list(states)

        return layer_importance(streams(), (window,))[window].tolist()


def _teacher_blocks(teacher: Any) -> tuple[Any, nn.Module | None]:
    """The blocks that begin the teacher's layers, and the module that ends the last one."""
    from torch import nn

    if hasattr(teacher, "aggregator"):
        return teacher.aggregator.frame_blocks, teacher.aggregator.global_blocks[-1]
    depth = max(teacher.layers) + 1
    found = [module for module in teacher.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return found[0], None
