#!/usr/bin/env bash
# Package: accelerate 1.15.0 with torch 2.14.1 (FSDP2).
# Expected: with FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True), a forward pass without gradients
#   frees what it gathered of every group of weights, the root's too, as torch's fully_shard(model, reshard_after_forward=True)
#   does; the next forward pass then gathers what the shards hold by now.
# What happens: accelerate leaves that setting out for the root module, and torch's default for a root is, as documented, to
#   keep the gathered weights. Shards that are changed in place afterwards are ignored by the next forward pass, without an
#   error, until reshard() is called.
# Why it matters here: an evaluation with averaged weights (EMA) swaps them into the shards between forward passes; for the
#   weights of the root, it would measure those before the swap.
# Seen on 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet accelerate==1.15.0 "torch==2.14.1" numpy
cat > "$work/forward.py" <<'PY'
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard

accelerator = Accelerator(cpu=True)
# On a CPU accelerate has to be told that it shards.
for state in (accelerator.state, PartialState()):
    state.distributed_type = DistributedType.FSDP
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)


def ones():
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(model.weight)
    return model


def prepared(model):
    return accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]


@torch.no_grad()
def outputs(model):
    """Of weights of 1, after the shards were filled with 2, and after reshard(): 4, 8 and 8 is right."""
    shard = model.weight.to_local()
    before = model(torch.ones(1, 4))[0, 0].item()
    shard.fill_(2.0)
    after = model(torch.ones(1, 4))[0, 0].item()
    model.reshard()
    return before, after, model(torch.ones(1, 4))[0, 0].item()


seen = {
    "torch, reshard_after_forward=True": outputs(fully_shard(ones(), reshard_after_forward=True)),
    "torch, reshard_after_forward not given": outputs(fully_shard(ones())),
    "accelerate, reshard_after_forward=True": outputs(prepared(ones())),
}
if accelerator.is_main_process:
    for name, (before, after, resharded) in seen.items():
        print(f"{name}: {before} before the change, {after} after it, {resharded} after reshard()")
    print(f"seen: asked to reshard, accelerate gives {seen['accelerate, reshard_after_forward=True'][1]} instead of 8.0")
accelerator.end_training()
sys.exit(0 if list(seen.values()) == [(4, 8, 8), (4, 4, 8), (4, 4, 8)] else 1)
PY
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
"$work/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/forward.py" 2> "$work/errors" || { tail -20 "$work/errors"; exit 1; }
