"""Frames from the real simulator: both views agree about where things are, and a finished shard is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("libero", reason="LIBERO's simulator is not installed")

from experiments.mini.make.teacher_data import OBJECT, ROBOT, TeacherDataConfig, main
from experiments.mini.make.teacher_frames import ROTATION, TRANSLATION, FrameSet, geometry, load_frames
from prismatic.util.cli import parse
from prismatic.util.errors import UsageError

SIZE = 64
WHOLE = torch.tensor([0.0, 0.0, 1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher_data")
    main(TeacherDataConfig(out=out, tasks="libero_spatial:0", episodes=1, frames=4, image_size=SIZE))
    return out


@pytest.fixture(scope="module")
def frames(folder: Path) -> FrameSet:
    return load_frames(folder, [("libero_spatial", 0)], SIZE)


def test_fields(frames: FrameSet) -> None:
    assert frames.images.shape == (4, 2, 3, SIZE, SIZE)
    assert frames.images.float().std() > 20
    assert frames.depths.isfinite().all()
    assert 0.01 < float(frames.depths.min()) < float(frames.depths.max()) < 10
    assert {ROBOT, OBJECT} <= set(frames.kinds.unique().tolist())


def test_camera_and_scene_change_between_frames(frames: FrameSet) -> None:
    positions = frames.camera_to_world[:, :, :3, 3]
    moved = (positions[1:] - positions[:-1]).norm(dim=-1)
    assert (moved[:, 1] > 0).all()  # The hand always moves,
    assert (moved[:, 0] > 0.01).any()  # the third-person camera in most frames.


def test_points_seen_by_the_wrist_are_where_the_other_view_sees_them(frames: FrameSet) -> None:
    targets = geometry(frames, torch.arange(4), WHOLE.expand(4, 2, 3), cells=SIZE)
    points = targets.points_BVGG3[:, 1]
    focal = float(frames.intrinsics[0, 0, 1, 1])
    column = (points[..., 0] / points[..., 2] * focal + SIZE / 2).long()
    row = (points[..., 1] / points[..., 2] * focal + SIZE / 2).long()
    visible = (column >= 0) & (column < SIZE) & (row >= 0) & (row < SIZE) & (points[..., 2] > 0)
    frame = torch.arange(4)[:, None, None].expand_as(visible)
    seen = targets.depth_BVGG[:, 0][frame[visible], row[visible], column[visible]]
    # Some points are hidden behind the arm in the other view.
    assert (seen - points[..., 2][visible]).abs().median() < 0.01
    camera = targets.camera_BVK[:, 1]
    x, y = camera[:, ROTATION][:, :3], camera[:, ROTATION][:, 3:]
    torch.testing.assert_close((x * y).sum(-1), torch.zeros(4), atol=1e-4, rtol=0)
    assert (camera[:, TRANSLATION].norm(dim=-1) > 0.1).all()


def test_a_finished_shard_is_kept(folder: Path) -> None:
    shard = folder / "libero_spatial-0.npz"
    before = shard.stat().st_mtime_ns
    main(TeacherDataConfig(out=folder, tasks="libero_spatial:0", episodes=1, frames=4, image_size=SIZE))
    assert shard.stat().st_mtime_ns == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("flag", ["episodes", "frames", "image_size", "seed"])
def test_frames_made_with_other_flags_are_not_reused(folder: Path, flag: str) -> None:
    flags = {"episodes": 1, "frames": 4, "image_size": SIZE, "seed": 0}
    with pytest.raises(UsageError, match=f"--{flag} {flags[flag]}, not 7; accepted: these, or another folder"):
        main(TeacherDataConfig(out=folder, tasks="libero_spatial:0", **{**flags, flag: 7}))


def test_frames_of_unknown_origin_are_not_reused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "libero_spatial-0.npz", tmp_path)
    with pytest.raises(UsageError, match=r"no frames\.json on how they were made"):
        main(TeacherDataConfig(out=tmp_path, tasks="libero_spatial:0", episodes=1, frames=4, image_size=SIZE))


def test_same_flags_same_frames(folder: Path, tmp_path: Path) -> None:
    main(TeacherDataConfig(out=tmp_path, tasks="libero_spatial:0", episodes=1, frames=4, image_size=SIZE))
    with np.load(folder / "libero_spatial-0.npz") as first, np.load(tmp_path / "libero_spatial-0.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first.files)


def test_refuses_task_lists_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match="--tasks: 'libero_object' found; accepted: SUITE:NUMBERS"):
        parse(TeacherDataConfig, ["--out", "o", "--tasks", "libero_object"])
