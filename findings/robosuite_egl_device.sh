#!/usr/bin/env bash
# Package: robosuite 1.4.0, the release that LIBERO is made for (with mujoco 3.3.7).
# Expected: a process may compute on one GPU and draw on another. CUDA_VISIBLE_DEVICES lists CUDA's devices, by number or by
#   UUID; MUJOCO_EGL_DEVICE_ID counts the devices of EGL, which CUDA_VISIBLE_DEVICES does not hide.
# What happens: `import robosuite` looks the EGL number up as a piece of text in CUDA_VISIBLE_DEVICES. Numbers 3 and 0 end in
#   an AssertionError, and so does a UUID without that digit. EGL device 3 passes beside CUDA device 13.
# Why it matters here: schedulers set CUDA_VISIBLE_DEVICES for each process, often as UUIDs. An evaluation that gives every
#   process a GPU to draw on then fails while it imports, though nothing is wrong with the machine.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet robosuite==1.4.0 mujoco==3.3.7 numpy==2.4.6 numba==0.68.1 scipy==1.17.1 \
  pillow==13.0.0 opencv-python-headless==5.0.0.93 termcolor==3.3.0
"$work/venv/bin/python" - <<'PY'
import os
import subprocess
import sys

UUID = "GPU-5d2c4f9e-7a6b-4c8d-9e2f-4a5b6c7d8e9f"


def outcome(cuda, egl):
    """How `import robosuite` ends with these devices."""
    devices = {"CUDA_VISIBLE_DEVICES": cuda, "MUJOCO_EGL_DEVICE_ID": egl}
    command = [sys.executable, "-c", "import robosuite.utils.binding_utils"]
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True, check=False)
    asserted = "MUJOCO_EGL_DEVICE_ID needs to be set" in done.stderr
    return "AssertionError" if asserted else "imported" if done.returncode == 0 else done.stderr[-200:]


seen = {pair: outcome(*pair) for pair in (("3", "3"), ("3", "0"), (UUID, "0"), ("13", "3"))}
for (cuda, egl), ending in seen.items():
    print(f"CUDA_VISIBLE_DEVICES={cuda} MUJOCO_EGL_DEVICE_ID={egl}: {ending}")
print(f"seen: {', '.join(seen.values())}")
sys.exit(0 if list(seen.values()) == ["imported", "AssertionError", "AssertionError", "imported"] else 1)
PY
