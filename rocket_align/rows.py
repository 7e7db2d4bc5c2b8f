"""Image tokens' rows of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ImageTokens = int | slice | range | Sequence[int] | Tensor | Callable[..., Tensor] | None


class RowPicker:
    """Copies the image tokens' rows out of a sequence (B, S, D).

    Args:
        image_tokens: see :func:`rocket_align.taps.attach`.

    Attributes:
        valid: (B, N) bool, where the samples of this pass differ in their number of image tokens; else None.
    """

    def __init__(self, image_tokens: ImageTokens) -> None:
        self.valid: Tensor | None = None
        self._lookup = image_tokens if isinstance(image_tokens, int) or callable(image_tokens) else None
        self._positions: slice | Tensor | None = None
        self._order: Tensor | None = None
        self._mask: Tensor | None = None
        if isinstance(image_tokens, slice):
            self._positions = image_tokens
        elif image_tokens is not None and self._lookup is None:
            self._positions = torch.as_tensor(list(image_tokens), dtype=torch.long)  # type: ignore[arg-type]
            if not len(self._positions) or int(self._positions.min()) < 0:
                raise ValueError(f"image_tokens: found {image_tokens!r}; accepted: positions from 0 on, or a slice")

    def clear(self) -> None:
        """Forget the last pass."""
        self.valid = None
        if self._lookup is not None:
            self._mask = self._order = None

    def look(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Look the image tokens up in the arguments of a call, unless this pass has them already."""
        if self._lookup is None or self._mask is not None:
            return
        if callable(self._lookup):
            self._mask = self._lookup(*args, **kwargs)
        else:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
                self._mask = ids == self._lookup

    def pick(self, sequence: object) -> Tensor:
        """The rows (B, N, D) of a sequence.

        Raises ValueError: something else than (B, S, D), positions outside it, or no image token in it.
        """
        if not isinstance(sequence, Tensor) or sequence.dim() != 3:
            shape = tuple(sequence.shape) if isinstance(sequence, Tensor) else type(sequence).__name__
            raise ValueError(f"found {shape}; accepted: a stream of shape (batch, tokens, width)")
        if self._lookup is not None:
            return self._gather(sequence)
        if self._positions is None:
            return sequence
        length = sequence.shape[1]
        if isinstance(self._positions, slice):
            last = self._positions.stop if self._positions.stop is not None else 0
        else:
            last = int(self._positions.max()) + 1
        if last > length:
            raise ValueError(f"image_tokens: found position {last - 1}; accepted: 0 to {length - 1} in this sequence")
        if isinstance(self._positions, slice):
            return sequence[:, self._positions].contiguous()
        return sequence.index_select(1, self._positions.to(sequence.device))

    def _gather(self, sequence: Tensor) -> Tensor:
        if self._mask is None:
            raise ValueError("image_tokens: no input_ids in the model's call; accepted: positions, or a function")
        if self._order is None:
            if self._mask.shape != sequence.shape[:2]:
                raise ValueError(
                    f"image_tokens: looked up in {tuple(self._mask.shape)} positions, but the stream has "
                    f"{tuple(sequence.shape[:2])}; accepted: one position a token"
                )
            counts = self._mask.sum(dim=1)
            fewest, most = torch.stack((counts.min(), counts.max())).tolist()
            if not most:
                raise ValueError("image_tokens: no image token in any sample; accepted: the id that stands for them")
            order = self._mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            self.valid = self._mask.gather(1, order) if fewest < most else None
            self._order = order[..., None].to(sequence.device)
        return sequence.gather(1, self._order.expand(-1, -1, sequence.shape[-1]))
