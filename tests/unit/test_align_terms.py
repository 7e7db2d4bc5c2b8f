"""Centered targets, weights of pairs and the coefficient's schedule: numbers by hand, and the same over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.nn.functional import cosine_similarity

from rocket_align.alignment import MultiLayerAlignment
from rocket_align.centering import MIN_TASK_SAMPLES, Center, CenterMeter, task_keys
from rocket_align.config import AlignConfig
from rocket_align.flags import AlignFlags
from rocket_align.teacher.base import AlignmentTargets

PAIRS: dict[str, Any] = {"student_layers": (1, 2), "teacher_layers": (0, 1), "shift": False}
TASKS = torch.tensor([5] * 20 + [7] * 20 + [9])


def targets(samples: int, seed: int = 0) -> Tensor:
    """(2 pairs, samples, 3 tokens, 8 channels), mostly the same in every sample."""
    generator = torch.Generator().manual_seed(seed)
    place = 3 * torch.randn(2, 1, 3, 8, generator=generator)
    return place + torch.randn(2, samples, 3, 8, generator=torch.Generator().manual_seed(seed + 1))


def test_means_of_batches_are_those_of_all_samples() -> None:
    values, meter = targets(41), CenterMeter(by_task=True)
    for rows in torch.arange(41).split(7):
        meter.update(values[:, rows], TASKS[rows])
    center = meter.result()
    assert center.keys_T.tolist() == [0, 5, 7]  # Of task 9 there is one sample.
    for row, members in enumerate((slice(None), slice(20), slice(20, 40))):
        assert torch.allclose(center.means_TKNC[row], values[:, members].mean(dim=1), atol=1e-6)
    for sample, row in ((0, 1), (25, 2), (40, 0)):
        assert torch.equal(center.of(TASKS, torch.device("cpu"))[:, sample], center.means_TKNC[row])


def test_the_loss_is_the_cosine_to_what_the_means_leave() -> None:
    alignment = MultiLayerAlignment(AlignConfig(**PAIRS, center="dataset"), 6, 4)
    states = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    values = targets(4)
    with pytest.raises(ValueError, match="center: no means found"):
        alignment(states, 1, 3, AlignmentTargets(values))
    mean = values.mean(dim=1)
    alignment.center = Center(mean[None], torch.tensor([0]))
    for pair, loss in enumerate(alignment(states, 1, 3, AlignmentTargets(values)).per_pair):
        projected = alignment.project_pair(states[pair + 1][:, 1:4], pair)
        assert torch.isclose(loss, 1 - cosine_similarity(projected, values[pair] - mean[pair], dim=-1).mean())


def test_the_means_are_in_the_state_dict_only_where_they_are_used() -> None:
    centered = AlignConfig(**PAIRS, center="task")
    plain, first, second = (MultiLayerAlignment(c, 6, 4) for c in (AlignConfig(**PAIRS), centered, centered))
    assert first.state_dict().keys() == plain.state_dict().keys()
    first.center = Center(targets(2).transpose(0, 1), torch.tensor([0, 5]))
    state = first.state_dict()
    assert state.keys() - plain.state_dict().keys() == {"center_means", "center_keys"}
    second.load_state_dict(state)
    assert second.center is not None
    assert all(torch.equal(ours, stored) for ours, stored in zip(second.center, first.center))
    with pytest.raises(RuntimeError, match="center_means"):
        plain.load_state_dict(state)


def test_a_prompt_has_one_key_whatever_its_actions_and_padding() -> None:
    ids = torch.tensor([[1, 8, 9, 70, 71, 2, 0], [1, 8, 9, 72, 70, 2, 0], [1, 9, 8, 70, 71, 2, 0]])
    labels = torch.where(torch.arange(7) < 3, -100, ids)
    mask = torch.arange(7) < torch.tensor([[6], [6], [6]])
    first, second, other = task_keys(ids, mask, labels).tolist()
    assert first == second != other
    assert min(first, other) > 0
    assert task_keys(ids[:1, :6], mask[:1, :6], labels[:1, :6]).item() == first


def test_only_the_ratios_of_pair_weights_count() -> None:
    states = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    results = []
    for weights in (None, (2.0, 2.0), (3.0, 1.0), (0.0, 5.0)):
        torch.manual_seed(0)
        alignment = MultiLayerAlignment(AlignConfig(**PAIRS, pair_weights=weights), 6, 4)
        results.append(alignment(states, 1, 3, AlignmentTargets(targets(4))))
        taken = alignment.student_tokens(states, 1, 3)
        assert torch.equal(alignment.align(taken, AlignmentTargets(targets(4))).loss, results[-1].loss)
    first, second = results[0].per_pair
    expected = ((first + second) / 2, (first + second) / 2, 0.75 * first + 0.25 * second, second)
    assert torch.allclose(torch.stack([result.loss for result in results]), torch.stack(expected))


def test_the_coefficient_is_linear_between_points() -> None:
    config = AlignFlags(vggt_path="x", align_schedule="10:0,20:1,100:1,200:0.5").align_config(6, 6)
    factors = {0: 0, 10: 0, 15: 0.5, 20: 1, 60: 1, 150: 0.75, 200: 0.5, 9999: 0.5}
    assert {step: config.coeff_at(step) / 0.5 for step in factors} == pytest.approx(factors)
    assert AlignFlags(vggt_path="x").align_config(6, 6).coeff_at(7) == 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"align_center": "place"}, "--align_center: unknown value 'place'; accepted: none, dataset, task"),
        ({"align_center": "task", "pooling_func": "random"}, "--align_center: given with --pooling_func random"),
        ({"align_center_samples": -1}, "--align_center_samples: -1 found"),
        ({"align_schedule": "5:1,5:2"}, "--align_schedule: '5:1,5:2' found; accepted: STEP:FACTOR"),
        ({"align_schedule": "0:-1"}, "--align_schedule: '0:-1' found"),
        ({"align_pair_weights": "1,x"}, "--align_pair_weights: '1,x' found"),
        ({"align_pair_weights": "1,2"}, "pair_weights: found (1.0, 2.0); accepted: 5 numbers of 0 or more, not all 0"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: dict[str, Any], words: str) -> None:
    config = AlignFlags(vggt_path="x", **flags)
    with pytest.raises(ValueError) as refusal:
        config.validate_alignment()
        config.align_config(6, 6)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def measure_part(rank: int, folder: str) -> None:
    """One of two processes, which saw 9 and 32 samples, task 7 only in the second."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(9) if rank == 0 else slice(9, 41)
    meter = CenterMeter(by_task=True)
    meter.update(targets(41)[:, part], TASKS[part])
    torch.save(tuple(meter.result()), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_means_of_all_their_samples(tmp_path: Path) -> None:
    multiprocessing.spawn(measure_part, (str(tmp_path),), nprocs=2)
    whole = CenterMeter(by_task=True)
    whole.update(targets(41), TASKS)
    assert MIN_TASK_SAMPLES > 11  # Each process alone has too few of task 5.
    for rank in range(2):
        means, keys = torch.load(tmp_path / f"{rank}.pt")
        assert keys.tolist() == [0, 5, 7]
        assert torch.allclose(means, whole.result().means_TKNC, atol=1e-6)
