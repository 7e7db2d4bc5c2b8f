#!/usr/bin/env bash
# Package: lerobot 0.4.4 (LeRobotDataset, meta/stats.json).
# Expected: q01 and q99 in stats.json are quantiles of the data set: 1% of the values lie below q01.
# What happens: they are means of the episodes' quantiles. min, max, mean and std are those of the data. Where episodes
#   differ, as tasks do, the range is far too narrow: here q01 to q99 holds a tenth of the values instead of 98%.
# Why it matters here: q01 and q99 normalize actions (OpenVLA-OFT, pi0.5). Statistics taken from stats.json would clip or
#   stretch most of the actions, and say nothing.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lerobot==0.4.4
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HOME=$work "$work/venv/bin/python" - "$work/data" <<'PY'
import json
import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

root = Path(sys.argv[1])
features = {"action": {"dtype": "float32", "shape": (1,), "names": ["x"]}}
data = LeRobotDataset.create(repo_id="me/ten_tasks", fps=10, root=root, features=features, use_videos=False)
generator, values = np.random.default_rng(0), []
for task in range(10):
    for _ in range(200):
        values.append(np.float32(task + generator.uniform()))
        data.add_frame({"action": np.array([values[-1]], np.float32), "task": f"task {task}"})
    data.save_episode()
data.finalize()
stored = json.loads((root / "meta" / "stats.json").read_text())["action"]
low, high = stored["q01"][0], stored["q99"][0]
true_low, true_high = np.quantile(values, [0.01, 0.99])
inside = np.mean([low <= value <= high for value in values])
print(f"stats.json: min {stored['min'][0]:.2f}, max {stored['max'][0]:.2f}; data: {min(values):.2f}, {max(values):.2f}")
print(f"quantiles of the data: {true_low:.2f} and {true_high:.2f}")
print(f"seen: stats.json has q01 {low:.1f} and q99 {high:.1f}, with {100 * inside:.0f}% of the values between them")
sys.exit(0 if abs(low - 4.5) < 0.1 and abs(high - 5.5) < 0.1 and inside < 0.12 else 1)
PY
