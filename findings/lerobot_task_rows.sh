#!/usr/bin/env bash
# Package: lerobot 0.6.1 (LeRobotDataset, format v3.0, meta/tasks.parquet).
# Expected: a frame's instruction is the row of tasks.parquet whose task_index is the frame's.
# What happens: it is the row at that position; the column task_index is not read. In a table with its rows in another
#   order, such as sorted by name, every frame gets another task's sentence, and nothing is said. The sentence itself is
#   taken from the index that pandas notes in the file: where a column "task" was written by pyarrow or polars (as
#   forge-robotics 0.2.0 does), the instruction is the number of the row.
# Why it matters here: instructions are the only thing that tells LIBERO's tasks apart. Training runs, the loss falls, and
#   the policy learns the wrong sentences. Here sentences are looked up by task_index, in either form of the file.
# Seen on 2026-11-29. LeRobot 0.6 needs Python 3.12 or newer; PYTHON names one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "lerobot[dataset]==0.6.1" torch==2.11.0 datasets==4.8.5 pandas==2.3.3 pyarrow==26.0.1
cat > "$work/tasks.py" <<'PY'
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset

root, tasks = Path(sys.argv[1]), ["pick up the bowl", "close the drawer", "open the drawer"]
features = {"action": {"dtype": "float32", "shape": (1,), "names": ["x"]}}
data = LeRobotDataset.create(repo_id="me/tasks", fps=10, root=root / "stock", features=features, use_videos=False)
for task in tasks:
    for _ in range(5):
        data.add_frame({"action": np.zeros(1, np.float32), "task": task})
    data.save_episode()
data.finalize()
table = pd.read_parquet(root / "stock/meta/tasks.parquet")
for name in ("sorted", "columns"):
    shutil.copytree(root / "stock", root / name)
table.sort_index().to_parquet(root / "sorted/meta/tasks.parquet")
columns = pa.table({"task_index": table["task_index"].tolist(), "task": table.index.tolist()})
pq.write_table(columns, root / "columns/meta/tasks.parquet")
sentences = {}
for name in ("stock", "sorted", "columns"):
    written = pd.read_parquet(root / name / "meta/tasks.parquet").reset_index().set_index("task_index")["task"].to_dict()
    frames = [LeRobotDataset("me/tasks", root=root / name)[start] for start in (0, 5, 10)]
    sentences[name] = [frame["task"] for frame in frames]
    print(f"{name}: file {written}; frames with task_index 0, 1, 2: {sentences[name]}")
right = {name: sum(given == task for given, task in zip(sentences[name], tasks)) for name in sentences}
print("seen: right instructions of 3: " + ", ".join(f"{name} {count}" for name, count in right.items()))
sys.exit(0 if right == {"stock": 3, "sorted": 0, "columns": 0} else 1)
PY
HF_HUB_OFFLINE=1 HOME=$work "$work/venv/bin/python" "$work/tasks.py" "$work/data" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
