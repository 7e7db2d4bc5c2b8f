"""Analyses: statistics that parity cannot show, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.analysis.gradients import describe_group
from experiments.analysis.report import heatmap, new_figure
from rocket_align.analysis.cka import cka_map, linear_cka
from rocket_align.analysis.gradients import GradientReport
from rocket_align.analysis.importance import layer_importance, residual_stream
from rocket_align.analysis.selection import STRATEGIES, select_layers


def test_debiased_cka_of_independent_features_is_about_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(12, 64, generator=generator) for _ in range(2)] for _ in range(200)]
    debiased = torch.stack([linear_cka(x, y, debiased=True) for x, y in pairs]).mean()
    biased = torch.stack([linear_cka(x, y) for x, y in pairs]).mean()
    assert abs(debiased) < 0.02
    assert biased > 0.5


def test_debiased_cka_equals_the_hsic_formula() -> None:
    """Song et al. 2012, equation 5, written out."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 5, generator=generator).double(), torch.randn(9, 7, generator=generator).double()
    n = len(x)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        k, l = ((z @ z.T) * (1 - torch.eye(n)) for z in (a, b))  # noqa: E741
        cross = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()
        return ((k * l.T).sum() + cross) / (n * (n - 3))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x, y, debiased=True), expected)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_offset(debiased: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation + 5, debiased).item() == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, torch.ones(20, 3), debiased).item() == 0
    torch.testing.assert_close(cka_map([x, x + 1], [x[:, :2]], debiased)[1, 0], linear_cka(x, x[:, :2], debiased))


@pytest.mark.parametrize(("rows", "other", "debiased"), [(5, 6, False), (3, 3, True), (1, 1, False)])
def test_cka_refusals(rows: int, other: int, debiased: bool) -> None:
    with pytest.raises(ValueError, match="samples"):
        linear_cka(torch.zeros(rows, 2), torch.zeros(other, 2), debiased)


def test_selection_by_position() -> None:
    assert select_layers("e2m_last1", num_layers=24, count=10) == (2, 4, 6, 8, 10, 12, 14, 16, 18, 23)
    assert select_layers("shallow", num_layers=10, count=3) == (0, 1, 2)
    assert select_layers("middle", num_layers=10, count=4) == (3, 4, 5, 6)
    assert select_layers("deep", num_layers=10, count=3) == (7, 8, 9)


def test_windows_are_taken_whole_in_the_order_of_their_scores() -> None:
    scores = [0.9, 0.1, 0.2, 0.8, 0.3]  # of blocks 0-1, 1-2, ..., 4-5
    assert select_layers("bottom", num_layers=6, count=2, scores=scores, window=2) == (1, 2)
    assert select_layers("bottom", num_layers=6, count=3, scores=scores, window=2) == (1, 2, 3)
    assert select_layers("top", num_layers=6, count=4, scores=scores, window=2) == (0, 1, 3, 4)
    assert select_layers("top", num_layers=6, count=3, scores=scores, window=2) == (0, 1, 3)
    with pytest.raises(ValueError, match="5 numbers"):
        select_layers("top", num_layers=6, count=2, scores=[*scores, 0.0], window=2)
    with pytest.raises(ValueError, match="window"):
        select_layers("top", num_layers=6, count=2, scores=scores, window=7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_selects_as_many_layers_as_asked(strategy: str) -> None:
    for num_layers in range(1, 34):
        scores = [float(layer % 5) for layer in range(num_layers)]
        for count in range(1, num_layers + 2):
            chosen = select_layers(strategy, num_layers=num_layers, count=count, scores=scores)
            assert list(chosen) == sorted(set(chosen))
            assert len(chosen) == min(count, num_layers)
            assert set(chosen) <= set(range(num_layers))


@pytest.mark.parametrize(
    ("strategy", "count", "scores", "said"),
    [
        ("unifrom", 2, None, "did you mean 'uniform'"),
        ("uniform", 0, None, "count"),
        ("top", 2, None, "scores"),
        ("top", 2, [1.0, 2.0], "scores"),
        ("bottom", 2, [1.0, 2.0, float("nan")], "NaN"),
    ],
)
def test_selection_refusals(strategy: str, count: int, scores: list[float] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select_layers(strategy, num_layers=3, count=count, scores=scores)


def test_residual_stream_holds_only_the_latest_pass() -> None:
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = nn.Sequential(*blocks)
    with residual_stream(blocks) as states:
        model(torch.rand(1, 2, 4))
        x = torch.rand(1, 5, 4)
        result = model(x)
        assert len(states) == 4
        assert torch.equal(states[0], x)
        assert torch.equal(states[-1], result)
    model(torch.rand(1, 7, 4))
    assert states[0].shape[1] == 5


def test_residual_stream_may_end_at_another_module() -> None:
    """As in VGGT, whose layers begin with a block per view and end with one over all views."""
    frame, across = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.rand(6, 2, 4)
    with residual_stream([frame], across) as states:
        result = across(frame(x).unflatten(0, (3, 2)).flatten(1, 2))
    assert torch.equal(states[0], x)
    assert torch.equal(states[1], result.unflatten(1, (2, 2)).flatten(0, 1))


def test_importance_counts_only_masked_positions() -> None:
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert layer_importance([[first, second]])[1].item() == pytest.approx(0.5)
    mask = [torch.tensor([[True, False]])]
    assert layer_importance([[first, second]], mask=mask)[1].item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="windows"):
        layer_importance([[first, second]], windows=(2,))
    with pytest.raises(ValueError, match="batches"):
        layer_importance([])


class _OnGPU(torch.Tensor):
    """Like a GPU's tensor, it has to be brought to the CPU before NumPy or matplotlib can read it."""

    def __array__(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_gradient_cosines_of_a_gpu_can_be_drawn() -> None:
    cosine, norm = torch.eye(3).as_subclass(_OnGPU), torch.ones(3).as_subclass(_OnGPU)
    described = describe_group(GradientReport(cosine, cosine, cosine, norm))
    labels = ["1-1", "2-2", "action"]
    axes = new_figure(2, 2).subplots()
    heatmap(axes, described["cosine"], limits=(-1, 1), rows=labels, columns=labels, diverging=True)
    assert described["mean_between_pairs"] == 0
