"""Means of the pooled targets of each pair and place, which a centered alignment subtracts before the cosine.

Where cameras stand still, most of a teacher's feature is where its token is. Without that part, the cosine compares
what differs between pictures. A task is a prompt; each has means of its own with `center="task"`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Fewer samples of a task say too little: such a task takes the means of the data set.
MIN_TASK_SAMPLES = 16
ALL_TASKS = 0
_PRIMES = (2_147_483_647, 2_147_483_629)
_BASE = 1_000_003
_IGNORED_LABEL = -100


class Center(NamedTuple):
    """Means to subtract."""

    means_TKNC: Tensor  # Float32 (T, K, N, C); row 0 is the data set's
    keys_T: Tensor  # Int64 (T,), `task_keys` of the rows' tasks, and `ALL_TASKS` for row 0

    def of(self, tasks_B: Tensor | None, device: torch.device) -> Tensor:
        """Each sample's means (K, B or 1, N, C); those of row 0 for a task without a row. Never waits for the device.

        Raises ValueError: means by task, but samples that do not say which task they are of.
        """
        if len(self.keys_T) == 1:
            return self.means_TKNC.to(device).transpose(0, 1)
        if tasks_B is None:
            raise ValueError("center: samples without tasks found; accepted with means by task: task_keys of each")
        # No match is a row of zeros, whose argmax is 0.
        rows = (tasks_B.to(device)[:, None] == self.keys_T.to(device)).int().argmax(dim=1)
        return self.means_TKNC.to(device)[rows].transpose(0, 1)


def task_keys(input_ids_BS: Tensor, attention_mask_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """A number above 0 for each sample's prompt, equal for equal prompts: int64 (B,).

    Args:
        input_ids_BS, attention_mask_BS, labels_BS: a batch's text; the prompt is what has no label.
    """
    prompt = attention_mask_BS.bool() & (labels_BS == _IGNORED_LABEL)
    # Places are counted within the prompt, and powers kept below the prime so that no product overflows.
    places = prompt.cumsum(dim=1) * prompt
    hashes = []
    for prime in _PRIMES:
        powers = [0, 1]
        for _ in range(input_ids_BS.shape[1] - 1):
            powers.append(powers[-1] * _BASE % prime)
        table = torch.tensor(powers, device=input_ids_BS.device)
        hashes.append(((input_ids_BS.long() + 1) * table[places]).sum(dim=1) % prime)
    return (hashes[0] + 1) * 2**31 + hashes[1]


class CenterMeter:
    """Accumulates pooled targets to a :class:`Center`, batch by batch and over all processes.

    Args:
        by_task: means of each task too.
    """

    def __init__(self, *, by_task: bool) -> None:
        self.by_task = by_task
        self.samples = 0
        self._means: dict[int, tuple[Tensor, int]] = {}

    def update(self, targets_KBNC: Tensor, tasks_B: Tensor | None = None) -> None:
        """Add the targets of a batch. Raises ValueError: means by task, but no tasks."""
        if self.by_task and tasks_B is None:
            raise ValueError("center: a batch without tasks found; accepted with means by task: task_keys of it")
        self.samples += targets_KBNC.shape[1]
        self._add(ALL_TASKS, targets_KBNC)
        if self.by_task and tasks_B is not None:
            for key in tasks_B.unique().tolist():
                self._add(key, targets_KBNC[:, (tasks_B == key).to(targets_KBNC.device)])

    def _add(self, key: int, targets_KBNC: Tensor) -> None:
        batch = targets_KBNC.float()
        mean, count = self._means.get(key, (torch.zeros_like(batch[:, 0]), 0))
        total = count + batch.shape[1]
        self._means[key] = mean + (batch - mean[:, None]).sum(dim=1) / total, total

    def result(self) -> Center:
        """The means of all processes' samples; every process calls it. Raises ValueError: no batch."""
        if ALL_TASKS not in self._means:
            raise ValueError("center: found no targets; accepted: at least one batch")
        shape = self._means[ALL_TASKS][0]
        rows = {}
        for key in self._shared_keys():
            mean, count = self._means.get(key, (torch.zeros_like(shape), 0))
            mean, count = _over_processes(mean, count)
            if key == ALL_TASKS or count >= MIN_TASK_SAMPLES:
                rows[key] = mean
        return Center(torch.stack(list(rows.values())), torch.tensor(list(rows), device=shape.device))

    def _shared_keys(self) -> list[int]:
        keys: list[Iterable[int]] = [self._means]
        if _several_processes():
            keys = [()] * dist.get_world_size()
            dist.all_gather_object(keys, list(self._means))
        return sorted({key for part in keys for key in part})


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _over_processes(mean: Tensor, count: int) -> tuple[Tensor, int]:
    if not _several_processes():
        return mean, count
    total = torch.tensor(float(count), device=mean.device)
    dist.all_reduce(total)
    share = mean * (count / total)
    dist.all_reduce(share)
    return share, int(total)
