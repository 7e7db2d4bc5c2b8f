"""The whole VGGT: cameras, depth and 3D points of a set of views, read out of the aggregator by the heads one asks for.

The alignment does not need them; they serve analyses and training of a teacher. Not obvious:
- Dense heads rectify a residual unit's input in place, so that the skip connection carries the rectified values.
- Confidences are 1 + exp(x), depths exp(x), points sign(x) (exp(|x|) - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rocket_align.pooling import POSITION_WEIGHT, sine_position_embedding
from rocket_align.teacher.vggt.aggregator import Block, Mlp, VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, find_weights, load_strictly, read_weights

HeadName = Literal["camera", "depth", "point"]
_DENSE_OUTPUTS = {"depth": 2, "point": 4}
# Translation (3), quaternion (4), field of view (2).
POSE_SIZE = 9
_FIELD_OF_VIEW = slice(7, 9)
_CAMERA_ITERATIONS = 4


class CameraHead(nn.Module):
    """Camera of every view, refined in a few passes over the camera tokens.

    Each pass modulates the tokens by the last estimate (adaptive layer norm) and adds a correction to it.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.trunk = nn.Sequential(
            *(
                Block(
                    dim,
                    config.camera_num_heads,
                    config.mlp_ratio,
                    qk_norm=False,
                    layer_scale_init=config.layer_scale_init,
                )
                for _ in range(config.camera_depth)
            )
        )
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

    def forward(self, camera_tokens_BVC: Tensor, iterations: int = _CAMERA_ITERATIONS) -> tuple[Tensor, ...]:
        """Pose encodings (B, V, 9) after each pass: translation, quaternion, field of view (not negative)."""
        tokens = self.token_norm(camera_tokens_BVC)
        normalized = self.adaln_norm(tokens)
        pose = None
        estimates = []
        for _ in range(iterations):
            # Gradients do not run from one pass into the one before.
            known = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if pose is None else pose.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, dim=-1)
            refined = self.trunk(tokens + gate * (normalized * (1 + scale) + shift))
            correction = self.pose_branch(self.trunk_norm(refined))
            pose = correction if pose is None else pose + correction
            start = _FIELD_OF_VIEW.start
            estimates.append(torch.cat((pose[..., :start], pose[..., start:].relu()), dim=-1))
        return tuple(estimates)


class ResidualUnit(nn.Module):
    """relu(x) + conv(relu(conv(relu(x))))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        return rectified + self.conv2(F.relu(self.conv1(rectified)))


class Fusion(nn.Module):
    """Adds a finer map to a coarser one and enlarges the sum to a given size (twice its own when None)."""

    def __init__(self, features: int, *, with_finer: bool) -> None:
        super().__init__()
        if with_finer:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, coarse: Tensor, finer: Tensor | None, size: Sequence[int] | None) -> Tensor:
        if finer is not None:
            coarse = coarse + self.resConfUnit1(finer)
        height, width = coarse.shape[-2:]
        target = (2 * height, 2 * width) if size is None else tuple(size)
        enlarged = F.interpolate(self.resConfUnit2(coarse), size=target, mode="bilinear", align_corners=True)
        return self.out_conv(enlarged)


class _Pyramid(nn.Module):
    """The fusion pyramid and the output convolutions, under the checkpoints' name `scratch`."""

    def __init__(self, channels: Sequence[int], features: int, outputs: int) -> None:
        super().__init__()
        for level, width in enumerate(channels, start=1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", Fusion(features, with_finer=level < len(channels)))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1)
        )

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps, finest first -> one map of twice the finest's size."""
        reduced = [self.get_submodule(f"layer{level}_rn")(x) for level, x in enumerate(maps, start=1)]
        fused = reduced[-1]
        for level in range(len(reduced), 0, -1):
            finer = None if level == len(reduced) else reduced[level - 1]
            size = reduced[level - 2].shape[-2:] if level > 1 else None
            fused = self.get_submodule(f"refinenet{level}")(fused, finer, size)
        return self.output_conv1(fused)


def _add_positions(x_NCHW: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Add the weighted sine embedding of the map's own grid."""
    grid_hw = (x_NCHW.shape[2], x_NCHW.shape[3])
    embedding = sine_position_embedding(grid_hw, image_hw, x_NCHW.shape[1], x_NCHW.device)
    return x_NCHW + POSITION_WEIGHT * embedding.T.unflatten(1, grid_hw).to(x_NCHW.dtype)


class DenseHead(nn.Module):
    """A dense-prediction transformer head (Ranftl et al. 2021): per pixel some values and their confidence.

    Args:
        config: sizes.
        outputs: channels per pixel, the last of which is the confidence.
    """

    def __init__(self, config: VGGTConfig, outputs: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        dim, channels = 2 * config.embed_dim, config.dense_channels
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in channels)
        # From patches to 4, 2, 1 and 1/2 times as many cells per side.
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = _Pyramid(channels, config.dense_features, outputs)

    def forward(self, features: Sequence[Tensor], grid_hw: tuple[int, int]) -> Tensor:
        """Raw outputs.

        Args:
            features: patch features of `config.dense_layers`, each (B, V, P, 2C).
            grid_hw: patches along height and width.

        Returns:
            (B, V, H, W, outputs), H and W in pixels.
        """
        batch, views = features[0].shape[:2]
        image_hw = (grid_hw[0] * self.patch_size, grid_hw[1] * self.patch_size)
        maps = []
        for feature, project, resize in zip(features, self.projects, self.resize_layers):
            tokens = self.norm(feature.flatten(0, 1))
            cells = project(tokens.transpose(1, 2).unflatten(2, grid_hw))
            maps.append(resize(_add_positions(cells, image_hw)))
        fused = F.interpolate(self.scratch.fuse(maps), size=image_hw, mode="bilinear", align_corners=True)
        pixels = self.scratch.output_conv2(_add_positions(fused, image_hw))
        return pixels.permute(0, 2, 3, 1).unflatten(0, (batch, views))


class DenseOutput(NamedTuple):
    """Values (B, V, H, W, D) and confidences (B, V, H, W), which are above 1."""

    values: Tensor
    confidence: Tensor


def to_depth(raw: Tensor) -> DenseOutput:
    """Positive depths and confidences from a dense head's raw outputs."""
    return DenseOutput(raw[..., :-1].exp(), 1 + raw[..., -1].exp())


def to_points(raw: Tensor) -> DenseOutput:
    """Points in the first camera's frame and confidences from a dense head's raw outputs."""
    values = raw[..., :-1]
    return DenseOutput(values.sign() * values.abs().expm1(), 1 + raw[..., -1].exp())


class Geometry(NamedTuple):
    """Predictions of the heads that were built; None for the others."""

    poses: tuple[Tensor, ...] | None  # (B, V, 9) camera encodings after each refinement, the last is the best
    depth: DenseOutput | None  # Depths (B, V, H, W, 1) and their confidence
    points: DenseOutput | None  # Points (B, V, H, W, 3) in the first camera's frame and their confidence


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

        Raises ValueError: nothing at `path`, or a file with missing or unexpected tensors.
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
