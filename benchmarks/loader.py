"""Speed of loading training samples: frames a second, CPU time a frame, memory; against decoding the images alone.

    python benchmarks/loader.py                                              made-up data, two minutes, 0.4 GB of disk
    python benchmarks/loader.py --data_root_dir DATA --dataset_name NAME     data of your own, RLDS or LeRobot
    python benchmarks/loader.py --earlier ../earlier                         also a checkout of an earlier commit

A frame here is a whole sample: two views read, decoded, resized to 224 pixels and augmented, normalized for both vision
models of OpenVLA-7B, tokenized and collated. The yardstick, measured in turns with it, is the plainest loop there is:
read the same two images and decode them with Pillow. Ratios to it carry over to other machines, times do not.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_probe import machine, resident_memory, write_results
from benchmarks.workers import Worker, commit_of
from prismatic.util.cli import run
from prismatic.util.flags import limited

if TYPE_CHECKING:
    import numpy as np

    from prismatic.vla.datasets import RLDSDataset

ROOT = Path(__file__).resolve().parents[1]
_NAME = "libero_spatial_no_noops"
_EPISODE_STEPS = 100
# Means and standard deviations of OpenVLA-7B's two vision models.
_MEANS = [(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)]
_STDS = [(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)]


@dataclass
class LoaderConfig:
    data_root_dir: str = ""  # Folder of datasets; default: made-up ones in a temporary folder
    dataset_name: str = _NAME  # Dataset or mixture below it
    frames: int = limited(1000, least=_EPISODE_STEPS)  # Frames of the small made-up dataset
    # Frames of the large one, which only the memory is compared on
    large_frames: int = limited(8000, least=_EPISODE_STEPS)
    stored_size: int = limited(256, least=1)  # Pixels of the made-up images
    batch_size: int = limited(8, least=1)
    num_workers: int = limited(2, least=1)  # Processes of the throughput measurement
    rounds: int = limited(40, least=1)  # Rounds of loader and yardstick in turns
    frames_per_round: int = limited(24, least=1)
    earlier: str = ""  # Checkout of an earlier commit to measure in turns with this one
    out: str = str(ROOT / "benchmarks" / "results" / "loader.json")  # Results file


def made_up_image(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth waves, edges and some noise: a JPEG of some 20 kB at 256 pixels, as LIBERO's renders have."""
    import numpy as np

    y, x = np.mgrid[0:size, 0:size] * (256.0 / size)
    waves = [np.sin(x / rng.uniform(7, 30) + y / rng.uniform(7, 30) + rng.uniform(0, 6)) for _ in range(3)]
    image = 128 + 60 * np.stack(waves, axis=2) + rng.normal(0, 4, (size, size, 3))
    top, left = rng.integers(0, size // 2, 2)
    image[top : top + size // 3, left : left + size // 3] = rng.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_data(root: Path, frames: int, size: int) -> None:
    """An RLDS dataset of `frames` frames in episodes of 100 steps; 64 different images, repeated."""
    import numpy as np

    from prismatic.vla.datasets.rlds_writer import Episode, RLDSWriter, encode_jpeg, serialize_episode

    rng = np.random.default_rng(0)
    images = [encode_jpeg(made_up_image(rng, size)) for _ in range(64)]

    def episode(number: int) -> Episode:
        chosen = rng.integers(0, len(images), (2, _EPISODE_STEPS))
        return Episode(
            images=[images[index] for index in chosen[0]],
            wrist_images=[images[index] for index in chosen[1]],
            state=rng.normal(size=(_EPISODE_STEPS, 8)),
            joint_state=rng.normal(size=(_EPISODE_STEPS, 7)),
            action=rng.uniform(-1, 1, (_EPISODE_STEPS, 7)),
            instruction=f"pick up object {number % 10} and place it in the basket",
            source=f"made-up/{number}",
        )

    with tempfile.TemporaryDirectory(dir=root) as staging:
        paths = []
        for number in range(frames // _EPISODE_STEPS):
            paths.append(Path(staging) / str(number))
            paths[-1].write_bytes(serialize_episode(episode(number)))
        RLDSWriter(root, _NAME, image_size=size).write_payloads(paths)


def open_dataset(root: Path, name: str, *, on_device: bool = False) -> tuple[RLDSDataset, Callable[[Any], Any]]:
    """The dataset as finetune.py opens it (224 pixels, two views, proprio, augmentation), and its collator.

    `on_device`: as with --augment_on_device.
    """
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
    from prismatic.util.data_utils import PaddedCollatorForActionPrediction
    from prismatic.vla.action_tokenizer import ActionTokenizer
    from prismatic.vla.datasets import RLDSBatchTransform, RLDSDataset
    from prismatic.vla.datasets.device_augmentation import defer
    from prismatic.vla.datasets.image_transforms import AugmentRanges, PolicyImageTransform

    tokenizer = PrismaticProcessor.from_pretrained(ROOT / "experiments" / "mini" / "weights" / "student").tokenizer
    processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, 224, 224)] * 2,
        interpolations=["bicubic"] * 2,
        means=_MEANS,
        stds=_STDS,
    )
    transform = RLDSBatchTransform(
        ActionTokenizer(tokenizer),
        tokenizer,
        image_transform=processor.apply_transform,
        use_wrist_image=True,
        use_proprio=True,
    )
    images = PolicyImageTransform((224, 224), AugmentRanges())
    if on_device:
        transform, images = defer(transform, images, processor)
    dataset = RLDSDataset(root, name, transform, (224, 224), image_transform=images)
    return dataset, PaddedCollatorForActionPrediction(2048, tokenizer.pad_token_id)


@dataclass(frozen=True)
class Cost:
    """Wall and CPU milliseconds a frame."""

    wall_ms: float
    cpu_ms: float


def measure(step: Callable[[], int], frames: int) -> Cost:
    """Call `step`, which returns how many frames it handled, until `frames` are done."""
    done, wall, cpu = 0, time.perf_counter(), time.process_time()
    while done < frames:
        done += step()
    return Cost(1e3 * (time.perf_counter() - wall) / done, 1e3 * (time.process_time() - cpu) / done)


def summary(costs: list[Cost]) -> dict[str, float]:
    """Medians of both times, and the least CPU time: the round that other programs disturbed least."""
    import numpy as np

    times = {name: float(np.median([getattr(cost, name) for cost in costs])) for name in ("wall_ms", "cpu_ms")}
    times["cpu_ms_best"] = min(cost.cpu_ms for cost in costs)
    return {name: round(value, 3) for name, value in times.items()}


def compare(config: LoaderConfig, root: Path) -> dict[str, Any]:
    """Loader and yardstick in turns, in this process with one thread."""
    import torch

    from prismatic.util.memory import keep_freed_memory
    from prismatic.vla.datasets import MixtureSampler

    torch.set_num_threads(1)
    keep_freed_memory()  # As loader processes do.
    dataset, collate = open_dataset(root, config.dataset_name)
    deferring, _ = open_dataset(root, config.dataset_name, on_device=True)
    batches = iter(MixtureSampler(dataset, config.batch_size))

    def load(data: RLDSDataset = dataset) -> int:
        return len(collate([data[draw] for draw in next(batches)])["actions"])

    def load_stored() -> int:
        return load(deferring)

    def decode() -> int:
        draws = next(batches)
        for draw in draws:
            source, start = dataset._locate(draw.frame)
            for view in range(2):
                source.index.image(view, start)
        return len(draws)

    for warm_up in (load, load_stored, decode):
        measure(warm_up, 40)
    loads, deferred, decodes = [], [], []
    for _ in range(config.rounds):
        loads.append(measure(load, config.frames_per_round))
        deferred.append(measure(load_stored, config.frames_per_round))
        decodes.append(measure(decode, config.frames_per_round))
    loader, yardstick = summary(loads), summary(decodes)
    return {
        "loader": loader,
        "loader_with_augment_on_device": summary(deferred),
        "decoding_alone": yardstick,
        "cpu_ratio_to_decoding": round(loader["cpu_ms"] / yardstick["cpu_ms"], 2),
        "cpu_ratio_of_best_rounds": round(loader["cpu_ms_best"] / yardstick["cpu_ms_best"], 2),
        "frames_in_dataset": len(dataset),
    }


def compare_with_earlier(config: LoaderConfig, root: Path) -> dict[str, Any]:
    """Loaders of this build and an earlier one in turns, in processes of their own with one thread."""
    commit = commit_of(config.earlier)
    builds = {"this build": ROOT, "earlier build": Path(config.earlier).resolve()}
    arguments = str(root), config.dataset_name, str(config.batch_size)
    workers = {name: Worker("loader_worker.py", *arguments, build=build) for name, build in builds.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(config.rounds):
        for name, worker in workers.items():
            times[name].append(worker.ask(str(config.frames_per_round)))
    for worker in workers.values():
        worker.close()
    rows = {
        name: {"cpu_ms": round(statistics.median(values), 3), "cpu_ms_best": round(min(values), 3)}
        for name, values in times.items()
    }
    this, earlier = rows.values()
    return {"commit": commit, **rows, **{f"{name}_ratio": round(this[name] / earlier[name], 3) for name in this}}


def throughput(config: LoaderConfig, root: Path) -> float:
    """Frames a second out of the data loader with worker processes, after its queue has filled."""
    from prismatic.vla.datasets import MixtureSampler, make_dataloader

    dataset, collate = open_dataset(root, config.dataset_name)
    sampler = MixtureSampler(dataset, config.batch_size)
    loader: Any = iter(make_dataloader(dataset, sampler, collate, config.num_workers))
    # The queue holds 4 batches a worker: leave them behind.
    for _ in range(8 * config.num_workers):
        next(loader)
    cost = measure(lambda: len(next(loader)["actions"]), config.rounds * config.frames_per_round)
    loader.close()  # ends the workers
    return 1e3 / cost.wall_ms


def _memory(root: str, name: str, frames: int, answer: Any) -> None:
    """In a fresh process: memory when the dataset is opened, and after `frames` random samples."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    dataset, _ = open_dataset(Path(root), name)
    rows = {"opened_mb": _anonymous_mb()}
    for frame in np.random.default_rng(0).integers(0, len(dataset), frames).tolist():
        dataset[frame]
    rows["after_mb"] = _anonymous_mb()
    rows["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    answer.put({"frames_in_dataset": len(dataset), **rows})


def _anonymous_mb() -> float:
    """Memory of this process that no file backs, MB: what other processes cannot use."""
    return round(resident_memory()["anonymous"] / 2**20, 1)


def memory(root: Path, name: str, frames: int) -> dict[str, Any]:
    """:func:`_memory` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_memory, args=(str(root), name, frames, answer))
    process.start()
    result: dict[str, Any] = answer.get(timeout=300)
    process.join()
    return result


def main(config: LoaderConfig) -> None:
    """Measure, print, write the results."""
    from PIL import Image

    facts = {**machine(), "pillow": Image.__version__, "load_before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {}
        root = Path(config.data_root_dir).expanduser() if config.data_root_dir else Path(folder) / "small"
        sizes = [root]
        if not config.data_root_dir:
            sizes.append(Path(folder) / "large")
            for path, frames in zip(sizes, (config.frames, config.large_frames), strict=True):
                path.mkdir()
                write_data(path, frames, config.stored_size)
        results |= compare(config, root)
        if config.earlier:
            results["earlier"] = compare_with_earlier(config, root)
        results["frames_per_second"] = round(throughput(config, root), 1)
        results["memory"] = [memory(path, config.dataset_name, 1000) for path in sizes]
    flags = {
        **{name: value for name, value in vars(config).items() if name != "earlier"},
        "data": "given" if config.data_root_dir else "made up",
    }
    write_results(config.out, "loader", flags, {"machine": facts, **results})
    loader, decoding = results["loader"], results["decoding_alone"]
    for label, row in (("loader", loader), ("decoding alone", decoding)):
        print(f"{label:16s} {row['cpu_ms']:6.2f} ms CPU a frame, {row['cpu_ms_best']:.2f} in the best round")
    best = results["cpu_ratio_of_best_rounds"]
    print(f"ratio            {results['cpu_ratio_to_decoding']:6.2f}, {best} of the best rounds")
    if config.earlier:
        print(f"over {results['earlier']['commit']}     {results['earlier']['cpu_ms_ratio']:6.2f}")
    print(f"{config.num_workers} workers        {results['frames_per_second']:6.1f} frames a second")
    for row in results["memory"]:
        print(
            f"{row['frames_in_dataset']:7d} frames: {row['opened_mb']} MB when opened, {row['after_mb']} MB after use"
        )


if __name__ == "__main__":
    run(LoaderConfig, main)
