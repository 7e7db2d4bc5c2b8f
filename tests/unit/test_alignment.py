"""The alignment as a module, and pooling where the reference has no answer: batching, loading, refusals, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rocket_align.alignment import MultiLayerAlignment, cosine_loss
from rocket_align.config import AlignConfig
from rocket_align.pooling import pool_teacher, sine_position_embedding, student_grid
from rocket_align.teacher.base import TeacherFeatures

STUDENT, TEACHER, TOKENS = 12, 8, 8
CONFIG = AlignConfig(student_layers=(1, 2, -1), teacher_layers=(0, 1, -1))
KINDS = ("matryoshka", "shared", "independent")


def inputs(dtype: torch.dtype = torch.float32, pairs: int = 3) -> tuple[list[Tensor], TeacherFeatures]:
    torch.manual_seed(3)
    states = [torch.randn(2, 20, STUDENT, dtype=dtype, requires_grad=True) for _ in range(6)]
    layers = tuple(torch.randn(2, 2, 9, 2 * TEACHER, dtype=dtype) for _ in range(pairs))
    return states, TeacherFeatures(layers, (3, 3), (42, 42))


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_together_equal_one_pair_at_a_time(kind: str) -> None:
    alignment = MultiLayerAlignment(replace(CONFIG, projector=kind, ensemble_size=2), STUDENT, TEACHER)
    states, teacher = inputs()
    output = alignment(states, 1, TOKENS, teacher)
    expected = []
    # -1 is the number of blocks less one: 4 of the states 0 to 5.
    for pair, layer in enumerate((1, 2, 4)):
        tokens = states[layer][:, 2 : 2 + TOKENS]
        target = pool_teacher(teacher.layers[pair], (3, 3), (42, 42), TOKENS, mode="bilinear", position_embedding=True)
        index = 0 if kind == "independent" else pair
        expected.append(torch.stack([cosine_loss(member(tokens, index), target) for member in alignment[pair]]).mean())
    torch.testing.assert_close(output.per_pair, torch.stack(expected).detach())
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_every_aligned_state_gets_a_gradient(kind: str) -> None:
    alignment = MultiLayerAlignment(replace(CONFIG, projector=kind), STUDENT, TEACHER)
    states, teacher = inputs()
    output = alignment(states, 1, TOKENS, teacher)
    assert not output.per_pair.requires_grad
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in alignment.parameters())
    assert [state.grad is not None for state in states] == [False, True, True, False, True, False]


def test_widths_follow_the_kind_of_projector() -> None:
    def widths(**change: object) -> list[tuple[int, ...]]:
        alignment = MultiLayerAlignment(replace(CONFIG, **change), STUDENT, 50)  # type: ignore[arg-type]
        return [members[0].widths for members in alignment]

    assert widths() == [(20, 60, 100)] * 3
    assert widths(widths_increase_with_depth=False) == [(100, 60, 20)] * 3
    assert widths(width_ratios=(0.1, 0.2, 0.3)) == [(10, 20, 30)] * 3
    assert widths(projector="shared") == [(100, 100, 100)] * 3
    assert widths(projector="independent") == [(100,)] * 3
    assert widths(projector="independent", released_independent_width=True) == [(20,)] * 3


def test_baseline_costs_nothing_and_needs_no_teacher() -> None:
    alignment = MultiLayerAlignment(AlignConfig(coeff=0.0, student_layers=(), teacher_layers=()), STUDENT, TEACHER)
    states, _ = inputs(torch.bfloat16)
    output = alignment(states, 1, TOKENS, None)
    assert output.loss.item() == 0
    assert output.loss.dtype == torch.float32
    assert output.per_pair.shape == (0,)
    assert not list(alignment.parameters())
    assert not alignment.state_dict()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_student(autocast: bool) -> None:
    alignment = MultiLayerAlignment(CONFIG, STUDENT, TEACHER)
    states, teacher = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = alignment(states, 1, TOKENS, teacher)
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()


class _NoReadBack(TorchDispatchMode):
    """Fails on the operation with which a tensor's value reaches Python, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a value back from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["bilinear", "random"])
def test_forward_never_waits_for_the_device(kind: str, pooling: str) -> None:
    alignment = MultiLayerAlignment(replace(CONFIG, projector=kind, pooling=pooling), STUDENT, TEACHER)
    states, teacher = inputs()
    with _NoReadBack():
        output = alignment(states, 1, TOKENS, teacher)
        with pytest.raises(AssertionError, match="reads a value back"):
            output.loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_round_trip(kind: str, prefix: str) -> None:
    config = replace(CONFIG, projector=kind, ensemble_size=2)
    first, second = (MultiLayerAlignment(config, STUDENT, TEACHER) for _ in range(2))
    second.load_state_dict({prefix + key: value for key, value in first.state_dict().items()})
    states, teacher = inputs()
    assert torch.equal(first(states, 1, TOKENS, teacher).loss, second(states, 1, TOKENS, teacher).loss)


def test_loads_inside_another_module() -> None:
    saved, outer = (torch.nn.ModuleDict({"alignment": MultiLayerAlignment(CONFIG, STUDENT, TEACHER)}) for _ in range(2))
    weights = saved["alignment"].state_dict()
    outer.load_state_dict({f"alignment.module.{key}": value for key, value in weights.items()})
    torch.testing.assert_close(dict(outer["alignment"].state_dict()), dict(weights), rtol=0, atol=0)


def test_independent_weights_do_not_load_into_a_shared_projector() -> None:
    independent = MultiLayerAlignment(replace(CONFIG, projector="independent"), STUDENT, TEACHER)
    shared = MultiLayerAlignment(CONFIG, STUDENT, TEACHER)
    with pytest.raises(RuntimeError, match="shares one projector"):
        shared.load_state_dict(independent.state_dict())


def _wrong_calls() -> Iterator[tuple[str, dict[str, object]]]:
    _, teacher = inputs()
    yield "teacher: found None", {"teacher": None}
    yield "found 2 layers", {"teacher": teacher._replace(layers=teacher.layers[:2])}
    yield "vision tokens", {"vision_start": 12}
    yield "layers", {"hidden_states": inputs()[0][:2]}


@pytest.mark.parametrize(("said", "change"), list(_wrong_calls()))
def test_refusals(said: str, change: dict[str, object]) -> None:
    states, teacher = inputs()
    arguments = {"hidden_states": states, "vision_start": 1, "num_vision_tokens": TOKENS, "teacher": teacher, **change}
    with pytest.raises(ValueError, match=said):
        MultiLayerAlignment(CONFIG, STUDENT, TEACHER)(**arguments)


def test_the_cosine_has_torchs_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for function in (cosine_loss, lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1).mean(dim=(-2, -1))):
        x, y = (torch.randn(3, 2, 5, 8, generator=generator.manual_seed(seed)).requires_grad_() for seed in (1, 2))
        loss = function(x, y)
        (loss * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        results.append((loss.detach(), x.grad, y.grad))
    for here, plain in zip(*results, strict=True):
        torch.testing.assert_close(here, plain, rtol=1e-5, atol=1e-7)


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
def test_pooling_refusals(change: dict[str, object], said: str) -> None:
    arguments = {"grid_hw": (3, 3), "mode": "bilinear", **change}
    with pytest.raises(ValueError, match=said):
        pool_teacher(torch.zeros(1, 1, 9, 8), image_hw=(42, 42), num_tokens=9, position_embedding=False, **arguments)  # type: ignore[arg-type]
