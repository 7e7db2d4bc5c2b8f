"""Teacher features to stored codes, and codes to pooled targets under the crop of an augmented view.

A token's features of one layer, (C,), are stored as R <= C coefficients of the layer's principal directions about its
mean, in float16 or as int8 with one scale for the token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rocket_align.matmul import linear
from rocket_align.pooling import POSITION_WEIGHT, resize_patches, sine_position_embedding
from rocket_align.teacher.base import AlignmentTargets, TeacherFeatures
from rocket_align.teacher.store.layout import StoreError

_INT8_MAX = 127.0


class Basis(NamedTuple):
    """Basis that the coefficients of each layer refer to."""

    mean_KC: Tensor  # Subtracted first
    directions_KCR: Tensor | None  # Orthonormal columns; None when all channels are kept as they are

    def to(self, device: torch.device) -> Basis:
        """The basis on another device."""
        return Basis(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


class Codes(NamedTuple):
    """Stored features of some frames, on the store's grid (P tokens a view, row-major)."""

    values_BKVPR: Tensor  # Int8 or float16 coefficients
    scales_BKVP: Tensor | None  # What int8 values are multiplied with; None for float16


def pool_to_grid(features: TeacherFeatures, grid_hw: tuple[int, int]) -> Tensor:
    """Features of all layers resampled (bilinear, corners aligned, as the alignment pools) to the store's grid.

    Returns:
        (B, K, V, P, C) float32.
    """
    layers = [
        resize_patches(layer_BVPC.float().flatten(0, 1), features.grid_hw, grid_hw).unflatten(0, layer_BVPC.shape[:2])
        for layer_BVPC in features.layers
    ]
    return torch.stack(layers, dim=1)


class BasisFit:
    """Principal directions per layer from batches of features, with memory for one covariance a layer."""

    def __init__(self) -> None:
        self._count = 0
        self._sum_KC = self._products_KCC = torch.zeros((), dtype=torch.float64)

    def add(self, features_BKVPC: Tensor) -> None:
        """Take in the tokens of some frames."""
        tokens_KTC = features_BKVPC.transpose(0, 1).flatten(1, 3).double()
        self._count += tokens_KTC.shape[1]
        self._sum_KC = tokens_KTC.sum(1) + self._sum_KC.to(tokens_KTC.device)
        self._products_KCC = tokens_KTC.mT @ tokens_KTC + self._products_KCC.to(tokens_KTC.device)

    def result(self, components: int) -> Basis:
        """The basis with at most `components` directions a layer. Raises ValueError: no features were added."""
        if not self._count:
            raise ValueError("feature basis: found no features; accepted: at least one frame")
        mean_KC = self._sum_KC / self._count
        if components >= mean_KC.shape[1]:
            return Basis(mean_KC.float(), None)
        covariances = self._products_KCC / self._count - mean_KC[:, :, None] * mean_KC[:, None, :]
        largest = [torch.linalg.eigh(covariance).eigenvectors[:, -components:].flip(1) for covariance in covariances]
        return Basis(mean_KC.float(), torch.stack(largest).float().contiguous())


def encode(features_BKVPC: Tensor, basis: Basis, dtype: torch.dtype) -> Codes:
    """Features to codes; `dtype` is torch.int8 or torch.float16.

    Raises StoreError: features that are not finite, or too large for float16.
    """
    centered = features_BKVPC - basis.mean_KC[:, None, None]
    if basis.directions_KCR is not None:
        centered = torch.einsum("bkvpc,kcr->bkvpr", centered, basis.directions_KCR)
    if dtype == torch.int8:
        scales = centered.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / _INT8_MAX
        codes = Codes((centered / scales[..., None]).round().to(torch.int8), scales)
        finite = scales.isfinite().all()
    else:
        codes = Codes(centered.to(torch.float16), None)
        finite = codes.values_BKVPR.isfinite().all()
    if not finite:
        raise StoreError("teacher features: found values that are not finite or too large; accepted: int8, finite ones")
    return codes


def dequantize(codes: Codes) -> Tensor:
    """Coefficients (B, K, V, P, R) float32."""
    values = codes.values_BKVPR.float()
    return values if codes.scales_BKVP is None else values.mul_(codes.scales_BKVP[..., None])


def reconstruct(coefficients_BKVPR: Tensor, basis: Basis) -> Tensor:
    """Coefficients to features (B, K, V, P, C)."""
    features = coefficients_BKVPR
    if basis.directions_KCR is not None:
        features = torch.einsum("bkvpr,kcr->bkvpc", features, basis.directions_KCR)
    return features + basis.mean_KC[:, None, None]


def crop_weights(start: Tensor, length: Tensor, *, tokens: int, stored: int, teacher: int, pixels: int) -> Tensor:
    """Bilinear weights that read a cropped view's targets along one axis out of the whole view's stored features.

    A target stands where the online path has it: token j of `tokens` lies at teacher patch j (teacher - 1) /
    (tokens - 1) of the cropped view (corners aligned); patch centers are half-pixel centered in the picture; the crop's
    samples are corner-aligned in the picture of `pixels` (as the augmentation crops); stored token s lies at teacher
    patch s (teacher - 1) / (stored - 1) of the whole view. Beyond the outermost stored tokens the nearest one counts.

    Args:
        start, length: the crop in fractions of the view, any shape.

    Returns:
        (*shape, tokens, stored), rows sum to 1.
    """
    device = start.device
    patch = torch.arange(tokens, device=device, dtype=torch.float32) * ((teacher - 1) / max(tokens - 1, 1))
    pixel = (patch + 0.5) * (pixels / teacher) - 0.5
    seen = start[..., None] * (pixels - 1) + pixel * length[..., None]
    place = ((seen + 0.5) * (teacher / pixels) - 0.5) * ((stored - 1) / max(teacher - 1, 1))
    place = place.clamp(0, stored - 1)
    return (1 - (place[..., None] - torch.arange(stored, device=device)).abs()).clamp_min(0)


class StoreGeometry(NamedTuple):
    """Grids of a store and of the student that reads it; views are square in pixels."""

    # Tokens along height and width of a view
    stored_hw: tuple[int, int]
    teacher_hw: tuple[int, int]
    student_hw: tuple[int, int]
    teacher_image_hw: tuple[int, int]  # Pixels the teacher saw
    view_pixels: int  # Side of the student's view, in which crops are made


class StoredTeacher(nn.Module):
    """Stands in for a teacher: stored codes of un-augmented frames and the batch's crops -> pooled targets.

    Without a crop and with the student's own grid these are the online targets up to rounding; colors are those of the
    un-augmented frames. Source of the position embedding: that of the online path, pooled (both are linear).

    Args:
        basis: of the aligned layers.
        geometry: see there.
        position_embedding: add VGGT's sine embedding of the (cropped) view, weighted 0.1, as `pool_teacher` does.
    """

    mean_KC: Tensor
    directions_KCR: Tensor | None
    position_NC: Tensor | None

    def __init__(self, basis: Basis, geometry: StoreGeometry, *, position_embedding: bool) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("mean_KC", basis.mean_KC)
        self.register_buffer("directions_KCR", basis.directions_KCR)
        self.register_buffer("position_NC", self._position(basis.mean_KC.shape[1]) if position_embedding else None)

    def _position(self, channels: int) -> Tensor:
        grid, image = self.geometry.teacher_hw, self.geometry.teacher_image_hw
        table_PC = sine_position_embedding(grid, image, channels, self.mean_KC.device)
        return POSITION_WEIGHT * resize_patches(table_PC[None], grid, self.geometry.student_hw)[0].contiguous()

    @torch.no_grad()
    def forward(self, values_BKVPR: Tensor, crops_BV4: Tensor, scales_BKVP: Tensor | None = None) -> AlignmentTargets:
        """Targets of a batch; runs on the device of its input and never waits for it.

        Args:
            values_BKVPR, scales_BKVP: the batch's :class:`Codes`.
            crops_BV4: top, left, height and width of each augmented view, in fractions; (0, 0, 1, 1) for the whole.
        """
        crops, (layers, views) = crops_BV4.float(), values_BKVPR.shape[1:3]
        shape = layers, len(crops), views, math.prod(self.geometry.student_hw), self.mean_KC.shape[1]
        targets_KBVNC = crops.new_empty(shape)
        with torch.autocast(values_BKVPR.device.type, enabled=False):
            rows, columns = (self._crop_weights(crops, axis) for axis in (0, 1))
            # Layer by layer: what is read again then lies in the processor's cache.
            for layer, targets in enumerate(targets_KBVNC):
                scales = None if scales_BKVP is None else scales_BKVP[:, layer]
                grid = dequantize(Codes(values_BKVPR[:, layer], scales)).unflatten(2, self.geometry.stored_hw)
                cropped = (rows @ grid.flatten(3)).unflatten(3, grid.shape[3:])
                tokens = (columns[:, :, None] @ cropped).flatten(2, 3)
                if self.directions_KCR is not None:
                    tokens = linear(tokens, self.directions_KCR[layer])
                offset = self.mean_KC[layer] if self.position_NC is None else self.mean_KC[layer] + self.position_NC
                torch.add(tokens, offset, out=targets)
        return AlignmentTargets(targets_KBVNC.flatten(2, 3))

    def _crop_weights(self, crops_BV4: Tensor, axis: int) -> Tensor:
        return crop_weights(
            crops_BV4[..., axis],
            crops_BV4[..., axis + 2],
            tokens=self.geometry.student_hw[axis],
            stored=self.geometry.stored_hw[axis],
            teacher=self.geometry.teacher_hw[axis],
            pixels=self.geometry.view_pixels,
        )
