"""Pooling where the reference has no answer, and its refusals."""

from __future__ import annotations

import pytest
import torch

from rocket_align.pooling import pool_teacher, sine_position_embedding, student_grid


def test_pools_to_the_student_s_real_grid_where_the_release_truncates() -> None:
    assert student_grid(144, 1, (37, 37)) == (12, 12)
    features = torch.randn(2, 3, 37 * 37, 8)
    pooled = pool_teacher(features, (37, 37), (518, 518), 3 * 144, mode="bilinear", position_embedding=True)
    assert pooled.shape == (2, 3 * 144, 8)


def test_grid_keeps_the_orientation_of_the_teacher() -> None:
    assert student_grid(2 * 24, 2, (8, 12)) == (4, 6)
    assert student_grid(2 * 24, 2, (12, 8)) == (6, 4)


@pytest.mark.parametrize(("tokens", "views"), [(257, 1), (33, 2), (0, 1)])
def test_tokens_that_form_no_grid_are_refused(tokens: int, views: int) -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        student_grid(tokens, views, (37, 37))


def test_corners_stay_and_views_do_not_mix() -> None:
    features = torch.arange(2 * 9, dtype=torch.float32).reshape(1, 2, 9, 1)
    pooled = pool_teacher(features, (3, 3), (42, 42), 8, mode="bilinear", position_embedding=False)
    assert pooled.flatten().tolist() == [0, 2, 6, 8, 9, 11, 15, 17]


def test_random_pooling_repeats_patches_only_when_it_must() -> None:
    features = torch.arange(12, dtype=torch.float32).reshape(1, 1, 12, 1)
    few = pool_teacher(features, (3, 4), (3, 4), 12, mode="random", position_embedding=False)
    assert few.flatten().tolist() == list(range(12))
    many = pool_teacher(features, (3, 4), (3, 4), 40, mode="random", position_embedding=False).flatten()
    assert many.shape == (40,)
    assert torch.equal(many, many.sort().values)


def test_result_is_float32_for_half_precision_features() -> None:
    features = torch.randn(1, 1, 9, 8, dtype=torch.bfloat16)
    pooled = pool_teacher(features, (3, 3), (42, 42), 4, mode="bilinear", position_embedding=True)
    assert pooled.dtype == torch.float32


def test_position_embedding_is_antisymmetric_in_its_sines() -> None:
    grid = sine_position_embedding((3, 5), (42, 70), 8, torch.device("cpu")).unflatten(0, (3, 5))
    sines = [0, 1, 4, 5]
    torch.testing.assert_close(grid.flip(0, 1)[..., sines], -grid[..., sines])


@pytest.mark.parametrize(("change", "said"), [({"mode": "max"}, "bilinear, random"), ({"grid_hw": (3, 4)}, "3 x 4")])
def test_refusals(change: dict[str, object], said: str) -> None:
    arguments = {"grid_hw": (3, 3), "mode": "bilinear", **change}
    with pytest.raises(ValueError, match=said):
        pool_teacher(torch.zeros(1, 1, 9, 8), image_hw=(42, 42), num_tokens=9, position_embedding=False, **arguments)  # type: ignore[arg-type]
