"""One place that turns a user's layer list into indices, counting from the end as each convention does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

LayerConvention = Literal["released", "states", "python"]


def parse_layers(spec: str | Sequence[int]) -> tuple[int, ...]:
    """Layers as given: a sequence of integers or upstream's comma string ("2,4,-1"); empty means none.

    Raises:
        ValueError: an entry that is not an integer.
    """
    entries: Sequence[str | int] = [part for part in spec.split(",") if part.strip()] if isinstance(spec, str) else spec
    layers = []
    for entry in entries:
        try:
            layer = int(entry)
        except (TypeError, ValueError):
            layer = None
        if layer is None or isinstance(entry, bool) or (not isinstance(entry, str) and layer != entry):
            raise ValueError(f"layers: found {entry!r} in {spec!r}; accepted: integers, as in 2,4,-1")
        layers.append(layer)
    return tuple(layers)


def resolve_layers(
    spec: str | Sequence[int], num_layers: int, *, convention: LayerConvention, ordered: bool = True
) -> tuple[int, ...]:
    """Non-negative layer indices for a model of `num_layers` blocks.

    Args:
        spec: integers or a comma string; negative numbers count from the end.
        num_layers: number of transformer blocks.
        convention: what the numbers mean.
            "released": hidden states 0 (embeddings) to num_layers of the student; -1 is state num_layers - 1, as in the
            released training code, hence not the last state.
            "states": the same states; -1 is the last, num_layers, as the released analyses use it.
            "python": blocks 0 to num_layers - 1 of the teacher; -1 is the last.
        ordered: refuse layers that do not ascend. A teacher matched one-to-one to a student may need another order.

    Raises:
        ValueError: not integers, out of range, twice the same layer, or not ascending; the message names `spec`.
    """
    if convention not in get_args(LayerConvention):
        raise ValueError(f"convention: found {convention!r}; accepted: {', '.join(get_args(LayerConvention))}")
    layers = parse_layers(spec)
    largest = num_layers - 1 if convention == "python" else num_layers
    from_end = num_layers + 1 if convention == "states" else num_layers
    resolved = tuple(layer if layer >= 0 else from_end + layer for layer in layers)
    for layer, index in zip(layers, resolved):
        if not 0 <= index <= largest:
            raise ValueError(
                f"layers: found {layer} in {spec!r}; accepted: {-from_end} to {largest} for {num_layers} blocks"
            )
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers: found a layer twice in {spec!r} (indices {resolved}); accepted: each layer once")
    if ordered and list(resolved) != sorted(resolved):
        raise ValueError(f"layers: found {spec!r} (indices {resolved}); accepted: layers in ascending order")
    return resolved
