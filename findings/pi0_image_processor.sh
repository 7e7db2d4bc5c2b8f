#!/usr/bin/env bash
# Package: transformers 5.24.0 (PI0ImageProcessor), beside openpi-client 0.1.2 (image_tools.resize_with_pad).
# Expected: the processor of PI0 prepares pictures as openpi does, on whose preparation the pi0 checkpoints were trained:
#   resized to fit, in the middle, black around.
# What happens: PI0ImageProcessor puts the picture at the top (or left) and fills the rest with mid grey (0.0 on the scale
#   from -1 to 1). A camera of 240 x 320 stands 28 of 224 rows too high; square cameras show nothing of it.
# Why it matters here: RoboTwin's and ALOHA's cameras are 240 x 320 and 480 x 640. A pi0 policy evaluated through the
#   processor sees every object two patches away from where it was in training; patches of teacher and student must be
#   cut the same way, too.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 numpy==2.4.6 pillow==13.0.0
"$work/venv/bin/pip" install --quiet --no-deps openpi-client==0.1.2
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
from openpi_client.image_tools import resize_with_pad
from transformers import PI0ImageProcessor

white = np.full((240, 320, 3), 255, np.uint8)
pixels = PI0ImageProcessor()(images=[white], return_tensors="pt")["pixel_values"].reshape(3, 224, 224).numpy()
rows_hf = pixels.mean(axis=(0, 2))
rows_openpi = resize_with_pad(white, 224, 224).mean(axis=(1, 2)) / 127.5 - 1


def described(rows):
    picture = np.flatnonzero(rows > 0.9)
    padding = sorted({round(float(value), 2) for value in rows if value <= 0.9})
    return f"picture in rows {picture[0]} to {picture[-1]}, padding {padding}"


print(f"openpi-client: {described(rows_openpi)}")
print(f"seen: PI0ImageProcessor: {described(rows_hf)}")
as_recorded = described(rows_hf) == "picture in rows 0 to 167, padding [0.0]"
sys.exit(0 if as_recorded and described(rows_openpi) == "picture in rows 28 to 195, padding [-1.0]" else 1)
PY
