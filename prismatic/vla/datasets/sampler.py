"""Choose the frames of every batch: exact shuffling of a mixture, disjoint between ranks, resumable at any batch."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from prismatic.util.errors import UsageError
from prismatic.util.memory import keep_freed_memory
from prismatic.vla.batch import Batch, Sample
from prismatic.vla.datasets.dataset import FrameDraw, RLDSDataset

_NAMED = 16  # Samples that a line lists.


class MixtureSampler(Sampler[list[FrameDraw]]):
    """Endless batches of :class:`FrameDraw`.

    Epoch e of the mixture holds weight * size draws of each dataset, shuffled together; a dataset's own draws are one
    permutation of its frames after another. With weight 1 every frame therefore comes exactly once an epoch; with 0.5
    every frame comes once in two epochs. The draws of all epochs form one sequence; batch n of rank r takes its
    `batch_size` draws from n * batch_size * world_size + r * batch_size on, so ranks never share a draw, and the
    position alone is the state.
    """

    def __init__(
        self, dataset: RLDSDataset, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises UsageError for a batch size below 1 or a rank outside the world."""
        if batch_size < 1:
            raise UsageError(f"--batch_size: {batch_size}; accepted: 1 or more")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size} processes; accepted: 0 to {world_size - 1}")
        self.mixture = dataset.mixture
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, int(seed), rank, world_size
        self._expected = [part.weight * part.size for part in self.mixture]
        self._draws = 0  # of all ranks together
        self._epoch = -1
        self._order = np.empty((0, 2), dtype=np.int64)

    def __iter__(self) -> Iterator[list[FrameDraw]]:
        while True:
            first = self._draws + self.rank * self.batch_size
            batch = [self._draw(first + i) for i in range(self.batch_size)]
            self._draws += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position after the batches yielded so far; the same on every rank."""
        return {"batches": self._draws // (self.batch_size * self.world_size), "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the very next batch after `state`.

        "batches" counts batches of this size and number of ranks; "draws", when present, counts samples of all ranks
        and wins, so a run may go on with another batch size or number of ranks.
        """
        draws = state.get("draws", state["batches"] * self.batch_size * self.world_size)
        if draws < 0:
            raise UsageError(f"sampler state: {draws} draws; accepted: 0 or more")
        self._draws = int(draws)

    def draws(self, first: int, count: int) -> tuple[int, list[FrameDraw]]:
        """The mixture's epoch of draw `first` of the sequence, and `count` draws from there on."""
        chosen = self._draw(first)
        return self._epoch, [chosen, *(self._draw(first + i) for i in range(1, count))]

    def _draws_before(self, epoch: int) -> list[int]:
        """Draws of each dataset before the epoch begins."""
        return [int(epoch * expected) for expected in self._expected]

    def _draw(self, number: int) -> FrameDraw:
        """Draw `number` of the endless sequence."""
        epoch = max(self._epoch, 0)
        if not sum(self._draws_before(epoch)) <= number < sum(self._draws_before(epoch + 1)):
            epoch = int(number / sum(self._expected))
            while sum(self._draws_before(epoch)) > number:
                epoch -= 1
            while sum(self._draws_before(epoch + 1)) <= number:
                epoch += 1
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        frame, drawn_before = self._order[number - sum(self._draws_before(epoch))].tolist()
        return FrameDraw(frame, drawn_before)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """(frame, times drawn before) of all draws of an epoch in order, (draws, 2)."""
        columns = []
        begins, ends = self._draws_before(epoch), self._draws_before(epoch + 1)
        for number, (part, begin, end) in enumerate(zip(self.mixture, begins, ends, strict=True)):
            for own_epoch in range(begin // part.size, -(-end // part.size)):
                order = np.random.default_rng((self.seed, 1, number, own_epoch)).permutation(part.size)
                low = max(begin - own_epoch * part.size, 0)
                frames = part.first + order[low : end - own_epoch * part.size]
                columns.append(np.stack([frames, np.full(len(frames), own_epoch)], axis=1))
        draws = np.concatenate(columns)
        return draws[np.random.default_rng((self.seed, 2, epoch)).permutation(len(draws))]


@contextmanager
def worker_error() -> Iterator[None]:
    """Turn a loader process's UsageError, which arrives with its traceback in the message, into its one line."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).split("UsageError: ")[-1]) from error


def outlive_stop_signals(worker: int) -> None:
    """Ignore, in a loader process, Ctrl-C or the SIGTERM of a cluster: it reaches the whole process group, but
    training wants batches until it has saved. It ends with the process that it loads for, or when that one says so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def start_loader_process(worker: int) -> None:
    """Prepare a loader process."""
    outlive_stop_signals(worker)
    keep_freed_memory()


@atexit.register
def _end_loaders() -> None:
    """Kill what loader processes are left at the end: Python would send them a SIGTERM and wait forever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class MixtureLoader:
    """A DataLoader whose state is what was handed out, not what its workers have fetched ahead."""

    def __init__(self, loader: DataLoader, sampler: MixtureSampler) -> None:
        self._loader, self._sampler = loader, sampler
        self._state = sampler.state_dict()
        self.last_draw = 0  # Number of the first sample of all processes' last batch.

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches from the present state on.

        Raises UsageError: bad data met by a worker, as the one line it raised.
        """
        self._sampler.load_state_dict(self._state)
        draws_per_batch = self._sampler.batch_size * self._sampler.world_size
        batches = iter(self._loader)
        while True:
            with worker_error():
                batch = next(batches)
            self.last_draw = self._state["draws"]
            draws = self._state["draws"] + draws_per_batch
            self._state = {"batches": draws // draws_per_batch, "draws": draws}
            yield batch

    def describe(self, first: int, count: int) -> str:
        """Say which samples `count` draws from `first` on are, as in "epoch 0, libero_10 3:17 5:2 (episode:frame)"."""
        dataset = cast(RLDSDataset, self._loader.dataset)
        epoch, draws = self._sampler.draws(first, min(count, _NAMED))
        places: dict[str, list[str]] = {}
        for draw in draws:
            name, episode, frame = dataset.episode_and_frame(draw.frame)
            places.setdefault(name, []).append(f"{episode}:{frame}")
        listed = ", ".join(" ".join([name, *frames]) for name, frames in places.items())
        return f"epoch {epoch}, {listed}{f' and {count - _NAMED} more' if count > _NAMED else ''} (episode:frame)"

    def state_dict(self) -> dict[str, int]:
        """The state to continue after the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue there at the next `iter()`."""
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()


def make_dataloader(
    dataset: Dataset, sampler: MixtureSampler, collator: Callable[[Sequence[Sample]], Batch], num_workers: int = 0
) -> MixtureLoader:
    """Batches of `dataset` in the order of `sampler`, which is the same for any number of workers.

    Raises UsageError: a negative number of workers.
    """
    if num_workers < 0:
        raise UsageError(f"--num_workers: {num_workers}; accepted: 0 (load in the training process) or more")
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # else the loader draws a number from training's, and a resumed run one more
        worker_init_fn=start_loader_process,
    )
    return MixtureLoader(loader, sampler)
