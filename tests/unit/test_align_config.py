"""AlignConfig refuses what cannot work; the recipes differ only where the methods differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rocket_align import recipes
from rocket_align.config import AlignConfig

PAIRS: dict[str, Any] = {"student_layers": (1, 2), "teacher_layers": (1, 2)}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher_layers": (1,)}, "teacher_layers"),
        ({"student_layers": (1, 1)}, "student_layers"),
        ({"projector": "matroshka"}, "projector"),
        ({"pooling": "max"}, "pooling"),
        ({"coeff": -0.1}, "coeff"),
        ({"coeff": float("nan")}, "coeff"),
        ({"ensemble_size": 0}, "ensemble_size"),
        ({"width_ratios": (0.5,)}, "width_ratios"),
        ({"width_ratios": (0.0, 1.0)}, "width_ratios"),
        ({"width_ratios": (0.5, 1.0), "projector": "shared"}, "width_ratios"),
        ({"released_independent_width": True}, "released_independent_width"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}") as refused:
        AlignConfig(**{**PAIRS, **change})
    assert "\n" not in str(refused.value)


def test_is_frozen_and_takes_comma_strings() -> None:
    config = AlignConfig(student_layers="2,4,-1", teacher_layers="1,2,-1")  # type: ignore[arg-type]
    assert config.student_layers == (2, 4, -1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.coeff = 1.0  # type: ignore[misc]


def differing(name: str) -> set[str]:
    first, second = dataclasses.asdict(recipes.rocket()), dataclasses.asdict(recipes.RECIPES[name]())
    return {field for field in first if first[field] != second[field]}


def test_recipes_differ_only_where_the_methods_do() -> None:
    assert differing("shared") == {"projector"}
    assert differing("naive") == {"projector"}
    assert differing("spatial_forcing") == {"projector", "student_layers", "teacher_layers"}
    assert differing("baseline") == {"coeff", "student_layers", "teacher_layers"}


def test_recipes_at_the_paper_s_size() -> None:
    early = (2, 4, 6, 8, 10, 12, 14, 16, 18)
    assert recipes.rocket().student_layers == (*early, 31)
    assert recipes.rocket().teacher_layers == (*early, 23)
    single = recipes.spatial_forcing()
    assert (single.student_layers, single.teacher_layers) == ((24,), (23,))
    assert recipes.baseline().num_pairs == 0


@pytest.mark.parametrize("student", [2, 3, 4, 6, 18, 19, 20, 32])
@pytest.mark.parametrize("teacher", [2, 3, 4, 12, 19, 20, 24])
def test_recipes_fit_models_of_any_depth(student: int, teacher: int) -> None:
    config = recipes.rocket(student, teacher)
    for layers, depth in ((config.student_layers, student), (config.teacher_layers, teacher)):
        assert list(layers) == sorted(set(layers))
        assert layers[0] >= 1
        assert layers[-1] == depth - 1
    assert config.num_pairs == min(10, student - 1, teacher - 1)
