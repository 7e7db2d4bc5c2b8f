"""Throw wrong flags and damaged files at the commands: refused in one line, with exit code 2, and nothing is lost.

    python benchmarks/fuzz.py                       300 wrong configurations, 200 damaged files, seed 0, CPU, minutes
    python benchmarks/fuzz.py --seed 7 --only 41    case 41 of another seed again

It makes its inputs first: runs of the mini models with checkpoints, a feature store, results of an evaluation, and data
in every layout that is read.
Commands run as `python FILE` would run them, in this process. A case fails where the exit code is not 2, the last line
on standard error is no `error: ...` or not the only one, or an input changed. Ends with 1 where a case failed.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import runpy
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fuzz_cases import Case, damaged_files, wrong_configurations
from benchmarks.time_limit import time_limit
from prismatic.util.cli import run
from prismatic.util.flags import limited

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_CASE = 120


@dataclass
class FuzzConfig:
    configurations: int = limited(300, least=0)  # Wrong command lines and configuration files
    inputs: int = limited(200, least=0)  # Damaged files
    seed: int = limited(0, least=0)  # Of the cases
    only: int | None = limited(None, least=0)  # The number of one case
    out: str = "benchmarks/results/fuzz.json"  # Results file


@dataclass
class Outcome:
    code: int | None = None  # None: the command raised
    errors: list[str] = field(default_factory=list)  # Lines on standard error
    raised: str = ""


def main(config: FuzzConfig) -> int:
    """Make inputs, run every case, print those that failed, write the results; returns 1 where some did."""
    from benchmarks.fuzz_inputs import prepare
    from benchmarks.memory_probe import machine, write_results

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        work = Path(name)
        prepare(work / "in", invoke)
        rng = random.Random(config.seed)
        cases = wrong_configurations(rng, work, config.configurations) + damaged_files(rng, work, config.inputs)
        failures = []
        for number, case in enumerate(cases):
            if config.only in (None, number) and (faults := try_case(case, work)):
                failures.append({"number": number, "case": case.describe(work), "faults": faults})
                print(f"{number}: {case.describe(work)}\n    " + "\n    ".join(faults), flush=True)
    kinds = Counter(case.kind for case in cases)
    content = {"machine": machine(), "cases": len(cases), "kinds": dict(kinds), "failures": failures}
    write_results(config.out, "fuzz", vars(config), content)
    print(f"{len(cases)} cases, {len(failures)} failed")
    return int(bool(failures))


def try_case(case: Case, work: Path) -> list[str]:
    """Run a case on inputs that are put back afterwards; returns what went wrong."""
    scratch = work / "out"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with case.applied(work):
        before = snapshot(work / "in")
        outcome = invoke(case.words)
        faults = judge(outcome, harmless=case.harmless)
        if changed := sorted(set(before.items()) ^ set(snapshot(work / "in").items())):
            faults.append(f"inputs changed: {', '.join(sorted({name for name, _ in changed}))}")
    finished = [path.name for path in scratch.rglob("*") if path.name.endswith("_chkpt") or ".tmp" in path.name]
    if finished and outcome.code:
        faults.append(f"written: {', '.join(finished)}")
    return faults


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of the files of a folder; what readers keep beside data does not count."""
    kept = ("frame_index", "dataset_statistics_", "lerobot_index", "lerobot_images")
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(kept)]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def judge(outcome: Outcome, *, harmless: bool) -> list[str]:
    """List what is wrong with an outcome; `harmless`: the command may as well not need what is wrong."""
    if outcome.raised:
        return [outcome.raised]
    if outcome.code == 0 and harmless:
        return []
    faults = [] if outcome.code == 2 else [f"exit code {outcome.code} found; accepted: 2"]
    said = [line for line in outcome.errors if line.startswith("error: ")]
    if len(said) != 1 or outcome.errors[-1] != said[0]:
        faults.append(f"one line 'error: ...' expected at the end; said: {outcome.errors[-3:]}")
    elif not said[0].isprintable():
        faults.append(f"unprintable: {said[0]!r}")
    return faults


def invoke(words: Sequence[str]) -> Outcome:
    """Run a script (a path) or a module (a dotted name) with its words, as Python's command line would."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # Of the command before.
    outcome, errors = Outcome(), io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")  # As standard error is.
    argv, sys.argv = sys.argv, list(words)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), time_limit(SECONDS_A_CASE):
            if words[0].endswith(".py"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            outcome.code = 0
    except SystemExit as leaving:
        outcome.code = int(leaving.code or 0)
    except BaseException as error:  # A defect is what is looked for.
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        inner = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if str(ROOT) in frame.filename]
        outcome.raised = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} at {' '.join(inner[-3:])}"
    finally:
        sys.argv = argv
    errors.seek(0)
    outcome.errors = [line for line in errors.read().splitlines() if line.strip()]
    return outcome


if __name__ == "__main__":
    run(FuzzConfig, main)
