#!/usr/bin/env bash
# Package: gym-aloha 0.1.5 (with dm-control 1.0.34, mujoco 3.3.7, gymnasium 1.2.3).
# Expected: observation_width and observation_height set the size of the pictures in an observation, as in the space that the
#   environment declares, and one picture is drawn where an observation holds one.
# What happens: every step draws three pictures of 640 x 480, and the observation holds one of that size, not of its space's.
# Why it matters here: on a CPU, drawing is what a step costs: a policy with pictures of 128 x 128 pays for those that no one
#   sees, at every step and not only where it is asked. So the scene files are used here, and not the environment.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "gym-aloha==0.1.5" "dm-control==1.0.34" "mujoco==3.3.7" "gymnasium==1.2.3"
cat > "$work/draw.py" <<'PY'
import sys
from collections import Counter

import gym_aloha  # noqa: F401
import gymnasium
from dm_control.mujoco import Physics

drawn = Counter()
render = Physics.render


def counted(self, height=240, width=320, *arguments, **named):
    drawn[width, height] += 1
    return render(self, height, width, *arguments, **named)


Physics.render = counted
environment = gymnasium.make(
    "gym_aloha/AlohaTransferCube-v0", obs_type="pixels", observation_width=128, observation_height=128
).unwrapped
environment.reset(seed=0)
drawn.clear()
steps = 5
for _ in range(steps):
    observation, *_ = environment.step(environment.action_space.sample())
space, shape = environment.observation_space["top"].shape, observation["top"].shape
print(f"declared: one picture of shape {space}; in the observation: {len(observation)} of shape {shape}")
for (width, height), count in sorted(drawn.items()):
    print(f"drawn: {count / steps:g} of {width} x {height} a step")
print(f"seen: asked for {space}, a step gives {shape} and draws {drawn[640, 480] / steps:g} of them")
sys.exit(0 if shape != space and drawn[640, 480] >= 3 * steps else 1)
PY
MUJOCO_GL="${MUJOCO_GL:-egl}" "$work/venv/bin/python" "$work/draw.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
