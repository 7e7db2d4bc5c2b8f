#!/usr/bin/env bash
# Package: PyAV 18.1.0, whose wheel brings SVT-AV1 4.1.0, the encoder that LeRobot writes its videos with.
# Expected: encoding a video leaves the process that asks for it as it was.
# What happens: where root runs it (and may change priorities, as in a virtual machine), the first frame makes the calling
#   thread a real-time one, SCHED_FIFO 99, the highest there is. It stays so after the file is closed, and every thread and
#   process that it starts from then on is one, too: loaders, simulators, policy servers, launched trainings.
# Why it matters here: recording or converting a dataset in the process that trains, serves or evaluates afterwards. Real-time
#   threads do not take turns: two that wait for one of MKL's spin locks on two cores keep its owner from running, and nothing
#   else on the machine gets on. Remedy: keep os.sched_getscheduler(0) and os.sched_getparam(0) before, set them again after.
# Seen on 2026-11-29.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "only root may become real-time: run this as root" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import os
import subprocess
import sys

os.environ["SVT_LOG"] = "0"  # Errors alone.
import av
import numpy as np

NAMES = {os.SCHED_OTHER: "ordinary", os.SCHED_FIFO: "real-time"}
seen = [NAMES[os.sched_getscheduler(0)]]
for codec in ("libx264", "libsvtav1"):
    with av.open(f"{codec}.mp4", "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for step in range(5):
            frame = np.full((64, 64, 3), 20 * step, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    seen.append(NAMES[os.sched_getscheduler(0)])
    print(f"after a video of {codec}: {seen[-1]}, priority {os.sched_getparam(0).sched_priority}")
child = "import os; print(os.sched_getscheduler(0) == os.SCHED_FIFO)"
later = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout.strip()
print(f"a process started after it is real-time: {later}")
print(f"seen: {', '.join(seen)}; a later process real-time: {later}")
sys.exit(0 if seen == ["ordinary", "ordinary", "real-time"] and later == "True" else 1)
PY
