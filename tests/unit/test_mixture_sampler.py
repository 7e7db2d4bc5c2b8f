"""The order of samples: exact, disjoint between ranks, resumable, and the same for any number of loader workers."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.util.errors import UsageError
from prismatic.vla.datasets import FrameDraw, MixtureSampler, RLDSDataset, make_dataloader
from prismatic.vla.datasets.dataset import MixturePart
from tests.helpers.programs import run_program
from tests.helpers.rlds_files import episode, write_dataset


def _mixture(*sizes_and_weights: tuple[int, float]) -> Any:
    firsts = itertools.accumulate([0, *(size for size, _ in sizes_and_weights)])
    parts = [MixturePart(str(first), first, size, weight) for first, (size, weight) in zip(firsts, sizes_and_weights)]
    return SimpleNamespace(mixture=tuple(parts))


def _take(sampler: MixtureSampler, batches: int) -> list[FrameDraw]:
    return [draw for batch in itertools.islice(sampler, batches) for draw in batch]


def test_every_frame_once_an_epoch() -> None:
    draws = _take(MixtureSampler(_mixture((13, 1.0), (8, 1.0)), 7, seed=1), 3 * 4)
    for epoch in range(4):
        part = draws[epoch * 21 : (epoch + 1) * 21]
        assert sorted(draw.frame for draw in part) == list(range(21))
        assert {draw.epoch for draw in part} == {epoch}
    orders = [tuple(draw.frame for draw in draws[i : i + 21]) for i in range(0, 84, 21)]
    assert len(set(orders)) == 4 and tuple(range(21)) not in orders


def test_weights_times_sizes() -> None:
    mixture = _mixture((40, 1.0), (20, 0.5), (10, 2.5))
    draws = _take(MixtureSampler(mixture, 5, seed=0), 15 * 4)  # 4 epochs of 40 + 10 + 25
    counts = Counter(0 if draw.frame < 40 else 1 if draw.frame < 60 else 2 for draw in draws)
    assert counts == {0: 160, 1: 40, 2: 100}
    assert set(Counter(draw.frame for draw in draws if 40 <= draw.frame < 60).values()) == {2}
    assert set(Counter(draw.frame for draw in draws if draw.frame >= 60).values()) == {10}
    assert max(Counter(draws).values()) == 1  # a repeated frame has another epoch, so another augmentation


def test_shuffling_mixes_datasets() -> None:
    draws = _take(MixtureSampler(_mixture((500, 1.0), (500, 1.0)), 10, seed=0), 100)
    halves = np.array([draw.frame < 500 for draw in draws])
    assert 0.4 < halves[:300].mean() < 0.6
    frames = np.array([draw.frame for draw in draws])
    assert abs(np.corrcoef(frames, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_nothing_and_miss_nothing(world: int) -> None:
    mixture = _mixture((17, 1.0), (9, 0.7))
    alone = iter(MixtureSampler(mixture, 4 * world, seed=3))
    ranks = [iter(MixtureSampler(mixture, 4, seed=3, rank=rank, world_size=world)) for rank in range(world)]
    for _ in range(12):
        together = [draw for rank in ranks for draw in next(rank)]
        assert together == next(alone)
        assert len(set(together)) == len(together)


@pytest.mark.parametrize("consumed", [0, 1, 6, 23])
def test_resume_at_the_next_batch(consumed: int) -> None:
    mixture = _mixture((11, 1.0), (7, 0.3))
    expected = _take(MixtureSampler(mixture, 4, seed=2, rank=1, world_size=2), consumed + 10)[consumed * 4 :]
    first = MixtureSampler(mixture, 4, seed=2, rank=0, world_size=2)
    _take(first, consumed)
    for state in (first.state_dict(), {"batches": consumed}):
        second = MixtureSampler(mixture, 4, seed=2, rank=1, world_size=2)
        second.load_state_dict(state)
        assert _take(second, 10) == expected


def test_resume_with_another_batch_size() -> None:
    mixture = _mixture((11, 1.0))
    first, second = MixtureSampler(mixture, 4), MixtureSampler(mixture, 3)
    _take(first, 5)
    second.load_state_dict(first.state_dict())
    assert _take(second, 4) == _take(first, 3)


def test_seeds_differ() -> None:
    mixture = _mixture((50, 1.0))
    assert _take(MixtureSampler(mixture, 10, seed=0), 5) != _take(MixtureSampler(mixture, 10, seed=1), 5)


def test_wrong_arguments() -> None:
    mixture = _mixture((5, 1.0))
    for options, message in (
        ({"batch_size": 0}, "--batch_size: 0"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank 2 of 2"),
    ):
        with pytest.raises(UsageError, match=message):
            MixtureSampler(mixture, **options)
    with pytest.raises(UsageError, match="--num_workers: -1"):
        make_dataloader([], MixtureSampler(mixture, 2), list, num_workers=-1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> RLDSDataset:
    root = tmp_path_factory.mktemp("rlds")
    write_dataset(root, "libero_goal_no_noops", {"train": [[episode(12, 0), episode(14, 1)]]})
    write_dataset(root, "libero_10_no_noops", {"train": [[episode(16, 2)]]})
    mix = "libero_goal_no_noops,libero_10_no_noops:0.6"
    return RLDSDataset(root, mix, _sample, (24, 24), image_aug=True, seed=4)


def _sample(frame: dict[str, Any]) -> dict[str, Any]:
    return {"image": frame["observation"]["image_wrist"], "action": frame["action"]}


def _collate(samples: Any) -> Any:
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in ("image", "action")}


def _batches(
    dataset: RLDSDataset, workers: int, count: int, state: dict[str, int] | None = None
) -> tuple[list[Any], Any]:
    loader = make_dataloader(dataset, MixtureSampler(dataset, 3, seed=4), _collate, workers)
    if state is not None:
        loader.load_state_dict(state)
    return list(itertools.islice(loader, count)), loader.state_dict()


def test_any_number_of_workers_gives_the_same_batches(dataset: RLDSDataset) -> None:
    alone, state = _batches(dataset, 0, 14)
    assert state == {"batches": 14, "draws": 42}
    assert not torch.equal(alone[0]["image"], alone[7]["image"])
    for workers in (1, 2):
        torch.testing.assert_close(_batches(dataset, workers, 14)[0], alone, rtol=0, atol=0)


def test_loader_resumes_after_what_it_handed_out(dataset: RLDSDataset) -> None:
    # Two workers have fetched far ahead of the fifth batch when the state is taken.
    whole, _ = _batches(dataset, 0, 12)
    _, state = _batches(dataset, 2, 5)
    assert state["batches"] == 5
    torch.testing.assert_close(_batches(dataset, 2, 7, state)[0], whole[5:], rtol=0, atol=0)
    loader = make_dataloader(dataset, MixtureSampler(dataset, 3, seed=4), _collate, 2)
    halves = [*itertools.islice(loader, 4), *itertools.islice(loader, 4)]
    torch.testing.assert_close(halves, whole[:8], rtol=0, atol=0)


def test_bad_data_in_a_worker_are_one_line(tmp_path: Path) -> None:
    features = episode(9, 0)
    features["steps/observation/image"] = [b"no image"] * 9
    write_dataset(tmp_path, "libero_goal_no_noops", {"train": [[features]]})
    broken = RLDSDataset(tmp_path, "libero_goal_no_noops", _sample, (24, 24))
    loader = make_dataloader(broken, MixtureSampler(broken, 2), _collate, 1)
    with pytest.raises(UsageError, match=r"^/.*record 0: step \d: image primary: 8 bytes"):
        next(iter(loader))


def test_a_program_ends_though_a_loader_was_left_running() -> None:
    """At its end Python sends loader processes a SIGTERM, which they do not heed, and waits for them."""
    program = (
        "import torch\n"
        "from torch.utils.data import DataLoader\n"
        "from prismatic.vla.datasets.sampler import outlive_stop_signals\n"
        "left = iter(DataLoader(range(100), num_workers=1, worker_init_fn=outlive_stop_signals))\n"
        "kept = (left, next(left))\n"
        "import sys; sys.modules['kept'] = kept\n"
    )
    done = run_program([sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
