"""Geometry targets of the mini teacher agree with a scene whose geometry is known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.mini.make import teacher_frames
from experiments.mini.make.teacher_data import parse_tasks
from experiments.mini.make.teacher_frames import FrameSet, draw_crops, geometry, jitter_colors, load_frames
from prismatic.util.errors import UsageError

SIZE, FOCAL = 64, 60.0


def _looking_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """camera_to_world with axes right, down, forward."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = eye
    return pose


def _plane_frames(count: int = 3) -> FrameSet:
    """Two mirrored cameras above the plane z = 0; each pixel's color codes its place."""
    intrinsics = np.array([[-FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])
    centers = np.arange(SIZE) + 0.5
    columns, rows = np.meshgrid(centers, centers)
    rays = np.linalg.inv(intrinsics) @ np.stack([columns, rows, np.ones_like(rows)]).reshape(3, -1)
    poses, depths = [], []
    for index in range(count):
        eyes = [np.array([1.0, 0.1 * index, 1.5]), np.array([0.1, -0.2, 0.5 + 0.1 * index])]
        pair = [_looking_at(eye, np.array([0.0, 0.05, 0.0])) for eye in eyes]
        poses.append(pair)
        depths.append([(-pose[2, 3] / (pose[2, :3] @ rays)).reshape(SIZE, SIZE) for pose in pair])
    ramp = np.stack([columns / SIZE * 255, rows / SIZE * 255, np.zeros_like(rows)]).round()
    images = torch.from_numpy(ramp).to(torch.uint8).expand(count, 2, -1, -1, -1)
    return FrameSet(
        images=images,
        depths=torch.tensor(np.array(depths)).half(),
        kinds=torch.zeros(count, 2, SIZE, SIZE, dtype=torch.uint8),
        intrinsics=torch.tensor(intrinsics).float().expand(count, 2, 3, 3),
        camera_to_world=torch.tensor(np.array(poses)).float(),
    )


def _mirror_to_world(frames: FrameSet, points: torch.Tensor, index: int) -> torch.Tensor:
    unmirrored = points * torch.tensor([-1.0, 1.0, 1.0])
    pose = frames.camera_to_world[index, 0]
    return unmirrored @ pose[:3, :3].T + pose[:3, 3]


def test_points_of_both_views_lie_on_the_plane_under_any_crop() -> None:
    frames = _plane_frames()
    crops = draw_crops(3, 2, torch.Generator().manual_seed(0))
    targets = geometry(frames, torch.arange(3), crops, cells=12)
    assert targets.points_BVGG3.shape == (3, 2, 12, 12, 3)
    for index in range(3):
        height = _mirror_to_world(frames, targets.points_BVGG3[index], index)[..., 2]
        assert height.abs().max() < 2e-3  # Depth is stored in half precision.


def test_first_view_is_the_frame_of_reference_and_its_points_project_to_their_cells() -> None:
    frames = _plane_frames()
    crops = draw_crops(3, 2, None)
    targets = geometry(frames, torch.arange(3), crops, cells=8)
    identity = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 1, 0])
    torch.testing.assert_close(targets.camera_BVK[:, 0, :9], identity.expand(3, 9), atol=1e-5, rtol=0)
    points = targets.points_BVGG3[:, 0]
    # A right-handed camera with positive focal lengths: columns grow with x.
    column = points[..., 0] / points[..., 2] * FOCAL + SIZE / 2
    expected = (crops[0, 0, 0] + (torch.arange(8) + 0.5) / 8 * crops[0, 0, 2]) * SIZE
    assert (column - expected).abs().max() < 0.51
    torch.testing.assert_close(points[..., 2], targets.depth_BVGG[:, 0], atol=1e-5, rtol=0)


def test_relative_pose_takes_second_view_points_to_the_first_camera() -> None:
    frames = _plane_frames()
    targets = geometry(frames, torch.arange(3), draw_crops(3, 2, None), cells=4)
    camera = targets.camera_BVK[:, 1]
    x, y = camera[:, teacher_frames.ROTATION][:, :3], camera[:, teacher_frames.ROTATION][:, 3:]
    rotation = torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3), atol=1e-5, rtol=0)
    inside = (targets.points_BVGG3[:, 1] - camera[:, None, None, teacher_frames.TRANSLATION]).unflatten(-1, (3, 1))
    own = (rotation.transpose(-1, -2)[:, None, None] @ inside).squeeze(-1)
    torch.testing.assert_close(own[..., 2], targets.depth_BVGG[:, 1], atol=1e-4, rtol=0)


def test_images_and_targets_see_the_same_crop() -> None:
    frames = _plane_frames()
    crops = draw_crops(3, 2, torch.Generator().manual_seed(5))
    images = teacher_frames.crop_images(frames.images, crops)
    assert images.shape == frames.images.shape
    seen = images[..., :2, :, :].mean(dim=(-2, -1))
    center = geometry(frames, torch.arange(3), crops, cells=4).camera_BVK[..., teacher_frames.CROP] + 0.5
    torch.testing.assert_close(seen, center, atol=0.01, rtol=0)


def test_jitter_differs_between_views_and_stays_in_range() -> None:
    images = torch.full((2, 2, 3, 8, 8), 0.5)
    images[:, :, 0] = 0.9
    changed = jitter_colors(images, torch.Generator().manual_seed(1))
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({round(float(view.mean()), 5) for view in changed.flatten(0, 1)}) == 4
    torch.testing.assert_close(changed, jitter_colors(images, torch.Generator().manual_seed(1)))


def test_loads_shards_of_several_tasks_and_names_a_missing_one(tmp_path: Path) -> None:
    frames = _plane_frames(2)
    arrays = {name: getattr(frames, name).numpy() for name in ("depths", "kinds", "intrinsics", "camera_to_world")}
    images = frames.images.permute(0, 1, 3, 4, 2).contiguous().numpy()
    for task in (0, 2):
        np.savez(tmp_path / f"libero_object-{task}.npz", images=images, **arrays)
    loaded = load_frames(tmp_path, [("libero_object", 0), ("libero_object", 2)], 28)
    assert len(loaded) == 4
    assert loaded.images.shape == (4, 2, 3, 28, 28)
    assert loaded.images.dtype == torch.uint8
    with pytest.raises(UsageError, match=r"libero_object-1\.npz"):
        load_frames(tmp_path, [("libero_object", 1)], 28)


@pytest.mark.parametrize("spec", ["libero_object", "libero_object:", "libero_object:a", "x:1-2-3", ""])
def test_refuses_task_lists_it_cannot_read(spec: str) -> None:
    with pytest.raises(UsageError, match="--tasks"):
        parse_tasks("--tasks", spec)


def test_reads_task_lists() -> None:
    expected = [("libero_object", 0), ("libero_object", 1), ("libero_object", 5), ("libero_goal", 3)]
    assert parse_tasks("--tasks", "libero_object:0-1,5;libero_goal:3") == expected
