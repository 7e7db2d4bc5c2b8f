#!/usr/bin/env bash
# Packages: mujoco 4.0.0 with robosuite 1.4.0, the release that LIBERO is made for.
# Expected: a model's joint type, model.jnt_type[0], compares with mujoco.mjtJoint either way round.
# What happens: numpy.int32 == enumerator is True, enumerator == numpy.int32 is False (both are True up to mujoco 3.10; 3.17
#   is as 4.0). So `type == J` holds and `type in (J,)` does not, and robosuite's first reset ends in a bare AssertionError.
# Why it matters here: `pip install robosuite==1.4.0` takes the newest mujoco. Any code that looks up a joint, geometry or
#   object type in a tuple, a set or a dictionary of enumerators goes the other way in silence.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet robosuite==1.4.0 mujoco==4.0.0 numpy==2.4.6 numba==0.68.1 scipy==1.17.1 \
  pillow==13.0.0 opencv-python-headless==5.0.0.93 termcolor==3.3.0
"$work/venv/bin/python" - <<'PY'
import sys
import traceback

import mujoco
import robosuite

xml = "<mujoco><worldbody><body><joint type='hinge'/><geom size='.1'/></body></worldbody></mujoco>"
kind, hinge = mujoco.MjModel.from_xml_string(xml).jnt_type[0], mujoco.mjtJoint.mjJNT_HINGE
comparisons = f"{kind == hinge}, {hinge == kind}, {kind in (hinge,)}"
print(f"jnt_type == mjJNT_HINGE, mjJNT_HINGE == jnt_type, jnt_type in (mjJNT_HINGE,): {comparisons}")
try:
    robosuite.make("Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False)
    ending = "a reset environment"
except AssertionError as error:
    ending = f"AssertionError({error}) in {traceback.extract_tb(error.__traceback__)[-1].name}"
print(f"seen: {comparisons}; robosuite.make: {ending}")
sys.exit(0 if comparisons == "True, False, False" and ending == "AssertionError() in get_joint_qpos_addr" else 1)
PY
