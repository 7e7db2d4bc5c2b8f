"""The mini teacher while it is trained: a VGGT aggregator with a linear readout of every layer, their loss and scores.

Every layer has its own readout and its own loss while the teacher is trained (deep supervision), so that the middle
layers know geometry too. The same readouts, fitted to a frozen random aggregator, are the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.mini.make.teacher_data import OBJECT
from experiments.mini.make.teacher_frames import CAMERA_DIM, ROTATION, TRANSLATION, Targets
from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig

READOUT_NAME = "readout.safetensors"
NUM_VIEWS = 2
# Nearly zero, as upstream starts them, is a slow start for a short training.
_TOKEN_STD = 0.02
POINT_DIM = 3
NUM_KINDS = 4
_CAMERA_WEIGHT = 0.5
_KIND_WEIGHT = 0.3


@dataclass(frozen=True)
class Prediction:
    """Standardized depth (B, V, G, G), points (B, V, G, G, 3), camera (B, V, K); kinds as logits (B, V, G, G, 4)."""

    depth_BVGG: Tensor
    points_BVGG3: Tensor
    camera_BVK: Tensor
    kinds_BVGGC: Tensor | None = None


class Scale(nn.Module):
    """Mean of every cell and deviation of every view over the training frames: readouts predict the rest.

    Most of a fixed scene's depth is the same in every frame. Given for free, it neither hides in the loss what the
    picture tells nor costs training time.

    Args:
        views: V.
        grid: cells along a side, G.
    """

    depth_mean: Tensor
    depth_std: Tensor
    points_mean: Tensor
    points_std: Tensor
    camera_mean: Tensor
    camera_std: Tensor

    def __init__(self, views: int, grid: int) -> None:
        super().__init__()
        shapes = {"depth": (grid, grid, 1), "points": (grid, grid, POINT_DIM), "camera": (CAMERA_DIM,)}
        for name, shape in shapes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(views, *shape))
            self.register_buffer(f"{name}_std", torch.ones(views, *(1 for _ in shape[:-1]), shape[-1]))

    def fit(self, targets: Targets) -> None:
        """Measure; a component that never varies gets deviation 1."""
        depth = targets.depth_BVGG.log()[..., None]
        raw = {"depth": depth, "points": targets.points_BVGG3, "camera": targets.camera_BVK}
        for name, values in raw.items():
            mean = values.mean(dim=0)
            over = tuple(range(1, mean.ndim - 1))
            variance = (values - mean).square().mean(dim=0)
            std = (variance.mean(dim=over, keepdim=True) if over else variance).sqrt()
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-4, std, torch.ones_like(std)))

    def standardize(self, targets: Targets) -> Prediction:
        """The prediction that would be right."""
        return Prediction(
            ((targets.depth_BVGG.log()[..., None] - self.depth_mean) / self.depth_std)[..., 0],
            (targets.points_BVGG3 - self.points_mean) / self.points_std,
            (targets.camera_BVK - self.camera_mean) / self.camera_std,
        )

    def restore(self, prediction: Prediction, kinds_BVGG: Tensor) -> Targets:
        """Back to meters."""
        return Targets(
            (prediction.depth_BVGG[..., None] * self.depth_std + self.depth_mean)[..., 0].exp(),
            prediction.points_BVGG3 * self.points_std + self.points_mean,
            kinds_BVGG,
            prediction.camera_BVK * self.camera_std + self.camera_mean,
        )


class Readout(nn.Module):
    """One layer's readout: LayerNorm without parameters, then linear; camera token -> camera, patches -> cells.

    Args:
        channels: of a layer's features (2 * embed_dim).
        num_special: tokens before the patches, the camera token first.
        cells: side of the square of cells per patch.
    """

    def __init__(self, channels: int, num_special: int, cells: int) -> None:
        super().__init__()
        self.num_special, self.cells = num_special, cells
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.patch = nn.Linear(channels, cells * cells * (1 + POINT_DIM + NUM_KINDS))
        self.camera = nn.Linear(channels, CAMERA_DIM)

    def forward(self, tokens_BVPC: Tensor) -> Prediction:
        tokens = self.norm(tokens_BVPC)
        patches = self.patch(tokens[:, :, self.num_special :])
        side = round(patches.shape[2] ** 0.5)
        grid = patches.unflatten(3, (self.cells, self.cells, -1)).unflatten(2, (side, side))
        # (B, V, row, column, cell row, cell column, values) -> (B, V, G, G, values)
        grid = grid.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        points, kinds = grid[..., 1 : 1 + POINT_DIM], grid[..., 1 + POINT_DIM :]
        return Prediction(grid[..., 0], points, self.camera(tokens[:, :, 0]), kinds)


class TeacherModel(nn.Module):
    """Aggregator, readouts and the scale of what they predict: squares of `cells` x `cells` depths a patch."""

    def __init__(self, config: VGGTConfig, cells: int) -> None:
        super().__init__()
        self.aggregator = VGGTAggregator(config)
        nn.init.normal_(self.aggregator.camera_token, std=_TOKEN_STD)
        nn.init.normal_(self.aggregator.register_token, std=_TOKEN_STD)
        self.readouts = nn.ModuleList(
            Readout(2 * config.embed_dim, config.num_special_tokens, cells) for _ in range(config.depth)
        )
        self.scale = Scale(NUM_VIEWS, config.grid_size * cells)

    def forward(self, images_BV3HW: Tensor) -> list[Prediction]:
        """Images in [0, 1] -> each layer's prediction."""
        features = self.aggregator(images_BV3HW, keep_special=True)
        return [readout(tokens) for readout, tokens in zip(self.readouts, features, strict=True)]


def readout_loss(prediction: Prediction, target: Prediction, kinds_BVGG: Tensor) -> Tensor:
    """Huber loss of standardized log-depth, its differences between neighboring cells, points and camera; kinds.

    The differences make small objects count, whose depth differs little from the table's (VGGT has such a term too).
    Telling robot, objects and fixtures apart is not VGGT's task; it stands in for the semantic pretraining that
    VGGT's patch embedding brings along, and makes learning from scratch several times faster.
    """
    depth = prediction.depth_BVGG - target.depth_BVGG
    edges = (_huber(depth.diff(dim=-1)) + _huber(depth.diff(dim=-2))) / 2
    points = _huber(prediction.points_BVGG3 - target.points_BVGG3)
    camera = _huber(prediction.camera_BVK - target.camera_BVK)
    geometry = _huber(depth) + edges + points + _CAMERA_WEIGHT * camera
    if prediction.kinds_BVGGC is None:
        return geometry
    kinds = F.cross_entropy(prediction.kinds_BVGGC.flatten(0, 3), kinds_BVGG.flatten().long())
    return geometry + _KIND_WEIGHT * kinds


def _huber(error: Tensor) -> Tensor:
    return F.smooth_l1_loss(error, torch.zeros_like(error))


def _rotation_angle(first: Tensor, second: Tensor) -> Tensor:
    """Degrees between rotations given by two columns each (..., 6), the predicted ones made orthonormal."""

    def matrix(columns: Tensor) -> Tensor:
        x = F.normalize(columns[..., :3], dim=-1)
        y = F.normalize(columns[..., 3:] - (columns[..., 3:] * x).sum(-1, keepdim=True) * x, dim=-1)
        return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1)

    trace = (matrix(first) * matrix(second)).sum(dim=(-2, -1))
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def scores(predicted: Targets, target: Targets) -> dict[str, Tensor]:
    """Sums and counts of errors, to be added up by :func:`summarize`; the first camera is trivial, so left out."""
    ratio = torch.maximum(predicted.depth_BVGG / target.depth_BVGG, target.depth_BVGG / predicted.depth_BVGG)
    relative = (predicted.depth_BVGG - target.depth_BVGG).abs() / target.depth_BVGG
    distance = (predicted.points_BVGG3 - target.points_BVGG3).norm(dim=-1)
    on_object = (target.kinds_BVGG == OBJECT).float()
    moved, true = predicted.camera_BVK[:, 1:], target.camera_BVK[:, 1:]
    cells, cameras = torch.tensor(float(relative.numel())), torch.tensor(float(moved[..., 0].numel()))
    return {
        "abs_rel": torch.stack((relative.sum(), cells)),
        "abs_rel_third_person": torch.stack((relative[:, 0].sum(), cells / relative.shape[1])),
        "abs_rel_wrist": torch.stack((relative[:, 1:].sum(), cells * (1 - 1 / relative.shape[1]))),
        "abs_rel_objects": torch.stack(((relative * on_object).sum(), on_object.sum())),
        "delta_1.25": torch.stack(((ratio < 1.25).float().sum(), cells)),
        "delta_1.05": torch.stack(((ratio < 1.05).float().sum(), cells)),
        "point_error_cm": torch.stack((distance.sum() * 100, cells)),
        "camera_shift_cm": torch.stack(
            ((moved[..., TRANSLATION] - true[..., TRANSLATION]).norm(dim=-1).sum() * 100, cameras)
        ),
        "camera_turn_deg": torch.stack((_rotation_angle(moved[..., ROTATION], true[..., ROTATION]).sum(), cameras)),
    }


def summarize(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means of the scores of several batches."""
    total = {name: torch.stack([batch[name] for batch in batches]).sum(dim=0) for name in batches[0]}
    return {name: round(float(value[0] / value[1].clamp(min=1)), 5) for name, value in total.items()}
