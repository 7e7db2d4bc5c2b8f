"""Optimizer and learning-rate schedule.

Upstream's warm-up overwrites the decayed rate and its loop runs one step too many; here warm-up and decay are factors
of one function of the step, so they compose, and step `max_steps - 1` is the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prismatic.training.config import TrainConfig

WARMUP_START = 0.1
DECAY = 0.1


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses."""
    factor = 1.0
    if step < config.lr_warmup_steps:
        factor = WARMUP_START + (1 - WARMUP_START) * (step + 1) / config.lr_warmup_steps
    if config.scheduler == "CosineAnnealingLR":
        cosine = 0.5 * (1 + math.cos(math.pi * min(step, config.max_steps) / config.max_steps))
        end = config.final_learning_rate / config.learning_rate
        return factor * (end + (1 - end) * cosine)
    return factor * (DECAY if step >= config.num_steps_before_decay else 1.0)


def make_schedule(optimizer: Optimizer, config: TrainConfig, step: int = 0) -> LambdaLR:
    """The schedule after `step` optimizer steps.

    Rate, second beta and weight decay are the flags', also where `optimizer` comes from the checkpoint of a run that
    had others.
    """
    for group in optimizer.param_groups:
        group |= {"initial_lr": config.learning_rate, "weight_decay": config.weight_decay}
        group["betas"] = (group["betas"][0], config.adam_beta2)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config), last_epoch=step - 1)


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> tuple[Optimizer, LambdaLR]:
    """AdamW and the schedule. Vectors and scalars are not exempt from weight decay, as upstream.

    The 8-bit ones (arXiv 2110.02861) keep both moments of every tensor of 4,096 numbers or more in a byte each; paged,
    they may leave a full GPU for the memory of its host.
    """
    make: Callable[..., Optimizer] = torch.optim.AdamW
    if config.optimizer != "adamw":
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        make = AdamW8bit if config.optimizer == "adamw_8bit" else PagedAdamW8bit
    optimizer = make(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, config.adam_beta2)
    )
    return optimizer, make_schedule(optimizer, config)
