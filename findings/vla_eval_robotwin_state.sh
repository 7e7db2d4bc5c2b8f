#!/usr/bin/env bash
# Package: vla-eval 0.8.0 (RoboTwinBenchmark with the model server for openpi).
# Expected: the benchmark declares an observation "state" of joint positions and the server one too, so that the policy gets
#   the joints, or an error says that they are missing.
# What happens: the benchmark sends the joints as "joint_state". The server looks for "states" and "state", finds neither
#   and hands zeros to the policy, without a word. (Its lines are those of the server for OpenVLA-OFT; LeRobot's leaves the
#   state out.) Of the three cameras it passes on two: the right wrist is dropped.
# Why it matters here: pi0 in RoboTwin predicts joint angles relative to the state. With a state of zeros every action is
#   an absolute pose near zero, whatever the arms do, and the run ends with a success rate as if all was well.
# Seen on 2026-11-29. In openpi's place stands a recorder; neither openpi nor RoboTwin takes part.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet vla-eval==0.8.0 numpy==2.4.6
cat > "$work/state.py" <<'PY'
import sys
from types import ModuleType, SimpleNamespace

import numpy as np

received = {}


def infer(observation):
    received.update(observation)
    return {"actions": np.zeros((50, 14), np.float32)}


policies, training = ModuleType("openpi.policies"), ModuleType("openpi.training")
policies.policy_config = SimpleNamespace(create_trained_policy=lambda config, checkpoint: SimpleNamespace(infer=infer))
training.config = SimpleNamespace(get_config=lambda name: None)
sys.modules |= {"openpi": ModuleType("openpi"), "openpi.policies": policies, "openpi.training": training}

from vla_eval.benchmarks.robotwin.benchmark import RoboTwinBenchmark  # noqa: E402
from vla_eval.model_servers.pi0 import Pi0ModelServer  # noqa: E402

joints = np.linspace(-1, 1, 14)
cameras = ("head_camera", "left_camera", "right_camera")
pictures = {camera: {"rgb": np.full((240, 320, 3), 50 * i, np.uint8)} for i, camera in enumerate(cameras)}
raw = {"observation": pictures, "joint_action": {"vector": joints}}
benchmark = RoboTwinBenchmark("move_playingcard_away")
observation = benchmark.make_obs(raw, {"name": "move_playingcard_away", "instruction": "Move the card away."})
server = Pi0ModelServer(checkpoint="a folder", state_dim=14, chunk_size=50)
server.predict(observation, None)
print(f"declared: benchmark {sorted(benchmark.get_observation_spec())}, server {sorted(server.get_observation_spec())}")
print(f"sent: {sorted(observation)}")
state = received[server.state_key]
views = [name for name, value in received.items() if np.ndim(value) == 3]
print(f"joints {joints.round(1).tolist()}")
print(f"seen: the policy gets the state {sorted(set(state.tolist()))} of length {len(state)}, and {len(views)} of 3 cameras")
sys.exit(0 if len(state) == 14 and not state.any() and len(views) == 2 else 1)
PY
"$work/venv/bin/python" "$work/state.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
