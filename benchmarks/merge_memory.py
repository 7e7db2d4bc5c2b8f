"""Peak memory of merging a LoRA adapter into a sharded bf16 model, beside the model's size.

    python benchmarks/merge_memory.py --work_dir /tmp/merge                  1 GB of random weights, 2 GB of disk

The model has OpenVLA's architecture and OpenVLA-7B's widths, with fewer blocks; the adapter is one of rank 32 on every
linear layer. `merge_lora_weights_and_save.py` runs in a process of its own, whose peak is read from the kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_probe import write_results
from prismatic.util.cli import run
from prismatic.util.flags import limited

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "vla-scripts" / "merge_lora_weights_and_save.py"
# A small process starts the command: the kernel counts what a process was forked from into its peak.
WAIT = """
import os, sys
process = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass
class MergeConfig:
    # Folder for the random model and the result; needed
    work_dir: str = limited("", needed="a folder on a local disk with 3 GB free")
    out: str = "benchmarks/results/merge_memory.json"  # Results file
    llm_blocks: int = limited(1, least=1)  # 1: about 1 GB, most of it embeddings, head, projector and one block
    vision_blocks: int = limited(2, least=1)
    lora_rank: int = limited(32, least=1)
    max_shard_size: str = "300MB"


def main(config: MergeConfig) -> int:
    """Write model and adapter, merge, write the results; returns 0."""
    folder = Path(config.work_dir).expanduser() / "merge"
    try:
        size = write_model_and_adapter(config, folder)
        flags = ["--base_checkpoint", str(folder / "student"), "--lora_finetuned_checkpoint_dir", str(folder / "run")]
        flags += ["--output_dir", str(folder / "merged"), "--max_shard_size", config.max_shard_size]
        imports, _ = measure([sys.executable, "-c", "import torch, safetensors, prismatic.checkpoint.merge"])
        peak, seconds = measure([sys.executable, str(SCRIPT), *flags])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {
        "model_bytes": size,
        "peak_bytes": peak,
        "peak_of_imports_bytes": imports,
        "peak_over_model": round(peak / size, 3),
        "over_imports_and_model": round((peak - imports) / size, 3),
        "seconds": round(seconds, 1),
    }
    write_results(config.out, "merge_memory", vars(config), results)
    print(
        f"model {size / 1e9:.2f} GB; peak {peak / 1e9:.2f} GB ({results['peak_over_model']} of the model), of which "
        f"the libraries take {imports / 1e9:.2f} GB; {seconds:.1f} s"
    )
    return 0


def write_model_and_adapter(config: MergeConfig, folder: Path) -> int:
    """A random bf16 model in shards and an adapter of it; returns the model's bytes."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.full_size import Sizes
    from benchmarks.full_size_step import write_weights
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.models.lora import add_lora

    sizes = Sizes(config.llm_blocks, config.vision_blocks, 1)
    student, _ = write_weights(sizes, folder)
    with torch.device("meta"):
        adapted = add_lora(OpenVLAForActionPrediction(sizes.student()), config.lora_rank)
    lora = {
        name.replace(".default", ""): torch.randn(value.shape) * 0.02
        for name, value in adapted.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    adapted.peft_config["default"].save_pretrained(str(folder / "run" / "lora_adapter"))
    save_file(lora, folder / "run" / "lora_adapter" / "adapter_model.safetensors")
    return sum(file.stat().st_size for file in student.glob("*.safetensors"))


def measure(command: list[str]) -> tuple[int, float]:
    """(peak resident bytes, seconds) of a command. Raises RuntimeError: it failed."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WAIT, *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}")
    return int(done.stdout.split()[-1]) * 1024, time.perf_counter() - start


if __name__ == "__main__":
    run(MergeConfig, main)
