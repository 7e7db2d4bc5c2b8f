"""Train and serve for long, and see that memory stays flat and that no process or file is left behind.

    python benchmarks/soak.py                              3,000 steps of the mini models, then 2,000 requests, CPU

`finetune.py` trains the mini student with the mini teacher (a loader process, a checkpoint every tenth of the steps,
two kept); `deploy.py` then serves the last checkpoint to clients that ask at the same time over HTTP and WebSocket,
each with a new connection every 20 requests. Compared are medians over the second and the last fifth of each part.
Ends with 1 where memory grew, or where a process, an open file or a temporary file stayed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "experiments" / "mini" / "weights"
REQUESTS_A_CONNECTION = 20
# Of the medians: less is the allocator's and the sampling's noise.
MOST_GROWTH = 0.05


@dataclass
class SoakConfig:
    steps: int = limited(3000, least=10)  # Training steps
    requests: int = limited(2000, least=0)  # Requests to the server; 0: training alone
    clients: int = limited(16, least=1)  # That ask at the same time
    batch_size: int = limited(2, least=1)
    data_root_dir: str = str(ROOT / "tests" / "golden" / "rlds")  # RLDS data with libero_spatial_no_noops
    out: str = "benchmarks/results/soak.json"  # Results file


@dataclass
class Watch:
    """Samples a process and all that it starts, once a second: bytes, open files, threads, processes."""

    pid: int
    samples: list[dict[str, int]] = field(default_factory=list)
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1):
            with contextlib.suppress(psutil.Error):  # It may end at any time.
                self.samples.append(self.sample())

    def sample(self) -> dict[str, int]:
        """Count what the process and its descendants hold now."""
        top = psutil.Process(self.pid)
        family = [top, *top.children(recursive=True)]
        self.seen |= {process.pid: process for process in family}
        memory = [process.memory_info() for process in family]
        return {
            "anonymous_bytes": sum(usage.rss - usage.shared for usage in memory),
            "open_files": sum(process.num_fds() for process in family),
            "threads": sum(process.num_threads() for process in family),
            "processes": len(family),
        }

    def left(self) -> list[str]:
        """Processes that still run."""
        return [f"process {process.pid}" for process in self.seen.values() if process.is_running()]

    def compare(self) -> dict[str, Any]:
        """Medians over the second and the last fifth, and the growth between them."""
        fifth = len(self.samples) // 5
        if not fifth:
            raise UsageError("--steps, --requests: over in 5 seconds; accepted: more, to compare early with late")
        early, late = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        report: dict[str, Any] = {"samples": len(self.samples)}
        for name in early[0]:
            before, after = (statistics.median(row[name] for row in part) for part in (early, late))
            report[name] = {"second_fifth": before, "last_fifth": after, "growth": round(after / before - 1, 4)}
        return report


def main(config: SoakConfig) -> int:
    """Train, serve, print what grew or stayed, write the results; returns 1 where something did."""
    from benchmarks.memory_probe import machine, write_results

    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        results["training"] = train(config, folder)
        if config.requests:
            results["serving"] = serve(config, folder)
    faults = [
        f"{part}: {fault}" for part in ("training", "serving") for fault in results.get(part, {}).get("faults", ())
    ]
    write_results(config.out, "soak", vars(config), {**results, "faults": faults})
    print("\n".join(faults) or "flat: nothing grew, nothing was left behind")
    return int(bool(faults))


def _start(script: str, folder: Path, words: Sequence[str], output: Any) -> subprocess.Popen[str]:
    """A command in a process of its own whose temporary files go to `folder`/tmp."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # A cache of torch's, meant to stay.
    command = [sys.executable, str(ROOT / "vla-scripts" / script), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def train(config: SoakConfig, folder: Path) -> dict[str, Any]:
    """Run `finetune.py` to its end."""
    flags = {
        "vla_path": WEIGHTS / "student",
        "vggt_path": WEIGHTS / "teacher",
        "recipe": "rocket",
        "data_root_dir": shutil.copytree(config.data_root_dir, folder / "data"),  # An index is written beside it.
        "dataset_name": "libero_spatial_no_noops",
        "run_root_dir": folder / "runs",
        "run_id_override": "run",
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": config.batch_size,
        "max_steps": config.steps,
        "save_freq": max(1, config.steps // 10),
        "keep_checkpoints": 2,
        "num_workers": 1,
        "lora_rank": 4,
        "mixed_precision": "no",
        "trackers": "none",
    }
    began = time.perf_counter()
    with (folder / "training.log").open("w") as log:
        process = _start("finetune.py", folder, _words(flags), log)
        with Watch(process.pid) as watch, _ended(process):
            code = process.wait()
    if code:
        raise RuntimeError(f"finetune.py ended with {code}: {(folder / 'training.log').read_text()[-2000:]}")
    report = {"steps": config.steps, "seconds": round(time.perf_counter() - began), **watch.compare()}
    kept = sorted(path.name for path in (folder / "runs").iterdir())
    report["kept"] = kept
    stray = [name for name in kept if not re.fullmatch(r"run|run--\d+_chkpt", name)]
    report["faults"] = [*_faults(report), *watch.left(), *_temporary(folder), *stray]
    return report


def serve(config: SoakConfig, folder: Path) -> dict[str, Any]:
    """Run `deploy.py` on the last checkpoint, ask it from many clients, and stop it."""
    checkpoint = folder / "runs" / f"run--{config.steps}_chkpt"
    flags = {"pretrained_checkpoint": checkpoint, "port": 0, "num_images_in_input": 2, "use_proprio": True}
    share = [len(range(client, config.requests, config.clients)) for client in range(config.clients)]
    process = _start("deploy.py", folder, _words(flags), subprocess.PIPE)
    with _ended(process):
        port = _port(process)
        before = Watch(process.pid).sample()
        began = time.perf_counter()
        with Watch(process.pid) as watch, ThreadPoolExecutor(config.clients) as pool:
            list(pool.map(lambda client: _ask(port, client, share[client]), range(config.clients)))
        seconds = time.perf_counter() - began
        time.sleep(3)  # Connections close.
        after = Watch(process.pid).sample()
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    report = {"requests": sum(share), "clients": config.clients, "seconds": round(seconds), **watch.compare()}
    report |= {"open_files_before": before["open_files"], "open_files_after": after["open_files"], "exit_code": code}
    report["faults"] = [*_faults(report), *watch.left(), *_temporary(folder)]
    if after["open_files"] > before["open_files"] + 1:
        report["faults"].append(f"{after['open_files'] - before['open_files']} open files beyond those at the start")
    return report


def _words(flags: Mapping[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stop the process where the block is left early."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _port(process: subprocess.Popen[str]) -> int:
    """The port that the server says it listens on; what it prints later is read and dropped."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if match := re.search(r"serving .* at http://[^:]+:(\d+)", line):
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
            return int(match[1])
    raise RuntimeError(f"deploy.py did not start: {''.join(said)[-2000:]}")


def _ask(port: int, client: int, count: int) -> None:
    """Requests of one client, by HTTP or by openpi's protocol, with a new connection now and then."""
    import numpy as np

    from experiments.robot.serving.client import PolicyClient, WebSocketPolicyClient

    rng = np.random.default_rng(client)
    for first in range(0, count, REQUESTS_A_CONNECTION):
        with WebSocketPolicyClient(f"ws://127.0.0.1:{port}") if client % 2 else PolicyClient(port=port) as policy:
            for _ in range(min(REQUESTS_A_CONNECTION, count - first)):
                views = rng.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
                words = {"full_image": views[0], "wrist_image": views[1], "state": rng.normal(size=8)}
                if not np.isfinite(policy.infer({**words, "instruction": "lift it"})).all():
                    raise RuntimeError("the server answered with numbers that are not finite")


def _faults(report: dict[str, Any]) -> list[str]:
    """List the compared medians that grew."""
    grew = []
    for name in ("anonymous_bytes", "open_files", "threads", "processes"):
        early, late = report[name]["second_fifth"], report[name]["last_fifth"]
        if late > early * (1 + MOST_GROWTH):
            grew.append(f"{name} grew from {early} to {late}")
    return grew


def _temporary(folder: Path) -> list[str]:
    left = [f"temporary file {path.name}" for path in (folder / "tmp").iterdir()]
    shutil.rmtree(folder / "tmp")
    return left


if __name__ == "__main__":
    run(SoakConfig, main)
