#!/usr/bin/env bash
# Package: torch 2.14.1 (FSDP2, fully_shard).
# Expected: with set_requires_gradient_sync(False), as in all but the last batch of an accumulated step, the backward pass
#   leaves out a group of weights that the forward pass did not use, as it does with synchronization.
# What happens: with a reduce_dtype (mixed precision) it raises AttributeError: 'FSDPParam' object has no attribute
#   '_unsharded_param'. Without a reduce_dtype, or with synchronization, nothing is wrong.
# Why it matters here: OpenVLA's last vision block takes no part in the loss, and accelerate accumulates gradients this way.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.14.1" numpy
cat > "$work/step.py" <<'PY'
import sys

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

torch.distributed.init_process_group("gloo")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def backward(sync, reduce_dtype):
    model = Model()
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for part in (model.used, model.unused, model):
        fully_shard(part, mp_policy=policy)
    model.set_requires_gradient_sync(sync)
    try:
        model(torch.ones(2, 4)).sum().backward()
    except AttributeError as error:
        return str(error).split(".")[0]
    return "fine"


seen = {(sync, dtype): backward(sync, dtype) for sync in (True, False) for dtype in (None, torch.float32)}
if torch.distributed.get_rank() == 0:
    for (sync, dtype), result in seen.items():
        print(f"gradient sync {sync}, reduce_dtype {dtype}: {result}")
    print(f"seen: without synchronization, with a reduce_dtype: {seen[False, torch.float32]}")
broken = seen.pop((False, torch.float32))
sys.exit(0 if "_unsharded_param" in broken and set(seen.values()) == {"fine"} else 1)
PY
"$work/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/step.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
