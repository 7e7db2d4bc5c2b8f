"""Chooses the engine of a launch: by the flag `--shard`, or by what accelerate's launcher was told."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from prismatic.training.config import Shard
from prismatic.training.engine import Engine, FsdpEngine, say_sharded
from prismatic.training.precision import make_accelerator, resolve_precision
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json


def make_engine(
    shard: Shard, mixed_precision: str, *, trains_all: bool, unused_parameters: bool, **options: Any
) -> Engine:
    """The engine that a flag or the launcher asks for, over the processes of the launch.

    Args:
        shard: "auto" is the launcher's choice (accelerate's --use_fsdp and --use_deepspeed), else none.
        mixed_precision: "auto", "no" or "bf16".
        trains_all: the base model's weights train, so bf16 is gathered of their float32.
        unused_parameters: some of what trains takes no part in the loss.
        options: further arguments of accelerate's Accelerator.

    Raises:
        UsageError: the flag and the launcher disagree, or the launch has no such engine.
    """
    chosen = resolve_shard(shard)
    if chosen == "none" or int(os.environ.get("WORLD_SIZE") or 1) == 1:
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)]
        return Engine(make_accelerator(mixed_precision, kwargs_handlers=handlers, **options))
    if chosen != "fsdp":
        if importlib.util.find_spec("deepspeed") is None:
            raise UsageError(f'--shard: {chosen} found; accepted: fsdp, or after pip install -e ".[deepspeed]"')
        from prismatic.training.zero import ZeroEngine  # An extra, and slow to import.

        return ZeroEngine(int(chosen[-1]), mixed_precision, **options)
    plugin = _fsdp_plugin(mixed_precision, trains_all=trains_all)
    accelerator = make_accelerator(mixed_precision, fsdp_plugin=plugin, **options)
    if accelerator.distributed_type != DistributedType.FSDP:
        say_sharded(accelerator, DistributedType.FSDP)
        accelerator.state.fsdp_plugin = plugin
    return FsdpEngine(accelerator)


def _fsdp_plugin(mixed_precision: str, *, trains_all: bool) -> Any:
    """accelerate's settings of FSDP2: those of its environment, but for the groups and the types."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Autocast casts what a layer takes. Adapters and heads stay float32, as without sharding.
    gathered = torch.bfloat16 if trains_all and resolve_precision(mixed_precision) == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    os.environ["FSDP_VERSION"] = "2"  # Beside ACCELERATE_USE_FSDP, which accelerate sets of itself.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,
    )
    if plugin.activation_checkpointing:
        raise UsageError(
            "accelerate's configuration: fsdp_activation_checkpointing found; accepted: --gradient_checkpointing True"
        )
    return plugin


def resolve_shard(flag: Shard) -> Shard:
    """Choose what the flag says or, for "auto", the launcher's environment.

    Raises UsageError: they disagree, or the launcher asks for what is not known here.
    """
    asked = _launchers_choice()
    if flag == "auto":
        return asked or "none"
    if asked and asked != flag:
        raise UsageError(f"--shard: {flag} found, but {asked} in accelerate's configuration; accepted: auto or {asked}")
    return flag


def _launchers_choice() -> Shard | None:
    def says(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("true", "1", "yes")

    if says("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("accelerate's configuration: MEGATRON_LM found; accepted: FSDP (version 2) or DEEPSPEED")
    if says("ACCELERATE_USE_FSDP"):
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise UsageError(f"accelerate's configuration: fsdp_version {version} found; accepted: 2")
        return "fsdp"
    if says("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            stage = str(read_json(Path(file)).get("zero_optimization", {}).get("stage", stage))
        if stage not in ("2", "3"):
            raise UsageError(f"accelerate's configuration: zero_stage {stage} found; accepted: 2 or 3")
        return cast(Shard, f"zero{stage}")
    return None
