"""DeepSpeed's ZeRO as an engine: stage 2 divides gradients and optimizer state, stage 3 the weights too.

Not obvious:
- Checkpoints hold the optimizer whole, under the parameters' own order, and not in DeepSpeed's layout: so any engine
  on any number of processes goes on from them.
- Weights and sums stay float32 under autocast, as without DeepSpeed; its own bf16 mode would cast adapters and heads.
- A parameter that takes no part in the loss gets a zero gradient here, and so AdamW's weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from prismatic.training.engine import Engine, Moments, moments_by_name, read_shards, say_sharded
from prismatic.training.precision import make_accelerator, resolve_precision

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """ZeRO stage 2 or 3, through accelerate.

    Args:
        stage: 2 or 3.
        mixed_precision: "auto", "no" or "bf16".
        options: further arguments of accelerate's Accelerator.
    """

    gives_access = False

    def __init__(self, stage: int, mixed_precision: str, **options: Any) -> None:
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations import unset_hf_deepspeed_config

        # The loop divides losses by the batches of a step, and clips; DeepSpeed is told of neither before it trains.
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=1, gradient_clipping=0.0)
        plugin.zero3_init_flag = False
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        accelerator = make_accelerator("no", deepspeed_plugin=plugin, **options)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            say_sharded(accelerator, DistributedType.DEEPSPEED)
            accelerator.state.deepspeed_plugins = {"default": plugin}
            plugin.set_mixed_precision("no")
            plugin.select(_from_accelerator_state=True)
        unset_hf_deepspeed_config()  # Else transformers builds models in parts, which timm and PEFT cannot read.
        super().__init__(accelerator)
        self.sharded = plugin.zero_stage == 3  # A DeepSpeed file of accelerate's configuration wins.
        if resolve_precision(mixed_precision) == "bf16":
            self.compute_dtype = torch.bfloat16
            device = self.accelerator.device.type
            self.accelerator.autocast = lambda: torch.autocast(device, torch.bfloat16)  # type: ignore[method-assign]

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hand both to DeepSpeed."""
        self._trained = [p for p in module.parameters() if p.requires_grad]
        super().prepare(module, optimizer)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The module's own: the optimizer has them flattened. Stage 3 leaves them empty."""
        return dict(zip(self._names, self._trained, strict=True))

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Tell DeepSpeed whether a step ends with this batch."""
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.module.backward(loss)

    def update(self, max_norm: float) -> Tensor | None:
        """DeepSpeed's step, which clips and forgets the gradient by itself."""
        self.module.optimizer.clip_grad = max_norm
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm()) if max_norm > 0 else None

    def held(self) -> list[Tensor]:
        """This process's part of the float32 weights."""
        return [p.detach() for p in self._flat()]

    def weights(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Gathered one by one in stage 3; a tensor under several names (a shared projector's) once."""
        gathered: dict[int, Tensor] = {}
        tensors = {name: value for name, value in self.plain.state_dict(keep_vars=True).items() if wanted(name)}
        for value in tensors.values():
            if id(value) not in gathered:
                with _gathered([value]):
                    gathered[id(value)] = value.detach().cpu().clone() if self.sharded else value.detach()
        return {name: gathered[id(value)] for name, value in tensors.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state, gathered parameter by parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._steps()
        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self._trained if step is not None else []):
            moments = {name: safe_get_full_optimizer_state(parameter, name).cpu().clone() for name in _MOMENTS}
            state[index] = {"step": torch.tensor(float(step or 0)), **moments}
        group = {name: value for name, value in self._base().param_groups[0].items() if name != "params"}
        return {"state": state, "param_groups": [{**group, "params": list(range(len(self._trained)))}]}

    def load_optimizer(self, saved: Mapping[str, Any] | None, folder: Path) -> None:
        """As :meth:`Engine.load_optimizer`; each process keeps its part."""
        shapes = {name: torch.empty(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}
        self._set_moments(read_shards(folder, shapes) if saved is None else moments_by_name(saved, shapes))

    def _set_moments(self, moments: Moments) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not moments:
            return
        base, step = self._base(), max(float(values["step"]) for values in moments.values())
        for part in self._flat():
            base.state[part] = {"step": torch.tensor(step), **{name: torch.zeros_like(part) for name in _MOMENTS}}
        link = getattr(self.module.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        for name, parameter in self.parameters.items():
            for key in _MOMENTS if name in moments else ():
                value = moments[name][key].to(self.accelerator.device)
                if self.sharded:
                    # Its own cut of a whole value fails where the parts are not equally long.
                    count = self.accelerator.num_processes
                    parts = nn.functional.pad(value.flatten(), (0, -value.numel() % count)).chunk(count)
                    safe_set_local_optimizer_state(parameter, parts[self.accelerator.process_index], key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _base(self) -> torch.optim.Optimizer:
        """The AdamW under DeepSpeed's optimizer."""
        return self.module.optimizer.optimizer

    def _flat(self) -> list[Tensor]:
        zero = self.module.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups)

    def _steps(self) -> float | None:
        states = [state for state in self._base().state.values() if "step" in state]
        return float(states[0]["step"]) if states else None


def _gathered(parameters: list[Tensor]) -> Any:
    """A context in which stage 3's parameters are whole."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])
