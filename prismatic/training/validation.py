"""Losses and action errors on the validation split: the same samples and random numbers every time, on all processes.

Every validation frame counts once, whatever the batch size and the number of processes; the same holds for each
dataset of a mixture, whose metrics are reported under its name as well. Diffusion also samples whole action chunks, as
the policy would. Training's random numbers are left as they were.

Upstream behavior: `run_validation` of OpenVLA-OFT's fine-tuning script, except that it draws other noise every time and
lets every process measure the same samples.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from prismatic.training.config import TrainConfig
from prismatic.training.engine import Engine
from prismatic.training.loop import Targets
from prismatic.training.module import TrainablePolicy, move_batch
from prismatic.vla.batch import Batch, Sample
from prismatic.vla.datasets.dataset import FrameDraw, MixturePart, RLDSDataset
from prismatic.vla.datasets.sampler import start_loader_process, worker_error

NumberedBatch = tuple[int, str, list[FrameDraw]]


def validation_batches(mixture: Sequence[MixturePart], batch_size: int, seed: int) -> list[NumberedBatch]:
    """All batches of a validation: (number, dataset, its frames), every frame once, a batch from one dataset.

    Frames and batches are shuffled by `seed`, so that a validation cut off by its time limit saw a bit of everything.
    """
    batches: list[tuple[str, list[FrameDraw]]] = []
    for number, part in enumerate(mixture):
        order = part.first + np.random.default_rng((seed, 5, number)).permutation(part.size)
        for start in range(0, part.size, batch_size):
            batches.append((part.name, [FrameDraw(int(frame), 0) for frame in order[start : start + batch_size]]))
    shuffled = np.random.default_rng((seed, 6)).permutation(len(batches))
    return [(number, *batches[chosen]) for number, chosen in enumerate(shuffled)]


class Validator:
    """Measures the policy on a validation set; call it on every process.

    Args:
        config: batch_size, seed, num_workers, val_time_limit.
        engine: of the run.
        module: the unwrapped trainable module, in evaluation mode when called.
        dataset: the validation split, without augmentation.
        collate: samples to a batch.
        targets: from a batch to the auxiliary loss's targets.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        module: TrainablePolicy,
        dataset: RLDSDataset,
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        targets: Targets,
    ) -> None:
        self.config, self.engine, self.accelerator, self.module = config, engine, engine.accelerator, module
        self.dataset, self.collate, self.targets = dataset, collate, targets
        self._batches = validation_batches(dataset.mixture, config.batch_size, config.seed)

    def __call__(self) -> dict[str, float]:
        """Means over the validation samples of all processes, or over those that fitted into `val_time_limit`.

        Returns:
            loss, action_loss, align_loss and its pairs (with alignment), curr_action_l1_loss, next_actions_l1_loss,
            curr_action_accuracy and next_actions_accuracy (discrete tokens), num_samples; for a mixture also
            `{dataset}/{metric}`.
        """
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        deadline = time.monotonic() + self.config.val_time_limit
        share = self._batches[self.accelerator.process_index :: self.accelerator.num_processes]
        own = len(share)
        if self.engine.sharded and own * self.accelerator.num_processes < len(self._batches):
            share = [*share, self._batches[0]]  # Not counted: all processes run the same number of forward passes.
        for position, ((number, dataset, frames), batch) in enumerate(zip(share, self._load(share))):
            values = self._measure(batch, number)
            if position < own:
                sums[dataset]["num_samples"] += len(frames)
                for name, value in values.items():
                    sums[dataset][name] += value * len(frames)
            if self._is_late(deadline):
                break
        return _means(gather_object([{dataset: dict(values) for dataset, values in sums.items()}]))

    def _is_late(self, deadline: float) -> bool:
        """Tell whether the time is over; processes that share a model agree on it."""
        late = time.monotonic() > deadline
        return any(gather_object([late])) if self.engine.sharded else late

    def _load(self, batches: list[NumberedBatch]) -> Iterator[Batch]:
        """The batches in their order. Raises UsageError for bad data."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=[frames for _, _, frames in batches],
            collate_fn=self.collate,
            num_workers=self.config.num_workers,
            generator=torch.Generator(),  # else the loader draws a number from training's
            worker_init_fn=start_loader_process,
        )
        with worker_error():
            yield from loader

    def _measure(self, batch: Batch, number: int) -> dict[str, float]:
        """Metrics of one batch, with random numbers that depend on its number alone."""
        accelerator = self.accelerator
        batch = move_batch(batch, accelerator.device)
        seed = int(np.random.SeedSequence((self.config.seed, 7, number)).generate_state(1)[0])
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), accelerator.autocast():
            torch.manual_seed(seed)
            targets = self.targets(batch) if self.module.uses_targets else None
            metrics = self.module(batch, targets).metrics
            metrics |= self.module.sampled_errors(batch, seed)
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        return dict(zip(metrics, values, strict=True))


def _means(ranks: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Sums over samples, by process and dataset, to means over all of them and by dataset."""
    datasets: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    total: dict[str, float] = defaultdict(float)
    for sums in ranks:
        for dataset, values in sums.items():
            for name, value in values.items():
                datasets[dataset][name] += value
                total[name] += value
    result = _divided(total)
    if len(datasets) > 1:
        for dataset in sorted(datasets):
            result |= {f"{dataset}/{name}": value for name, value in _divided(datasets[dataset]).items()}
    return result


def _divided(sums: dict[str, float]) -> dict[str, float]:
    count = sums["num_samples"]
    return {name: value if name == "num_samples" else value / count for name, value in sums.items()}
