"""Engines: how the processes of a launch share weights, gradients and optimizer state, and how they save them.

`Engine` keeps the whole model in every process (one process, or DDP); `FsdpEngine` shards all of it (FSDP2, through
accelerate). Weights leave an engine whole, so a checkpoint is the same whichever engine wrote it, and any engine on any
number of processes goes on from it.

Not obvious:
- A sharded optimizer state is written by torch.distributed.checkpoint as safetensors: its own format has a pickle.
- accelerate shards on GPUs alone. Over gloo the same code runs once its state says that it does.
- FSDP gathers a module's weights when its `forward` is called, so a group must be a module that is called: a block of
  a transformer. What is outside of the blocks is one group, gathered while the whole module runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from prismatic.util.errors import UsageError

Moments = Mapping[str, Mapping[str, Tensor]]
_BLOCK = re.compile(r"(^|\.)(layers?|(\w+_)?blocks)\.\d+$")


class Engine:
    """Every process holds the whole model; several average their gradients (DDP).

    Attributes:
        accelerator: processes and devices.
        compute_dtype: of the arithmetic under `accelerator.autocast()`.
        module: the wrapped module, after :meth:`prepare`; `plain` without the wrapper.
        optimizer: the prepared optimizer.
        sharded: no process holds the whole model, so all of them must run the same forward passes.
        gives_access: gradients and weights can be looked at and changed between steps.
    """

    sharded = False
    gives_access = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.compute_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.module: Any = None
        self.plain: Any = None
        self.optimizer: Any = None

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap and place what trains."""
        self.plain, self._names = module, [name for name, p in module.named_parameters() if p.requires_grad]
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters that train, by name: the optimizer's, since a module may hold gathered ones for a while."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        return dict(zip(self._names, held, strict=True))

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Forward and backward pass of one of a step's batches; gradients are averaged in the `last` one."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Norm (scalar) of the gradient, over all parameters and processes."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return _whole(torch.nn.utils.get_total_norm(gradients))

    def update(self, max_norm: float) -> Tensor | None:
        """One optimizer step; returns the gradient's norm where it is clipped (`max_norm` above 0)."""
        norm = None
        if max_norm > 0:
            norm = _whole(self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm))
        self.optimizer.step()
        self.leave_out()
        return norm

    def leave_out(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> list[Tensor]:
        """Parts that this process holds of what trains."""
        return [p.detach() for p in self.parameters.values()]

    def free_gathered(self) -> None:
        """Let the next forward pass see what :meth:`held` was changed to, also where weights were gathered before."""

    def weights(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors of the whole module's state dict whose names are `wanted`; call on every process.

        Other processes than the main one may get nothing.
        """
        return {name: value for name, value in self.plain.state_dict().items() if wanted(name)}

    def optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's whole state dict, or None where :meth:`save_optimizer` writes it. Call on every process."""
        return self.optimizer.state_dict()

    def shard_frozen(self, module: nn.Module) -> None:
        """Divide a frozen module, such as a teacher, among the processes. Raises UsageError without FSDP."""
        if self.accelerator.num_processes > 1:
            raise UsageError("--shard_teacher: True found without FSDP; accepted: False, or --shard fsdp")

    def save_optimizer(self, folder: Path) -> None:
        """Write a sharded optimizer's state; call on every process."""

    def placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A whole tensor as a parameter is held: where it is, and sharded as it is."""
        return _placed(value, parameter)

    def load_optimizer(self, saved: Mapping[str, Any] | None, folder: Path) -> None:
        """Restore a state that any engine saved: `saved` whole, or None for the shards in `folder`.

        Raises ValueError: it is of other parameters.
        """
        if saved is not None:
            self.optimizer.load_state_dict(saved)
        else:
            self._set_moments(read_shards(folder, self.parameters))

    def _set_moments(self, moments: Moments) -> None:
        """Give the optimizer its state: values (whole, or as the parameter is sharded) by parameter and key."""
        optimizer = self.optimizer.optimizer
        for name, parameter in self.parameters.items():
            if values := moments.get(name):
                optimizer.state[parameter] = {key: _placed(value, parameter) for key, value in values.items()}


class FsdpEngine(Engine):
    """Weights, gradients and optimizer state sharded over all processes (FSDP2)."""

    sharded = True

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard block by block; nothing of the model may be shared with another."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(
            {type(part).__name__ for part in blocks(module)}
        )
        super().prepare(module, optimizer)
        # Gathering starts where a forward method is called: diffusion samples, and the policy is asked, through these.
        for name in ("sampled_errors", "run_whole"):
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Add up shards of gradients: whole ones, which wait for the last batch, would take the memory of the model."""
        yield

    def held(self) -> list[Tensor]:
        """The shards."""
        return [cast(Any, p).to_local().detach() for p in self.parameters.values()]

    def free_gathered(self) -> None:
        """Shard again what a forward pass without a backward pass has left whole: the root's weights and the tail's."""
        from torch.distributed.fsdp import FSDPModule

        for part in self.plain.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def weights(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Gathered one by one; a tensor under several names (a shared projector's) once."""
        gathered: dict[int, Tensor] = {}
        tensors = {name: value for name, value in self.plain.state_dict(keep_vars=True).items() if wanted(name)}
        for value in tensors.values():
            if id(value) not in gathered:
                whole = _whole(value.detach())
                gathered[id(value)] = whole.cpu() if self.accelerator.is_main_process else whole.new_empty(0)
        return {name: gathered[id(value)] for name, value in tensors.items()}

    def optimizer_state(self) -> None:
        """Nothing: it is written in shards."""
        return None

    def shard_frozen(self, module: nn.Module) -> None:
        """Shard block by block; each forward pass gathers and frees them."""
        from torch.distributed.fsdp import fully_shard

        for part in (*blocks(module), module):
            fully_shard(part, reshard_after_forward=True)

    def save_optimizer(self, folder: Path) -> None:
        """Write this process's shards, once the main process has made room for them."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        self.accelerator.wait_for_everyone()
        state = self.optimizer.optimizer.state
        tensors = {
            f"{name}.{key}": value if value.ndim else value.reshape(1)  # Slices of safetensors have dimensions.
            for name, parameter in self.parameters.items()
            for key, value in state.get(parameter, {}).items()
        }
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))

    def load_optimizer(self, saved: Mapping[str, Any] | None, folder: Path) -> None:
        """As :meth:`Engine.load_optimizer`; each process keeps its part."""
        if saved is None:
            super().load_optimizer(None, folder)
        else:
            self._set_moments(moments_by_name(saved, self.parameters))


def say_sharded(accelerator: Accelerator, kind: DistributedType) -> None:
    """Let accelerate's state say what it does on GPUs alone; each AcceleratorState() copies from the PartialState."""
    for state in (accelerator.state, PartialState()):
        state.distributed_type = kind


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of the transformers in `module`, whose weights are gathered and freed together."""
    return [part for name, part in module.named_modules() if _BLOCK.search(name)]


def moments_by_name(saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Moments:
    """A whole optimizer state dict by parameter. Raises ValueError: it is of other parameters."""
    names = list(parameters)
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(names):
        raise ValueError(f"{len(names)} parameters, but the state of another number")
    moments = {names[index]: values for index, values in saved["state"].items()}
    _check_shapes({name: {k: v.shape for k, v in values.items()} for name, values in moments.items()}, parameters)
    return moments


def read_shards(folder: Path, parameters: Mapping[str, Tensor]) -> Moments:
    """The optimizer's state that :meth:`FsdpEngine.save_optimizer` wrote, sharded as `parameters` are, or whole.

    Raises:
        ValueError: it is of other parameters.
        UsageError: there are no shards.
    """
    from torch.distributed import is_initialized
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"--resume: {folder} holds no optimizer state; accepted: a whole checkpoint")
    reader = HuggingFaceStorageReader(str(folder))
    sizes: dict[str, dict[str, torch.Size]] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        name, _, moment = key.rpartition(".")
        sizes.setdefault(name, {})[moment] = cast(Any, entry).size
    _check_shapes(sizes, parameters)
    moments: dict[str, dict[str, Tensor]] = {
        name: {
            key: torch.zeros(1) if key == "step" else torch.zeros_like(parameters[name].detach())
            for key in sorted(keys)
        }
        for name, keys in sorted(sizes.items())
    }
    tensors = {f"{name}.{key}": value for name, values in moments.items() for key, value in values.items()}
    load(tensors, storage_reader=reader, no_dist=not is_initialized())
    return {name: values | {"step": values["step"][0]} for name, values in moments.items()}


def _check_shapes(sizes: Mapping[str, Mapping[str, torch.Size]], parameters: Mapping[str, Tensor]) -> None:
    for name, moments in sizes.items():
        shape = parameters[name].shape if name in parameters else None
        if any(size != shape for key, size in moments.items() if key != "step"):
            raise ValueError(f"{name}: a state of another shape, or of no parameter here")


def _whole(tensor: Tensor) -> Tensor:
    """A tensor without shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment where its parameter is, sharded as it is; a step count stays what it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if value.ndim == 0 or isinstance(value, DTensor):
        return value.clone()
    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return value.clone()
    # Every process read the whole value.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
