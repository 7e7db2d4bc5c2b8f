"""Separable image resampling as two small banded matrix products, one an axis.

An antialiased Lanczos-3 resize and a bilinear crop-and-resize are both linear along each axis, so "resize, then crop,
then resize back" is one matrix an axis and a frame is touched once. The matrices are banded: an output row needs only
the few input rows below its filter. Multiplying block by block of output rows skips the zeros, which makes this faster
than Pillow, and the float result agrees with TensorFlow's lanczos3 to rounding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

LANCZOS_SUPPORT = 3.0
_BLOCK = 16  # output rows a matrix product; small blocks skip more zeros, large ones cost fewer calls


class Block(NamedTuple):
    """Weights (output rows, input rows) of a run of output rows; all other input rows have weight zero."""

    outputs: slice
    inputs: slice
    weights: torch.Tensor


class _Band(NamedTuple):
    """A banded matrix (out, in), and first and one-past-last inputs of its rows that never decrease from row to row."""

    weights: np.ndarray
    first: np.ndarray
    stop: np.ndarray


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LANCZOS_SUPPORT, np.sinc(x) * np.sinc(x / LANCZOS_SUPPORT), 0.0)


@functools.lru_cache(maxsize=32)
def _lanczos_band(in_size: int, out_size: int) -> _Band:
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    centers = (np.arange(out_size) + 0.5) * scale
    distance = (np.arange(in_size)[None, :] + 0.5 - centers[:, None]) / stretch
    weights = _lanczos(distance)
    weights[np.abs(weights) < 1e-9] = 0.0  # sinc is not exactly zero at the integers; keep the matrix banded
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    used = weights != 0.0
    first, stop = used.argmax(axis=1), in_size - used[:, ::-1].argmax(axis=1)
    # A filter that lies on a pixel has that one alone, and would narrow a block that it begins or ends.
    return _Band(weights, np.minimum.accumulate(first[::-1])[::-1], np.maximum.accumulate(stop))


@functools.lru_cache(maxsize=32)
def lanczos_axis(in_size: int, out_size: int) -> tuple[Block, ...]:
    """Lanczos-3 with half-pixel centers along one axis.

    When shrinking, the filter is widened by the scale (antialiasing), as tf.image.resize(antialias=True) and Pillow do.
    """
    band = _lanczos_band(in_size, out_size)
    blocks = []
    for begin in range(0, out_size, _BLOCK):
        outputs = slice(begin, min(begin + _BLOCK, out_size))
        inputs = slice(int(band.first[outputs].min()), int(band.stop[outputs].max()))
        blocks.append(Block(outputs, inputs, torch.from_numpy(band.weights[outputs, inputs].copy())))
    return tuple(blocks)


class _CropTables(NamedTuple):
    """Tables of all crops along an axis."""

    filters: torch.Tensor  # (out, 2, in): each output's filter and its difference to the next one's
    outputs: tuple[slice, ...]
    ramp: torch.Tensor  # Outputs' positions without a crop, float64


@functools.lru_cache(maxsize=32)
def _crop_tables(in_size: int, out_size: int) -> _CropTables:
    weights = torch.from_numpy(_lanczos_band(in_size, out_size).weights)
    filters = torch.stack([weights, weights.diff(dim=0, append=weights[-1:])], dim=1)
    outputs = tuple(slice(begin, min(begin + _BLOCK, out_size)) for begin in range(0, out_size, _BLOCK))
    return _CropTables(filters, outputs, torch.from_numpy(np.linspace(0.0, 1.0, out_size) * (out_size - 1)))


def crop_filters(
    in_size: int, out_size: int, start: float | torch.Tensor, length: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of :func:`lanczos_crop_axis` for one crop or, with tensors (n, 1), for many, and the lower of the two
    rows of the resized image that each output lies between: (..., out, in) and (..., out)."""
    tables = _crop_tables(in_size, out_size)
    positions = tables.ramp * length + start * (out_size - 1)
    low = positions.long().clamp_(0, out_size - 1)
    # Half the time of `filters[low]`.
    weights, difference = tables.filters.index_select(0, low.flatten()).unflatten(0, low.shape).unbind(-2)
    return weights.addcmul_(difference, (positions - low).float()[..., None]), low


def lanczos_crop_axis(in_size: int, out_size: int, start: float, length: float) -> tuple[Block, ...]:
    """Lanczos-3 to `out_size`, then a crop to the fraction [start, start + length], resized back bilinearly.

    The crop's sample positions are corner-aligned (first and last sample lie on the crop's edges), as in
    tf.image.crop_and_resize.
    """
    band, all_outputs = _lanczos_band(in_size, out_size), _crop_tables(in_size, out_size).outputs
    weights, rows = crop_filters(in_size, out_size, start, length)
    low = rows.numpy()
    # Positions grow, so the first and last row of a block bound its inputs.
    firsts = band.first[low[[outputs.start for outputs in all_outputs]]].tolist()
    lasts = low[[outputs.stop - 1 for outputs in all_outputs]]
    stops = band.stop[np.minimum(lasts + 1, out_size - 1)].tolist()
    return tuple(
        Block(outputs, slice(first, stop), weights[outputs, first:stop])
        for outputs, first, stop in zip(all_outputs, firsts, stops, strict=True)
    )


def resample(image_HW3: np.ndarray, rows: tuple[Block, ...], columns: tuple[Block, ...]) -> np.ndarray:
    """Apply `rows` and `columns` to the axes of a uint8 image; returns planar float32 (3, h, w) on the 0..255 scale.

    The products run in torch, which keeps to one thread inside DataLoader workers.
    """
    height, width, channels = image_HW3.shape
    out_height, out_width = rows[-1].outputs.stop, columns[-1].outputs.stop
    source = torch.from_numpy(image_HW3.reshape(height, width * channels).astype(np.float32))
    vertical = torch.empty(out_height, width * channels)
    for outputs, inputs, weights in rows:
        torch.mm(weights, source[inputs], out=vertical[outputs])
    planar = vertical.view(out_height, width, channels).permute(2, 0, 1).reshape(channels * out_height, width)
    result = torch.empty(channels * out_height, out_width)
    for outputs, inputs, weights in columns:
        torch.mm(planar[:, inputs], weights.T, out=result[:, outputs])
    return result.view(channels, out_height, out_width).numpy()
