"""Readouts put cells where they belong; scales invert; scores mean what they are called."""

from __future__ import annotations

import torch

from experiments.mini.make.teacher_data import OBJECT
from experiments.mini.make.teacher_frames import CAMERA_DIM, Targets
from experiments.mini.make.teacher_model import Prediction, Readout, Scale, readout_loss, scores, summarize


def _targets(seed: int = 0, batch: int = 4, cells: int = 6) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    camera = torch.randn(batch, 2, CAMERA_DIM, generator=generator)
    camera[..., 3:9] = torch.linalg.qr(torch.randn(batch, 2, 3, 3, generator=generator))[0][..., :2].mT.flatten(2)
    return Targets(
        0.2 + torch.rand(batch, 2, cells, cells, generator=generator),
        torch.randn(batch, 2, cells, cells, 3, generator=generator),
        torch.randint(0, 4, (batch, 2, cells, cells), generator=generator, dtype=torch.uint8),
        camera,
    )


def test_cells_of_a_patch_form_its_square() -> None:
    readout = Readout(channels=8, num_special=2, cells=3)
    tokens = torch.randn(1, 1, 2 + 4, 8)
    prediction = readout(tokens)
    assert prediction.depth_BVGG.shape == (1, 1, 6, 6)
    assert prediction.points_BVGG3.shape == (1, 1, 6, 6, 3)
    assert prediction.kinds_BVGGC.shape == (1, 1, 6, 6, 4)
    assert prediction.camera_BVK.shape == (1, 1, CAMERA_DIM)
    # Patch 2 of a 2 x 2 grid is the lower left one: changing it changes only that quarter.
    other = tokens.clone()
    other[:, :, 2 + 2] += torch.randn(8)
    changed = readout(other).depth_BVGG != prediction.depth_BVGG
    assert changed[0, 0, 3:, :3].all()
    assert changed.sum() == 9
    # Within a patch, cells are in row-major order.
    alone = readout.patch(readout.norm(tokens[0, 0, 2])).unflatten(0, (9, 8))[:, 0]
    torch.testing.assert_close(prediction.depth_BVGG[0, 0, :3, :3].flatten(), alone)


def test_scale_standardizes_and_restores() -> None:
    targets, scale = _targets(), Scale(views=2, grid=6)
    scale.fit(targets)
    standard = scale.standardize(targets)
    # Every cell has mean 0, every view has deviation 1.
    torch.testing.assert_close(standard.depth_BVGG.mean(dim=0), torch.zeros(2, 6, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.points_BVGG3.square().mean(dim=(0, 2, 3)), torch.ones(2, 3))
    restored = scale.restore(standard, targets.kinds_BVGG)
    torch.testing.assert_close(restored.depth_BVGG, targets.depth_BVGG)
    torch.testing.assert_close(restored.camera_BVK, targets.camera_BVK)


def test_loss_is_zero_only_for_the_right_answer() -> None:
    targets, scale = _targets(), Scale(views=2, grid=6)
    scale.fit(targets)
    wanted = scale.standardize(targets)
    assert float(readout_loss(wanted, wanted, targets.kinds_BVGG)) == 0
    shifted = Prediction(wanted.depth_BVGG + 0.5, wanted.points_BVGG3, wanted.camera_BVK)
    # A constant shift is an error of depth, not of its differences.
    torch.testing.assert_close(readout_loss(shifted, wanted, targets.kinds_BVGG), torch.tensor(0.125))
    # Equal logits for four kinds cost log 4.
    unsure = Prediction(wanted.depth_BVGG, wanted.points_BVGG3, wanted.camera_BVK, torch.zeros(4, 2, 6, 6, 4))
    loss = readout_loss(unsure, wanted, targets.kinds_BVGG)
    torch.testing.assert_close(loss, 0.3 * torch.tensor(4.0).log())


def test_scores_of_known_errors() -> None:
    target = _targets()
    camera = target.camera_BVK.clone()
    camera[:, 1, 0] += 0.03
    turn = torch.deg2rad(torch.tensor(10.0))
    x, y = camera[:, 1, 3:6].clone(), camera[:, 1, 6:9].clone()
    camera[:, 1, 3:6], camera[:, 1, 6:9] = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    points = target.points_BVGG3 + torch.tensor([0.0, 0.02, 0.0])
    depth = target.depth_BVGG.clone()
    depth[:, 1] *= 1.5
    predicted = Targets(depth, points, target.kinds_BVGG, camera)
    result = summarize([scores(predicted, target), scores(predicted, target)])
    expected = {"abs_rel": 0.25, "abs_rel_third_person": 0.0, "abs_rel_wrist": 0.5, "delta_1.25": 0.5}
    expected |= {"point_error_cm": 2.0, "camera_shift_cm": 3.0, "camera_turn_deg": 10.0}
    for name, value in expected.items():
        assert abs(result[name] - value) < 1e-2, name
    on_object = (target.kinds_BVGG == OBJECT).float()
    share = float(on_object[:, 1].sum() / on_object.sum())
    assert abs(result["abs_rel_objects"] - 0.5 * share) < 1e-4
