"""Frames of `teacher_data` in memory, and what the mini teacher learns from them: augmented images and their geometry.

Views are in LIBERO's mirrored orientation. A mirrored picture of a scene is an ordinary picture of the mirrored scene,
so all geometry here is mirrored too (x changes its sign in the camera's frame): depth stays, points and relative poses
are those of right-handed cameras in a mirrored world. As in VGGT, the first view's camera is the frame of reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.mini.make.teacher_data import read_shard
from prismatic.util.errors import UsageError

# As the student's augmentation: a random square of 90% of the area.
CROP_AREA = 0.9
_JITTER = 0.2
MAX_DEPTH = 20.0
# Of the camera target: translation, the first two columns of the rotation, center of the crop.
TRANSLATION, ROTATION, CROP = slice(0, 3), slice(3, 9), slice(9, 11)
CAMERA_DIM = 11


@dataclass(frozen=True)
class FrameSet:
    """Frames of some tasks.

    Attributes:
        images: uint8 (N, V, 3, S, S), resized to the teacher's input.
        depths: float16 (N, V, H, W), meters.
        kinds: uint8 (N, V, H, W), see `teacher_data`.
        intrinsics: float32 (N, V, 3, 3), of the H x W picture; fx is negative (mirrored).
        camera_to_world: float32 (N, V, 4, 4), before the mirroring.
    """

    images: Tensor
    depths: Tensor
    kinds: Tensor
    intrinsics: Tensor
    camera_to_world: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Targets:
    """Geometry of a batch of (possibly cropped) views, on a grid of G x G cells.

    Attributes:
        depth_BVGG: meters.
        points_BVGG3: meters, in the first view's (mirrored) camera frame.
        kinds_BVGG: uint8, see `teacher_data`.
        camera_BVK: see TRANSLATION, ROTATION, CROP.
    """

    depth_BVGG: Tensor
    points_BVGG3: Tensor
    kinds_BVGG: Tensor
    camera_BVK: Tensor


def load_frames(folder: Path, tasks: Sequence[tuple[str, int]], image_size: int) -> FrameSet:
    """Read the shards of `tasks`. Raises UsageError when one is missing."""
    parts = []
    for suite, task_id in tasks:
        shard = folder / f"{suite}-{task_id}.npz"
        if not shard.is_file():
            raise UsageError(
                f"--data: no {shard.name} in {folder}; make it with python -m experiments.mini.make.teacher_data"
            )
        stored = read_shard(shard, [field.name for field in fields(FrameSet)])
        arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
        arrays["images"] = _resize(arrays["images"], image_size)
        parts.append(arrays)
    return FrameSet(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _resize(images_NVHW3: Tensor, size: int) -> Tensor:
    """uint8 pictures to uint8 (N, V, 3, size, size)."""
    flat = images_NVHW3.flatten(0, 1).permute(0, 3, 1, 2).float()
    small = F.interpolate(flat, size=(size, size), mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).unflatten(0, images_NVHW3.shape[:2])


def draw_crops(batch: int, views: int, generator: torch.Generator | None) -> Tensor:
    """Squares (B, V, 3) as left, top, side in fractions of the picture; without a generator the central one."""
    side = CROP_AREA**0.5
    if generator is None:
        place = torch.full((batch, views, 2), 0.5)
    else:
        place = torch.rand(batch, views, 2, generator=generator)
    return torch.cat((place * (1 - side), torch.full((batch, views, 1), side)), dim=-1)


def _cell_centers(crops_BV3: Tensor, cells: int) -> Tensor:
    """(B, V, cells, cells, 2) as (x, y) fractions of the uncropped picture."""
    line = (torch.arange(cells) + 0.5) / cells
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    return crops_BV3[:, :, None, None, :2] + grid * crops_BV3[:, :, None, None, 2:]


def crop_images(images_BV3SS: Tensor, crops_BV3: Tensor) -> Tensor:
    """Cut out and resize back (bilinear): uint8 to float in [0, 1]."""
    size = images_BV3SS.shape[-1]
    where = _cell_centers(crops_BV3, size).flatten(0, 1) * 2 - 1
    pixels = images_BV3SS.flatten(0, 1).float() / 255
    cut = F.grid_sample(pixels, where, mode="bilinear", padding_mode="border", align_corners=False)
    return cut.unflatten(0, images_BV3SS.shape[:2])


def jitter_colors(images_BV3SS: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation, drawn per view."""
    shape = (*images_BV3SS.shape[:2], 1, 1, 1)
    brightness, contrast, saturation = (
        (torch.rand(shape, generator=generator) * 2 - 1) * _JITTER + offset for offset in (0.0, 1.0, 1.0)
    )
    images = (images_BV3SS + brightness).clamp(0, 1)
    middle = images.mean(dim=(-2, -1), keepdim=True)
    images = (images - middle) * contrast + middle
    gray = images.mean(dim=2, keepdim=True)
    return ((images - gray) * saturation + gray).clamp(0, 1)


def geometry(frames: FrameSet, chosen: Tensor, crops_BV3: Tensor, cells: int) -> Targets:
    """Targets of the frames `chosen` seen through `crops_BV3`; depth is that of the pixel at each cell's center."""
    height = frames.depths.shape[-1]
    pixel = (_cell_centers(crops_BV3, cells) * height).long().clamp(0, height - 1)
    flat = (pixel[..., 1] * height + pixel[..., 0]).flatten(2)
    depth = frames.depths[chosen].flatten(2).gather(2, flat).float().clamp(max=MAX_DEPTH)
    kinds = frames.kinds[chosen].flatten(2).gather(2, flat)
    homogeneous = torch.cat((pixel.flatten(2, 3) + 0.5, torch.ones(*flat.shape, 1)), dim=-1)
    rays = homogeneous @ torch.linalg.inv(frames.intrinsics[chosen]).transpose(-1, -2)
    cameras = frames.camera_to_world[chosen]
    pose = torch.linalg.inv(cameras[:, :1]) @ cameras  # In the first view's frame, before the mirroring.
    points = (rays * depth[..., None]) @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    rotation = pose[..., :3, :3] * mirror * mirror[:, None]
    center = crops_BV3[..., :2] + crops_BV3[..., 2:] / 2 - 0.5
    camera = torch.cat((pose[..., :3, 3] * mirror, rotation[..., 0], rotation[..., 1], center), dim=-1)
    grid = (cells, cells)
    return Targets(depth.unflatten(2, grid), (points * mirror).unflatten(2, grid), kinds.unflatten(2, grid), camera)
