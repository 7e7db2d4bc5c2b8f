"""The recipe files of pi0 and pi0.5: they parse, say the release's numbers, and differ where they say so."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments.join import FinetuneConfig
from prismatic.policies.pi_data import PI_RANGES, LetterboxTransform
from prismatic.training.schedule import learning_rate_factor
from prismatic.util.cli import parse
from rocket_align.config import RECIPES, for_openpi

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "recipes"


def read(name: str) -> FinetuneConfig:
    return parse(FinetuneConfig, ["--config_path", str(FOLDER / name)])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_parses_and_ends_at_its_final_rate(file: Path) -> None:
    config = read(file.name)
    assert config.policy == file.name.split("_")[0] and config.adam_beta2 == 0.95 and config.weight_decay == 1e-10
    rates = [config.learning_rate * learning_rate_factor(step, config) for step in (999, config.max_steps)]
    assert rates == pytest.approx([2.5e-5, 2.5e-6], rel=0.01)


def test_fair_and_released_recipe_differ_in_the_crop_alone() -> None:
    fair, released = (asdict(read(name)) for name in ("pi05_libero.yaml", "pi05_libero_release.yaml"))
    assert {name for name in fair if fair[name] != released[name]} == {"image_crop"} and fair["image_crop"]


def test_the_releases_pairs() -> None:
    rocket = for_openpi(RECIPES["rocket"](18, 24), 18, 24)
    assert rocket.student_layers == (*range(2, 11), 18) and rocket.teacher_layers == (*range(2, 19, 2), 23)
    forcing = for_openpi(RECIPES["spatial_forcing"](18, 24), 18, 24)
    assert (forcing.student_layers, forcing.teacher_layers, forcing.shift) == ((12,), (23,), False)
    assert for_openpi(RECIPES["naive"](4, 6), 4, 6).student_layers == (1, 2, 3, 4)


def test_augmentation_keeps_bars_black_and_wrists_whole() -> None:
    image = np.random.default_rng(0).integers(1, 256, (60, 80, 3), dtype=np.uint8)
    transform = LetterboxTransform((56, 56), PI_RANGES)
    draws = {view: transform.draw(np.random.default_rng(1), view) for view in ("primary", "wrist")}
    top, left, bottom, right = transform.content(image.shape)
    assert (top, left, bottom, right) == (7, 0, 49, 56)
    for draw in draws.values():
        boxed = transform.train(image, draw)
        assert boxed[top:bottom].any() and not boxed[:top].any() and not boxed[bottom:].any()
    assert draws["wrist"].crop == (0, 0, 1, 1) and draws["primary"].crop.height == pytest.approx(0.95)
