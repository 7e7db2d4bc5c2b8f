"""CPU time and memory of a training step: this build, a plain step written here, and an earlier build, in one run.

    python benchmarks/step.py                           mini and mid-size models; ten minutes on two cores
    python benchmarks/step.py --earlier ../earlier      also a checkout of an earlier commit

Ways of doing the same step (same weights, same inputs) run in processes of their own, one thread each, that are asked
in turns, so that what else the machine does falls on all. A step is targets, forward, backward and AdamW. Ratios are
of medians. The teacher of the mini models sees 84 pixels, that of the mid-size ones 518.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_probe import machine, write_results
from benchmarks.workers import Worker, commit_of
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.flags import limited

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class StepConfig:
    earlier: str = ""  # Checkout of an earlier commit to measure beside this one
    rounds: int = limited(12, least=1)  # Steps of each way, in turns
    cases: str = ""  # Semicolon list of cases; default: all
    out: str = str(ROOT / "benchmarks" / "results" / "step.json")  # Results file


def measure(ways: dict[tuple[str, str], tuple[str, Path]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """All ways of all cases in turns: medians of CPU milliseconds, growth of memory, first loss, by case and way."""
    workers = {key: Worker("step_worker.py", key[0], way, build=build) for key, (way, build) in ways.items()}
    times: dict[tuple[str, str], dict[str, list[float]]] = {key: {} for key in workers}
    for _ in range(rounds):
        for part in ("step", "targets"):
            for key, worker in workers.items():
                if part == "step" or "no alignment" not in key[0]:
                    times[key].setdefault(part, []).append(worker.ask(part))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for (case, name), worker in workers.items():
        parts = times[case, name].items()
        medians = {f"{part}_ms": round(1e3 * statistics.median(values), 1) for part, values in parts}
        numbers = {**medians, "growth_mb": round(worker.first["growth_mb"], 1), "loss": worker.first["loss"]}
        results.setdefault(case, {})[name] = numbers
        worker.close()
    return results


def table(results: dict[str, dict[str, dict[str, float]]], base: str) -> str:
    """Markdown: every number of this build over that of `base`."""
    lines = [f"| this build over {base} | step | targets | memory | loss differs by |", "|---|---:|---:|---:|---:|"]
    for case, ways in results.items():
        if base not in ways:
            continue
        this, other = ways["this build"], ways[base]
        ratios = [f"{this[n] / other[n]:.2f}" if n in this else "" for n in ("step_ms", "targets_ms", "growth_mb")]
        lines.append(f"| {case} | {' | '.join(ratios)} | {abs(this['loss'] - other['loss']):.0e} |")
    return "\n".join(lines)


def main(config: StepConfig) -> None:
    """Measure, print, write the results."""
    from benchmarks.step_models import CASES

    chosen = [name.strip() for name in config.cases.split(";") if name.strip()] or list(CASES)
    for name in chosen:
        if name not in CASES:
            raise UsageError(f"--cases: {name!r} found; accepted: {'; '.join(CASES)}")
    facts, results = machine(), dict[str, Any]()
    commit = commit_of(config.earlier) if config.earlier else None
    for models in ("mini", "mid"):
        ways = {}
        for case, sizes in CASES.items():
            if sizes.models != models or case not in chosen:
                continue
            ways[case, "this build"] = ("build", ROOT)
            if config.earlier:
                ways[case, "earlier build"] = ("build", Path(config.earlier).resolve())
            if sizes.aligned and not sizes.stored:
                ways[case, "plain step"] = ("plain", ROOT)
        results |= measure(ways, config.rounds)
    print(json.dumps(results, indent=1))
    shares = {
        models: 1 - results[f"{models}, no alignment"]["this build"]["step_ms"] / stored["this build"]["step_ms"]
        for models in ("mini", "mid")
        if (stored := results.get(f"{models}, stored features")) and f"{models}, no alignment" in results
    }
    print("\n".join(table(results, base) for base in ("earlier build", "plain step")))
    print("alignment with stored features, share of the step:", shares)
    content = {"machine": facts, "earlier": commit, "cases": results, "alignment_share_of_stored_step": shares}
    flags = {name: value for name, value in vars(config).items() if name != "earlier"}
    write_results(config.out, "step", flags, content)


if __name__ == "__main__":
    run(StepConfig, main)
