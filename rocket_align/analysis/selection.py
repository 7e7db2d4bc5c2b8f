"""Choose which layers to align. Blocks are counted from 0. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence


def balanced_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers spread evenly over the depth, the last block always among them (the paper's uniform selection).

    From the last block, steps of L / k are walked back, each rounded half up. If the layers left out can themselves be
    spaced evenly (their number divides L), those are left out, beginning with block 0, as the released script does.
    `count` beyond the depth selects all blocks.
    """
    left_out = num_layers - count
    if left_out <= 0:
        return tuple(range(num_layers))
    if num_layers % left_out == 0:
        period = num_layers // left_out
        kept = tuple(layer for layer in range(num_layers) if layer % period)
        if kept:
            return kept
    step = num_layers / count
    return tuple(math.floor(num_layers - 1 - back * step + 0.5) for back in reversed(range(count)))


def early_to_middle_last(num_layers: int, count: int) -> tuple[int, ...]:
    """Every second block from block 2, or consecutive ones from block 1 if those do not fit, and the last block.

    10 of 24 are 2, 4, ..., 18, 23: the layers of the paper's recipe.
    """
    last = num_layers - 1
    step = 2 if 2 * (count - 1) < last else 1
    early = tuple(range(step, step * count, step))
    if early and early[-1] >= last:
        early = tuple(range(count - 1))
    return (*early, last)


def ranked_layers(scores: Sequence[float], count: int, *, highest: bool) -> tuple[int, ...]:
    """The `count` blocks with the lowest or highest scores, in order of depth; of equal scores the shallower is lower.

    With input-output similarity as the score, "highest" are the blocks that change the stream least.
    """
    order = sorted(range(len(scores)), key=lambda layer: scores[layer])
    chosen = order[max(0, len(order) - count) :] if highest else order[:count]
    return tuple(sorted(chosen))


def windowed_layers(scores: Sequence[float], window: int, count: int, *, highest: bool) -> tuple[int, ...]:
    """`count` blocks from the best windows of consecutive blocks, whose scores are given by first block.

    Windows are taken in the order of `ranked_layers`; each adds those of its blocks that are not chosen yet, shallow
    ones first, until there are enough. With `window` equal to `count` this is the one best window.
    """
    order = sorted(range(len(scores)), key=lambda start: scores[start])
    chosen: list[int] = []
    for start in reversed(order) if highest else order:
        chosen += [layer for layer in range(start, start + window) if layer not in chosen]
    return tuple(sorted(chosen[:count]))


_BY_POSITION: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "uniform": balanced_layers,
    "balanced": balanced_layers,
    "e2m_last1": early_to_middle_last,
    "shallow": lambda num_layers, count: tuple(range(count)),
    "middle": lambda num_layers, count: tuple(range((num_layers - count) // 2, (num_layers - count) // 2 + count)),
    "deep": lambda num_layers, count: tuple(range(num_layers - count, num_layers)),
}
_BY_SCORE = {"top": True, "bottom": False}
STRATEGIES = (*_BY_POSITION, *_BY_SCORE)


def select_layers(
    strategy: str, *, num_layers: int, count: int, scores: Sequence[float] | None = None, window: int = 1
) -> tuple[int, ...]:
    """Ascending 0-based blocks chosen by a named strategy.

    Args:
        strategy: "uniform" or "balanced" (evenly spread, last block included), "e2m_last1" (early to middle and the
            last), "shallow", "middle", "deep" (consecutive), "top" or "bottom" (highest or lowest scores).
        num_layers: blocks of the model.
        count: blocks wanted; more than there are selects all.
        scores: for "top" and "bottom": one number per block, or per window by its first block; NaN is refused.
        window: consecutive blocks that each score is about.

    Raises:
        ValueError: an unknown strategy, a count below 1, a window that does not fit, or scores that are missing or do
            not fit.
    """
    if strategy not in STRATEGIES:
        close = difflib.get_close_matches(strategy, STRATEGIES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"strategy: unknown value {strategy!r}{hint}; accepted: {', '.join(STRATEGIES)}")
    if num_layers < 1 or count < 1:
        raise ValueError(f"count: found {count} of {num_layers} layers; accepted: 1 or more of 1 or more")
    if count >= num_layers:
        return tuple(range(num_layers))
    if strategy in _BY_POSITION:
        return _BY_POSITION[strategy](num_layers, count)
    if not 1 <= window <= num_layers:
        raise ValueError(f"window: found {window}; accepted: 1 to {num_layers} blocks")
    expected = num_layers - window + 1
    if scores is None or len(scores) != expected or any(math.isnan(score) for score in scores):
        given = "none" if scores is None else f"{len(scores)}, or NaN among them"
        raise ValueError(f"scores: found {given}; accepted: {expected} numbers for strategy {strategy!r}")
    if window > 1:
        return windowed_layers(scores, window, count, highest=_BY_SCORE[strategy])
    return ranked_layers(scores, count, highest=_BY_SCORE[strategy])
