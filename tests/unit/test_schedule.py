"""Learning-rate schedule: warm-up and decay compose, the last step is max_steps - 1."""

from __future__ import annotations

import pytest
import torch

from prismatic.training.config import TrainConfig
from prismatic.training.schedule import learning_rate_factor, make_optimizer, make_schedule


def test_warmup_rises_linearly_from_a_tenth() -> None:
    config = TrainConfig(lr_warmup_steps=9)
    factors = [learning_rate_factor(step, config) for step in range(10)]
    assert factors == pytest.approx([0.1 + 0.1 * (step + 1) for step in range(9)] + [1.0])


def test_decay_survives_warmup() -> None:
    config = TrainConfig(lr_warmup_steps=10, num_steps_before_decay=5)
    assert learning_rate_factor(7, config) == pytest.approx(0.1 * (0.1 + 0.9 * 8 / 10))
    assert learning_rate_factor(100, config) == pytest.approx(0.1)


def test_cosine_ends_at_zero() -> None:
    config = TrainConfig(scheduler="CosineAnnealingLR", max_steps=100)
    assert learning_rate_factor(0, config) == 1.0
    assert learning_rate_factor(50, config) == pytest.approx(0.5)
    assert learning_rate_factor(100, config) == pytest.approx(0.0)


def test_matches_torchs_multistep_schedule() -> None:
    config = TrainConfig(learning_rate=5e-4, num_steps_before_decay=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, schedule = make_optimizer([weight], config)
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    expected = torch.optim.lr_scheduler.MultiStepLR(reference, milestones=[3], gamma=0.1)
    for _ in range(6):
        assert schedule.get_last_lr() == pytest.approx(expected.get_last_lr())
        optimizer.step()
        reference.step()
        schedule.step()
        expected.step()


@pytest.mark.parametrize("loaded", [True, False], ids=["its optimizer", "a new optimizer"])
def test_a_resumed_run_is_where_its_step_and_its_flags_say(loaded: bool) -> None:
    first, _ = make_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(weight_decay=0.3))
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1, num_steps_before_decay=5)
    optimizer, _ = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    if loaded:
        optimizer.load_state_dict(first.state_dict())
    schedule = make_schedule(optimizer, config, step=4)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == rates[-1:]
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
