#!/usr/bin/env bash
# Package: accelerate 1.15.0 (accelerate launch).
# Expected: on a machine without a GPU, accelerate launch --num_processes 2 starts two processes, or says that it does not.
# What happens: it starts one, without a rank, and says nothing of it; so does --cpu --num_processes 2. --multi_gpu, on that
#   same machine, starts two.
# Why it matters here: a run that was meant for two processes trains half of its global batch.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet accelerate==1.15.0 "torch==2.14.1"
echo 'import os; open(os.path.join(os.environ["OUT"], str(os.getpid())), "w").close()' > "$work/script.py"
seen=()
for flags in "--num_processes 2" "--cpu --num_processes 2" "--multi_gpu --num_processes 2"; do
    export OUT=$(mktemp -d "$work/out.XXXX") CUDA_VISIBLE_DEVICES= HOME=$work
    "$work/venv/bin/accelerate" launch $flags "$work/script.py" > /dev/null 2>&1
    seen+=("$(ls "$OUT" | wc -l)")
    echo "accelerate launch $flags: ${seen[-1]} processes"
done
echo "seen: ${seen[*]} processes started"
[ "${seen[*]}" = "1 1 2" ]
