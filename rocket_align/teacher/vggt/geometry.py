"""The whole VGGT: cameras, depth and points of a set of views, through the heads one asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.checkpoint import find_weights, load_strictly, read_weights
from rocket_align.teacher.vggt.config import VGGTConfig
from rocket_align.teacher.vggt.heads import CameraHead, DenseHead, DenseOutput, to_depth, to_points

HeadName = Literal["camera", "depth", "point"]
_DENSE_OUTPUTS = {"depth": 2, "point": 4}


class Geometry(NamedTuple):
    """Predictions of the heads that were built; None for the others.

    Attributes:
        poses: (B, V, 9) camera encodings after each refinement, the last is the best.
        depth: depths (B, V, H, W, 1) and their confidence.
        points: points (B, V, H, W, 3) in the first camera's frame and their confidence.
    """

    poses: tuple[Tensor, ...] | None
    depth: DenseOutput | None
    points: DenseOutput | None


class VGGTGeometry(nn.Module):
    """A trainable VGGT with some of its heads, under the released parameter names.

    Args:
        config: sizes.
        heads: any of "camera", "depth", "point".

    Raises:
        ValueError: an unknown head, or dense layers the model does not have.
    """

    def __init__(self, config: VGGTConfig, heads: Sequence[HeadName] = ("camera", "depth", "point")) -> None:
        super().__init__()
        unknown = sorted(set(heads) - set(get_args(HeadName)))
        if unknown:
            raise ValueError(f"heads: found {', '.join(unknown)}; accepted: {', '.join(get_args(HeadName))}")
        dense = [name for name in _DENSE_OUTPUTS if name in heads]
        if dense and not all(0 <= layer < config.depth for layer in config.dense_layers):
            raise ValueError(f"dense_layers: found {config.dense_layers}; accepted: 0 to {config.depth - 1}")
        self.config = config
        self.aggregator = VGGTAggregator(config)
        self.camera_head = CameraHead(config) if "camera" in heads else None
        self.depth_head = DenseHead(config, _DENSE_OUTPUTS["depth"]) if "depth" in heads else None
        self.point_head = DenseHead(config, _DENSE_OUTPUTS["point"]) if "point" in heads else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        heads: Sequence[HeadName] = ("camera", "depth", "point"),
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> VGGTGeometry:
        """Load the same folders and files as `VGGTTeacher.from_pretrained`, in evaluation mode.

        Raises:
            ValueError: nothing at `path`, or a file with missing or unexpected tensors.
        """
        weights_path, config = find_weights(path)
        with torch.device("meta"):
            model = cls(config, heads)
        wanted = [f"{name}_head." for name in heads]
        load_strictly(model, read_weights(weights_path, config.depth, wanted), weights_path)
        return model.to(device=device, dtype=dtype).eval()

    def forward(self, images_BV3HW: Tensor) -> Geometry:
        """Predictions for images in [0, 1] whose sides are multiples of the patch size."""
        patch, special = self.config.patch_size, self.config.num_special_tokens
        grid_hw = (images_BV3HW.shape[-2] // patch, images_BV3HW.shape[-1] // patch)
        layers = sorted({*self.config.dense_layers, self.config.depth - 1})
        if self.depth_head is None and self.point_head is None:
            layers = [self.config.depth - 1]
        features = dict(zip(layers, self.aggregator(images_BV3HW, layers, keep_special=True)))
        dense = [features[layer][:, :, special:] for layer in self.config.dense_layers if layer in features]
        return Geometry(
            None if self.camera_head is None else self.camera_head(features[layers[-1]][:, :, 0]),
            None if self.depth_head is None else to_depth(self.depth_head(dense, grid_hw)),
            None if self.point_head is None else to_points(self.point_head(dense, grid_hw)),
        )
