"""A process of loader.py: loads samples of one build, and answers each number on its input with what a sample took.

    loader_worker.py DATA_ROOT_DIR DATASET_NAME BATCH_SIZE

PYTHONPATH says which build is measured; the dataset is opened by that build's own benchmarks/loader.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def main(root: str, name: str, batch_size: str) -> None:
    """Open, warm up, then answer CPU milliseconds a sample."""
    from benchmarks.loader import open_dataset
    from prismatic.vla.datasets import MixtureSampler, sampler

    torch.set_num_threads(1)
    # What loader processes of the build do, if they do.
    getattr(sampler, "keep_freed_memory", lambda: None)()
    dataset, collate = open_dataset(Path(root), name)
    batches = iter(MixtureSampler(dataset, int(batch_size)))

    def load(count: int) -> float:
        started, done = time.process_time(), 0
        while done < count:
            done += len(collate([dataset[draw] for draw in next(batches)])["actions"])
        return 1e3 * (time.process_time() - started) / done

    load(40)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(load(int(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
