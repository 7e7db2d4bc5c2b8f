"""Streaming analyses against direct computations on all samples at once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rocket_align.alignment import MultiLayerAlignment
from rocket_align.analysis.cka import StreamingCKA, cka_map, linear_cka
from rocket_align.analysis.cosines import OutputSimilarity, TokenCone, parameter_similarity
from rocket_align.analysis.depth_probe import DepthErrors, RidgeProbe, depth_map, patch_depths
from rocket_align.analysis.gradients import GradientCosines, TheoremCheck
from rocket_align.analysis.matching import match_layers
from rocket_align.analysis.static import StaticTargets
from rocket_align.config import AlignConfig

SHARED = AlignConfig(student_layers=(1, 2, 3), teacher_layers=(0, 1, 2), projector="shared")
PROJECTORS = (SHARED, replace(SHARED, projector="matryoshka"), replace(SHARED, projector="independent"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alignment(config: AlignConfig) -> MultiLayerAlignment:
    torch.manual_seed(3)
    return MultiLayerAlignment(config, 12, 4)


@pytest.mark.parametrize("debiased", [False, True])
def test_streamed_cka_equals_the_direct_one(debiased: bool) -> None:
    students = [random(23, 5) + 4, random(23, 7, seed=1)]
    teachers = [students[0] @ random(5, 6, seed=2) - 9, random(23, 3, seed=3), students[1] + random(23, 7, seed=4)]
    cka = StreamingCKA(debiased=debiased)
    for part in (slice(0, 9), slice(9, 11), slice(11, 23)):
        cka.update([features[part] for features in students], [features[part] for features in teachers])
    torch.testing.assert_close(cka.result(), cka_map(students, teachers, debiased))


def test_minibatch_cka_of_one_batch_is_the_debiased_one_and_of_many_comes_close() -> None:
    x = random(400, 6)
    y = x @ random(6, 6, seed=1) + random(400, 6, seed=2)
    whole, parts = (StreamingCKA(debiased=True, estimator="minibatch") for _ in range(2))
    whole.update([x], [y])
    direct = linear_cka(x, y, debiased=True)
    torch.testing.assert_close(whole.result()[0, 0], direct)
    for first in range(0, 400, 20):
        parts.update([x[first : first + 20]], [y[first : first + 20]])
    assert parts.result()[0, 0].item() == pytest.approx(direct.item(), abs=0.03)


def test_cka_refusals() -> None:
    with pytest.raises(ValueError, match="estimator"):
        StreamingCKA(estimator="minibatch")
    with pytest.raises(ValueError, match="estimator"):
        StreamingCKA(estimator="exakt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples"):
        StreamingCKA().update([random(3, 2)], [random(4, 2)])
    with pytest.raises(ValueError, match="samples"):
        StreamingCKA().result()


def test_matching_of_a_given_size_is_the_best_of_all() -> None:
    for seed, (height, width, count) in enumerate([(4, 5, 2), (5, 4, 3), (4, 4, 4), (3, 5, 1)]):
        scores = random(height, width, seed=seed)
        pairs = match_layers(scores, count)
        best = max(
            sum(scores[row, column].item() for row, column in zip(rows, columns))
            for rows in itertools.combinations(range(height), count)
            for columns in itertools.permutations(range(width), count)
        )
        assert len(pairs) == count
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == count
        assert sum(scores[pair].item() for pair in pairs) == pytest.approx(best)
    with pytest.raises(ValueError, match="count"):
        match_layers(random(2, 3), 3)
    with pytest.raises(ValueError, match="finite"):
        match_layers([[float("nan"), 1.0]])


def test_token_cone_equals_the_mean_over_all_pairs() -> None:
    tokens = random(6, 5, 4) + 1
    cone = TokenCone()
    cone.update(tokens[:4])
    cone.update(tokens[4:])
    unit = F.normalize(tokens, dim=-1)

    def mean_of_pairs(rows: Tensor) -> float:
        return (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)].mean().item()

    assert cone.overall() == pytest.approx(mean_of_pairs(unit.flatten(0, 1)), abs=1e-6)
    assert cone.within_samples() == pytest.approx(sum(map(mean_of_pairs, unit)) / 6, abs=1e-6)
    with pytest.raises(ValueError, match="tokens"):
        TokenCone().overall()
    with pytest.raises(ValueError, match="tokens"):
        cone.update(tokens[:, :1])


def test_gradient_cosines_of_the_mean_gradient_and_of_the_batches() -> None:
    first, second, third = (random(4, 3, seed=seed).requires_grad_() for seed in range(3))
    cosines = GradientCosines({"0": [first], "1": [second, third]})
    batches = [random(4, seed=seed) for seed in (7, 8, 9)]

    def losses(x: Tensor) -> list[Tensor]:
        hidden = torch.tanh(x @ first)
        return [(hidden @ second.T).square().sum(), hidden.sum() + (hidden @ third.T).cos().sum(), hidden.exp().sum()]

    gradients: list[list[Tensor]] = []
    for batch in batches:
        cosines.update(losses(batch))
        gradients.append([_gradient(loss, [first, second, third]) for loss in losses(batch)])
    report = cosines.result()
    mean = [torch.stack(of_loss).mean(dim=0) for of_loss in zip(*gradients)]
    expected = _cosine(mean[0], mean[1])
    assert report["all"].cosine_KK[0, 1].item() == pytest.approx(expected, abs=1e-5)
    assert report["0"].cosine_KK[0, 1].item() == pytest.approx(_cosine(mean[0][:12], mean[1][:12]), abs=1e-5)
    assert report["0"].norm_K[2].item() == pytest.approx(mean[2][:12].norm().item(), rel=1e-5)
    of_batches = torch.tensor([_cosine(rows[0], rows[1]) for rows in gradients])
    assert report["all"].batch_cosine_KK[0, 1].item() == pytest.approx(of_batches.mean().item(), abs=1e-5)
    spread = of_batches.std(unbiased=False).item()
    assert report["all"].batch_cosine_std_KK[0, 1].item() == pytest.approx(spread, abs=1e-4)
    assert report["1"].cosine_KK[2].isnan().all(), "the third loss does not reach the second group"
    with pytest.raises(ValueError, match="groups"):
        GradientCosines({"all": [first]})


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros(12) if g is None else g.flatten() for g in found])


def _cosine(x: Tensor, y: Tensor) -> float:
    return F.cosine_similarity(x, y, dim=0).item()


@pytest.mark.parametrize("config", PROJECTORS, ids=lambda config: config.projector)
def test_projector_similarity(config: AlignConfig) -> None:
    module = alignment(config)
    weights = parameter_similarity(module)
    outputs = OutputSimilarity(module)
    tokens = random(3, 4, 5, 12)
    outputs.update(tokens[:, :1])
    outputs.update(tokens[:, 1:])
    similarity = outputs.result()
    projected = [[module.project_pair(tokens[source], pair) for pair in range(3)] for source in range(3)]
    same = sum(F.cosine_similarity(row[0], row[2], dim=-1).mean() for row in projected) / 3
    own = F.cosine_similarity(projected[0][0], projected[2][2], dim=-1).mean()
    torch.testing.assert_close(similarity["same_input"][0, 2].float(), same)
    torch.testing.assert_close(similarity["own_input"][0, 2].float(), own)
    for values in (*weights.values(), *similarity.values()):
        torch.testing.assert_close(values.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    if config.projector == "shared":
        torch.testing.assert_close(weights["fc1"], torch.ones(3, 3, dtype=torch.float64))
        torch.testing.assert_close(similarity["same_input"], torch.ones(3, 3, dtype=torch.float64), atol=1e-5, rtol=0)
    if config.projector == "matryoshka":
        narrow, wide = (module.projector_of(pair)[0].fc1.weight[: module.projector_of(pair)[1]] for pair in (0, 2))
        expected = narrow.square().sum().sqrt() / wide.square().sum().sqrt()
        assert weights["fc1"][0, 2].item() == pytest.approx(expected.item(), abs=1e-6)
    if config.projector == "independent":
        assert abs(weights["fc1"][0, 1]) < 0.3


@pytest.mark.parametrize("reference", ["first", "mean"])
@pytest.mark.parametrize("config", PROJECTORS, ids=lambda config: config.projector)
def test_theorem_terms_equal_those_of_explicit_jacobians(config: AlignConfig, reference: str) -> None:
    module = alignment(config).double()
    tokens, targets = random(3, 2, 2, 12).double(), random(3, 2, 2, 8, seed=1).double()
    check = TheoremCheck(module, reference=reference)  # type: ignore[arg-type]
    check.update(tokens[:, :1], targets[:, :1])
    check.update(tokens[:, 1:], targets[:, 1:])
    report = check.result()
    inner, features, common, cs, etas = [], [], [], [], []
    for token_KD, target_KC in zip(tokens.flatten(1, 2).unbind(1), targets.flatten(1, 2).unbind(1)):
        jacobians = [_jacobian(module, token_KD[pair], pair) for pair in range(3)]
        base = token_KD[0] if reference == "first" else token_KD.mean(dim=0)
        at_reference = _jacobian(module, base, 1)
        g = torch.stack([_loss_gradient(module, token_KD[pair], target_KC[pair], pair) for pair in range(3)])
        v = torch.stack([jacobians[pair].T @ g[pair] for pair in range(3)])
        inner.append(v @ v.T)
        features.append(g @ g.T)
        common.append(g @ at_reference @ at_reference.T @ g.T)
        basis = torch.linalg.qr(g.T)[0]
        values = torch.linalg.eigvalsh(basis.T @ at_reference @ at_reference.T @ basis)
        cs.append((values[0] + values[-1]) / 2)
        etas.append((values[-1] - values[0]) / (values[-1] + values[0]))
    torch.testing.assert_close(report.inner_KK, torch.stack(inner).mean(dim=0))
    torch.testing.assert_close(report.features_KK, torch.stack(features).mean(dim=0))
    torch.testing.assert_close(report.delta_KK, (torch.stack(inner) - torch.stack(common)).mean(dim=0))
    assert report.token_c == pytest.approx(torch.stack(cs).mean().item(), rel=1e-6)
    assert report.token_eta == pytest.approx(torch.stack(etas).mean().item(), rel=1e-6)
    assert bool(report.holds_KK.all())
    torch.testing.assert_close(report.token_holds_KK, torch.ones(3, 3, dtype=torch.float64))
    assert report.tokens == 4
    sizes = report.features_KK.diagonal()
    bound = report.c * (report.features_KK - report.eta * (sizes[:, None] + sizes) / 2) - report.delta_KK.abs()
    torch.testing.assert_close(report.bound_KK, bound)


def _jacobian(module: MultiLayerAlignment, token_D: Tensor, pair: int) -> Tensor:
    return torch.autograd.functional.jacobian(lambda x: module.project_pair(x[None, None], pair)[0, 0], token_D)


def _loss_gradient(module: MultiLayerAlignment, token_D: Tensor, target_C: Tensor, pair: int) -> Tensor:
    projected = module.project_pair(token_D[None, None], pair)[0, 0].detach().requires_grad_()
    loss = 1 - F.cosine_similarity(projected.float(), target_C.float(), dim=0)
    return torch.autograd.grad(loss, projected)[0]


def test_theorem_is_tight_when_all_pairs_have_the_same_state_and_target() -> None:
    """Then Delta is zero and the gradients span one direction, so that eta is zero too."""
    module = MultiLayerAlignment(replace(SHARED, student_norm=False), 8, 4)
    tokens = random(1, 1, 3, 8).expand(3, 1, 3, 8)
    check = TheoremCheck(module)
    check.update(tokens, random(1, 1, 3, 8, seed=1).expand(3, 1, 3, 8))
    report = check.result()
    assert report.eta == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(report.bound_KK, report.inner_KK, rtol=1e-4, atol=1e-8)
    assert report.increment_K.abs().max() < 1e-6


def test_theorem_refusals() -> None:
    with pytest.raises(ValueError, match="reference"):
        TheoremCheck(alignment(SHARED), reference="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair"):
        TheoremCheck(MultiLayerAlignment(AlignConfig(coeff=0, student_layers=(), teacher_layers=()), 4, 4))
    with pytest.raises(ValueError, match="tokens"):
        TheoremCheck(alignment(SHARED)).result()


def test_ridge_probe_equals_the_closed_form_and_finds_a_linear_law() -> None:
    x = random(200, 6) * torch.tensor([1.0, 5, 0.1, 1, 1, 0]) + 30
    y = x @ random(6, 2, seed=1) + 3
    probe = RidgeProbe(ridge=0.1)
    for part in (slice(0, 70), slice(70, 75), slice(75, 200)):
        probe.update(x[part], y[part])
    scale = x.double().std(dim=0, unbiased=False)
    scale[5] = 1
    z, centered = (x.double() - x.double().mean(dim=0)) / scale, y.double() - y.double().mean(dim=0)
    weights = torch.linalg.solve(z.T @ z / 200 + 0.1 * torch.eye(6), z.T @ centered / 200)
    torch.testing.assert_close(probe.solve()(x), z @ weights + y.double().mean(dim=0), rtol=1e-5, atol=1e-5)
    exact = RidgeProbe(ridge=1e-9)
    exact.update(x, y)
    torch.testing.assert_close(exact.solve()(x), y.double(), rtol=1e-4, atol=1e-4)
    for call in (lambda: RidgeProbe(0.0), lambda: RidgeProbe().solve(), lambda: probe.update(x, y[:3])):
        with pytest.raises(ValueError, match=r"ridge|probe"):
            call()


def test_depth_errors() -> None:
    errors = DepthErrors()
    errors.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    errors.update(torch.tensor([0.5, 1.2]), torch.tensor([1.0, 1.0]))
    assert errors.result() == pytest.approx({"abs_rel": (0 + 1 + 0.5 + 0.2) / 4, "delta1": 0.5})
    with pytest.raises(ValueError, match="depth"):
        DepthErrors().result()


def test_depth_cells_of_patches_and_back() -> None:
    depth = torch.rand(2, 2, 12, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    cells = patch_depths(depth, (3, 6), 2)
    assert cells.shape == (2, 2, 18, 4)
    # Second patch of the first row, its lower left cell: rows 2 and 3, columns 4 and 5.
    assert cells[1, 0, 1, 2].item() == pytest.approx(depth[1, 0, 2:4, 4:6].log().mean().item(), abs=1e-6)
    blocks = depth.log().unflatten(3, (12, 2)).unflatten(2, (6, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(depth_map(cells, (3, 6), 2), blocks)
    with pytest.raises(ValueError, match="depth"):
        patch_depths(torch.zeros(1, 1, 4, 4), (2, 2), 1)


PAIRS, SAMPLES, VIEWS, PLACES, CHANNELS = 2, 12, 2, 5, 6


def noisy_targets(noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(PAIRS, 1, VIEWS * PLACES, CHANNELS, generator=generator)
    return places + noise * torch.randn(PAIRS, SAMPLES, VIEWS * PLACES, CHANNELS, generator=generator)


def test_streamed_shares_of_place_are_those_of_all_samples() -> None:
    values = noisy_targets(noise=0.7)
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
        static.update(noisy_targets(noise))
        assert bool((static.result().explained_KV >= low).all() and (static.result().explained_KV <= high).all())


def test_static_refusals() -> None:
    with pytest.raises(ValueError, match="found none"):
        StaticTargets(1).result()
    with pytest.raises(ValueError, match="a multiple of the 3 views"):
        StaticTargets(3).update(noisy_targets(0.0))
    with pytest.raises(ValueError, match="num_views: found 0"):
        StaticTargets(0)
