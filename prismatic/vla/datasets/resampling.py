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
_BLOCK = 32  # output rows a matrix product; small blocks skip more zeros, large ones cost fewer calls


class Block(NamedTuple):
    """Weights (output rows, input rows) of a run of output rows; all other input rows have weight zero."""

    outputs: slice
    inputs: slice
    weights: torch.Tensor


class _Band(NamedTuple):
    """A banded matrix (out, in) and the first and one-past-last input of each output row."""

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
    return _Band(weights, used.argmax(axis=1), in_size - used[:, ::-1].argmax(axis=1))


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


class CropTables(NamedTuple):
    """Tables of all crops along an axis: the filters, each one's difference to the next, and the output blocks."""

    weights: torch.Tensor
    difference: torch.Tensor
    outputs: tuple[slice, ...]
    ramp: np.ndarray


@functools.lru_cache(maxsize=32)
def crop_tables(in_size: int, out_size: int) -> CropTables:
    weights = torch.from_numpy(_lanczos_band(in_size, out_size).weights)
    difference = torch.zeros_like(weights)
    torch.sub(weights[1:], weights[:-1], out=difference[:-1])
    outputs = tuple(slice(begin, min(begin + _BLOCK, out_size)) for begin in range(0, out_size, _BLOCK))
    return CropTables(weights, difference, outputs, np.linspace(0.0, 1.0, out_size) * (out_size - 1))


def lanczos_crop_axis(in_size: int, out_size: int, start: float, length: float) -> tuple[Block, ...]:
    """Lanczos-3 to `out_size`, then a crop to the fraction [start, start + length], resized back bilinearly.

    The crop's sample positions are corner-aligned (first and last sample lie on the crop's edges), as in
    tf.image.crop_and_resize.
    """
    band, tables = _lanczos_band(in_size, out_size), crop_tables(in_size, out_size)
    positions = tables.ramp * length + start * (out_size - 1)
    low = np.clip(positions.astype(np.int64), 0, out_size - 1)
    fraction = torch.from_numpy((positions - low).astype(np.float32))[:, None]
    rows = torch.from_numpy(low)
    # Positions grow, so the first and last row of a block bound its inputs; only these columns are computed.
    firsts = band.first[low[[block.start for block in tables.outputs]]].tolist()
    lasts = low[[block.stop - 1 for block in tables.outputs]]
    stops = band.stop[np.minimum(lasts + 1, out_size - 1)].tolist()
    blocks = []
    for outputs, first, stop in zip(tables.outputs, firsts, stops, strict=True):
        weights = tables.weights[:, first:stop].index_select(0, rows[outputs])
        difference = tables.difference[:, first:stop].index_select(0, rows[outputs])
        blocks.append(Block(outputs, slice(first, stop), weights.addcmul_(difference, fraction[outputs])))
    return tuple(blocks)


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
