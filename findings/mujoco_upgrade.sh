#!/usr/bin/env bash
# Package: mujoco 4.0.0, installed over 3.3.7 in the same environment.
# Expected: `pip install --upgrade mujoco` gives the new release.
# What happens: import mujoco fails and pip check reports nothing. 4.0.0 is in two parts, and the part mujoco-core puts its
#   files into the folder that mujoco 3 owns. pip installs mujoco-core first and then removes mujoco 3, with files of the
#   new part. A fresh environment is fine; the error says how to repair the other.
# Why it matters here: LIBERO's environments are long-lived and pinned to 3.x; the first upgrade breaks them.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for environment in fresh upgraded; do
  "${PYTHON:-python3}" -m venv "$work/$environment"
done
"$work/upgraded/bin/pip" install --quiet mujoco==3.3.7 numpy==2.4.6
"$work/upgraded/bin/python" -c "import mujoco; print('before the upgrade:', mujoco.__version__)"
for environment in fresh upgraded; do
  "$work/$environment/bin/pip" install --quiet --upgrade mujoco==4.0.0 numpy==2.4.6
done
"$work/fresh/bin/python" -c "import mujoco; print('fresh environment:', mujoco.__version__)"
"$work/upgraded/bin/pip" check
output=$("$work/upgraded/bin/python" -c "import mujoco; print('upgraded environment:', mujoco.__version__)" 2>&1 || true)
echo "$output"
ending=$(grep -o "^[A-Za-z]*Error" <<<"$output" | tail -n 1 || echo "no error")
echo "seen: import mujoco after the upgrade: $ending"
[ "$ending" = ImportError ]
