"""How much of the targets a token's place explains, streamed, against the numbers of all samples at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rocket_align.analysis.static import StaticTargets

PAIRS, SAMPLES, VIEWS, PLACES, CHANNELS = 2, 12, 2, 5, 6


def targets(noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(PAIRS, 1, VIEWS * PLACES, CHANNELS, generator=generator)
    return places + noise * torch.randn(PAIRS, SAMPLES, VIEWS * PLACES, CHANNELS, generator=generator)


def test_streamed_numbers_are_those_of_all_samples() -> None:
    values = targets(noise=0.7)
    static = StaticTargets(VIEWS)
    for batch in values.split((5, 4, 3), dim=1):
        static.update(batch)
    share = static.result()
    for pair in range(PAIRS):
        for view in range(VIEWS):
            units = F.normalize(values[pair].double(), dim=-1).unflatten(1, (VIEWS, PLACES))[:, view]
            places = units.mean(dim=0)
            within = (units - places).square().sum(dim=-1).mean()
            total = (units - units.mean(dim=(0, 1))).square().sum(dim=-1).mean()
            constant = 1 - F.cosine_similarity(units, places.expand_as(units), dim=-1).mean()
            assert share.explained_KV[pair, view].item() == pytest.approx(float(1 - within / total))
            assert share.remaining_KV[pair, view].item() == pytest.approx(float(within))
            assert share.constant_loss_KV[pair, view].item() == pytest.approx(float(constant))


def test_targets_of_place_alone_are_explained_wholly_and_noise_hardly() -> None:
    for noise, low, high in ((0.0, 1.0 - 1e-12, 1.0 + 1e-12), (1e6, 0.0, 0.2)):
        static = StaticTargets(VIEWS)
        static.update(targets(noise))
        assert bool((static.result().explained_KV >= low).all() and (static.result().explained_KV <= high).all())


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        StaticTargets(1).result()
    with pytest.raises(ValueError, match="a multiple of the 3 views"):
        StaticTargets(3).update(targets(0.0))
    with pytest.raises(ValueError, match="num_views: found 0"):
        StaticTargets(0)
