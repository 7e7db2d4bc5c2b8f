#!/usr/bin/env bash
# Package: robosuite 1.5.2 (with mujoco 3.3.7), given a controller's settings from 1.4.
# Expected: refactor_composite_controller_config, which turns settings of 1.4 into those of 1.5, keeps what they mean, or
#   refuses what it does not know.
# What happens: control_delta of 1.4 is input_type in 1.5. The conversion copies the old name, and the controller takes any
#   name that it does not know without a word. "control_delta": false, absolute poses, becomes delta poses: the target's
#   coordinates are read as steps, and the arm drives away.
# Why it matters here: LIBERO's environments are of 1.4 and move to 1.5 (RoboCasa, newer LIBERO packages). Policies with
#   absolute actions (X-VLA, control_mode "absolute" in LeRobot) then fail in every episode, with no message.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for release in 1.4.0 1.5.2; do
  "${PYTHON:-python3}" -m venv "$work/$release"
  "$work/$release/bin/pip" install --quiet robosuite==$release mujoco==3.3.7 numpy==1.26.4 numba==0.68.1 scipy==1.17.1 \
    pillow==13.0.0 termcolor==3.3.0
done
cat > "$work/reach.py" <<'PY'
import sys

import numpy as np
import robosuite
from robosuite.utils.transform_utils import quat2axisangle

settings = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": False,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
if robosuite.__version__ >= "1.5":
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config

    settings = refactor_composite_controller_config(settings, "Panda", ["right"])
environment = robosuite.make(
    "Lift",
    robots="Panda",
    controller_configs=settings,
    initialization_noise=None,
    has_renderer=False,
    has_offscreen_renderer=False,
    use_camera_obs=False,
    control_freq=20,
)
start = environment.reset()
target = start["robot0_eef_pos"] + [0.1, 0.1, 0.05]
action = np.concatenate([target, quat2axisangle(start["robot0_eef_quat"].copy()), [-1]])
for _ in range(60):
    observation, *_ = environment.step(action)
distance = 100 * float(np.linalg.norm(observation["robot0_eef_pos"] - target))
print(f"robosuite {robosuite.__version__}: 15 cm to go, after 60 steps the hand is {distance:.0f} cm from the target", file=sys.stderr)
print(round(distance))
PY
for release in 1.4.0 1.5.2; do
  "$work/$release/bin/python" "$work/reach.py" > "$work/$release.txt" 2> "$work/$release.errors" \
    || { tail -20 "$work/$release.errors"; exit 1; }
  grep "after 60 steps" "$work/$release.errors"
done
old=$(tail -n 1 "$work/1.4.0.txt") new=$(tail -n 1 "$work/1.5.2.txt")
echo "seen: after 60 steps the hand is $old cm from the target in robosuite 1.4.0 and $new cm in 1.5.2"
[ "$old" -le 5 ] && [ "$new" -ge 30 ]
