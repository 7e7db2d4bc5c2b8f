"""Measure how much each transformer block changes the residual stream: cosine between its input and its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def residual_stream(
    blocks: Sequence[nn.Module] | nn.ModuleList, last: nn.Module | None = None
) -> Iterator[list[Tensor]]:
    """Record the residual stream of every forward pass inside the context.

    The list is emptied when the first block starts, and then holds the inputs of all blocks and the output of the last:
    L + 1 tensors (B, S, D). A model's own `hidden_states` differ in the last, which stands after the final norm.

    Args:
        blocks: in the order of their execution.
        last: module whose output ends the stream, if not the last block; it is brought to the first state's shape.
            (A layer of VGGT is a frame block and a global block: `blocks` are the frame blocks, `last` the last global
            block, which sees the tokens of all views as one sequence.)
    """
    states: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if block is blocks[0]:
            states.clear()
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def after(block: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        state = (output[0] if isinstance(output, tuple) else output).detach()
        states.append(state.reshape(states[0].shape))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append((blocks[-1] if last is None else last).register_forward_hook(after))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def layer_importance(
    batches: Iterable[Sequence[Tensor]], windows: Sequence[int] = (1,), *, mask: Iterable[Tensor] | None = None
) -> dict[int, Tensor]:
    """Mean cosine between the input of block i and the output of block i + w - 1, for every start i and window w.

    A low value means that the window changes the stream much. Matches the released measurement, which averages over
    all positions, padding included, unless `mask` is given.

    Args:
        batches: per batch L + 1 tensors (B, S, D), as `residual_stream` records them.
        windows: numbers of consecutive blocks.
        mask: per batch a boolean (B, S) tensor; only its true positions count.

    Returns:
        Per window a float64 tensor of L - w + 1 means over all counted positions of all batches.

    Raises:
        ValueError: no batch, or a window longer than the model.
    """
    sums: dict[int, Tensor] = {}
    counted = torch.zeros((), dtype=torch.float64)
    masks = iter(mask) if mask is not None else None
    for states in batches:
        blocks = len(states) - 1
        if not all(1 <= window <= blocks for window in windows):
            raise ValueError(f"windows: found {tuple(windows)}; accepted: 1 to {blocks} blocks")
        valid = next(masks) if masks is not None else torch.ones_like(states[0][..., 0], dtype=torch.bool)
        weight = valid.double()
        for window in windows:
            similarities = [
                (F.cosine_similarity(states[start].float(), states[start + window].float(), dim=-1) * weight).sum()
                for start in range(blocks - window + 1)
            ]
            sums[window] = sums.get(window, 0) + torch.stack(similarities)
        counted = counted.to(weight.device) + weight.sum()
    if not sums:
        raise ValueError("batches: found none; accepted: at least one batch of residual streams, and one window")
    return {window: total / counted for window, total in sums.items()}
