"""Separable image resampling as two small banded matrix products, one an axis.

An antialiased Lanczos-3 resize and a bilinear crop-and-resize are both linear along each axis, so "resize,
then crop, then resize back" is one matrix an axis and a frame is touched once. The matrices are banded: an output row
needs only the few input rows below its filter. Multiplying block by block of output rows skips the zeros, which makes
this faster than Pillow, and the float result agrees with TensorFlow's lanczos3 to rounding.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

LANCZOS_SUPPORT = 3.0
_BLOCK = 32  # output rows a matrix product; small blocks skip more zeros, large ones cost fewer calls


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LANCZOS_SUPPORT, np.sinc(x) * np.sinc(x / LANCZOS_SUPPORT), 0.0)


@functools.lru_cache(maxsize=32)
def lanczos_weights(in_size: int, out_size: int) -> np.ndarray:
    """Weights float32 (out_size, in_size), rows summing to 1, of Lanczos-3 with half-pixel centers.

    When shrinking, the filter is widened by the scale (antialiasing), as tf.image.resize(antialias=True) and Pillow do.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    centers = (np.arange(out_size) + 0.5) * scale
    distance = (np.arange(in_size)[None, :] + 0.5 - centers[:, None]) / stretch
    weights = _lanczos(distance)
    weights[np.abs(weights) < 1e-9] = 0.0  # sinc is not exactly zero at the integers; keep the matrix banded
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    weights.setflags(write=False)
    return weights


def crop_weights(weights: np.ndarray, start: float, length: float) -> np.ndarray:
    """Follow `weights` (out, in) by a crop to the fraction [start, start + length], resized back to `out` bilinearly.

    Sample positions are corner-aligned (first and last sample lie on the crop's edges), as in tf.image.crop_and_resize.
    """
    size = len(weights)
    positions = (start + np.linspace(0.0, 1.0, size) * length) * (size - 1)
    low = np.clip(np.floor(positions).astype(np.int64), 0, size - 1)
    high = np.minimum(low + 1, size - 1)
    fraction = (positions - low).astype(np.float32)[:, None]
    return weights[low] * (np.float32(1.0) - fraction) + weights[high] * fraction


def _blocks(weights: np.ndarray) -> list[tuple[slice, slice]]:
    """(output rows, input columns that are not all zero) for every block of rows."""
    blocks = []
    for first in range(0, len(weights), _BLOCK):
        rows = slice(first, min(first + _BLOCK, len(weights)))
        used = np.flatnonzero(weights[rows].any(axis=0))
        blocks.append((rows, slice(int(used[0]), int(used[-1]) + 1)))
    return blocks


def _tensor(weights: np.ndarray) -> torch.Tensor:
    # The cached weights are marked read-only, which torch tensors cannot express.
    return torch.from_numpy(weights if weights.flags.writeable else weights.copy())


def resample(image_HW3: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Apply `rows` (h, H) and `columns` (w, W) to a uint8 image; returns planar float32 (3, h, w) on the 0..255 scale.

    The products run in torch, which keeps to one thread inside DataLoader workers.
    """
    height, width, channels = image_HW3.shape
    source = torch.from_numpy(image_HW3.reshape(height, width * channels).astype(np.float32))
    rows_hH = _tensor(rows)
    vertical = torch.empty(len(rows), width * channels)
    for out, used in _blocks(rows):
        torch.mm(rows_hH[out, used], source[used], out=vertical[out])
    planar = vertical.view(-1, width, channels).permute(2, 0, 1).contiguous().view(-1, width)
    columns_wW = _tensor(columns)
    result = torch.empty(planar.shape[0], len(columns))
    for out, used in _blocks(columns):
        result[:, out] = planar[:, used] @ columns_wW[out, used].T
    return result.view(channels, len(rows), len(columns)).numpy()
