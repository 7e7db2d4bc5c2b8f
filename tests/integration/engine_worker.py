"""One process of tests/integration/test_sharding.py: the script's main with each of the flags in a JSON file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

import finetune as script
from prismatic.util.cli import leave


def main(file: str) -> None:
    """Train one case after the other in the processes of one launch."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # The launch has one; a run's end would take it away.
    for flags in json.loads(Path(file).read_text()):
        if flags.get("shard", "auto") != "auto":
            for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
                os.environ.pop(name, None)  # The case before left it.
        AcceleratorState._reset_state(reset_partial_state=True)
        paths = {name: Path(flags[name]) for name in ("data_root_dir", "run_root_dir")}
        assert script.main(script.FinetuneConfig(**flags | paths)) == 0
    destroy()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
