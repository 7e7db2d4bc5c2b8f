"""A readout that knows the place: equal to a regression beside one-hot places, and nothing for what place explains."""

from __future__ import annotations

import pytest
import torch

from rocket_align.analysis.place_probe import ExplainedBeyondPlace, PlaceProbe


def data(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (samples, 4 places, 3) that differ much by place, what changes in them, and a place's own number."""
    changing = torch.randn(samples, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = torch.tensor([10.0, -20.0, 30.0, 40.0], dtype=torch.float64)
    return changing + place[:, None], changing, place


def test_equals_least_squares_beside_a_constant_per_place() -> None:
    tokens, changing, place = data(50, seed=0)
    outputs = changing[..., :1] * 2 + place[:, None] + torch.sin(5 * changing[..., 1:2])
    probe = PlaceProbe(ridge=1e-12)
    for part in torch.arange(50).split(7):
        probe.update(tokens[part], outputs[part])
    readout = probe.solve()
    design = torch.cat((tokens, torch.eye(4).double().expand(50, 4, 4)), dim=-1).flatten(0, 1)
    solution = torch.linalg.lstsq(design, outputs.flatten(0, 1)).solution
    assert torch.allclose(readout.weights_CK, solution[:3], atol=1e-8)
    assert torch.allclose(readout(tokens).flatten(0, 1), design @ solution, atol=1e-8)


def test_place_alone_earns_nothing_and_what_the_token_tells_does() -> None:
    tokens, changing, place = data(400, seed=0)
    tested, new, _ = data(400, seed=1)
    for outputs, answers, expected in (
        (place[:, None] + 0.1 * torch.randn(400, 4, 1), place[:, None] + 0.1 * torch.randn(400, 4, 1), 0.0),
        (changing[..., :1] + place[:, None], new[..., :1] + place[:, None], 1.0),
    ):
        probe = PlaceProbe(1e-6)
        probe.update(tokens, outputs)
        score = ExplainedBeyondPlace(probe.solve())
        score.update(tested[:150], answers[:150])
        score.update(tested[150:], answers[150:])
        assert score.result() == pytest.approx(expected, abs=0.02)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="ridge: found 0"):
        PlaceProbe(0)
    with pytest.raises(ValueError, match="found no data"):
        PlaceProbe().solve()
    with pytest.raises(ValueError, match="one output for each sample and place"):
        PlaceProbe().update(torch.zeros(2, 3, 4), torch.zeros(2, 2, 1))
