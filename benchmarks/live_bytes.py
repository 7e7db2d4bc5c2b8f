"""Live tensor bytes and floating-point operations of a computation on fake tensors: nothing is computed or allocated.

The counts come from the operators that the real code calls, temporaries included, so what autograd, autocast and
checkpointing keep is in them. Not in them: a GPU's context, the allocator's fragmentation, libraries' work spaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


@dataclass
class PhaseCount:
    """Most bytes alive during a phase, bytes alive at its end, and operations (a multiply-add counts as two)."""

    peak_bytes: int = 0
    bytes_after: int = 0
    flops: int = 0


@dataclass
class LiveBytes(TorchDispatchMode):
    """A mode that follows every storage from its first use to its end."""

    live: int = 0
    phases: dict[str, PhaseCount] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._phase = PhaseCount()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what happens inside to `name`."""
        self._phase = self.phases.setdefault(name, PhaseCount())
        self._phase.peak_bytes = max(self._phase.peak_bytes, self.live)
        yield
        self._phase.bytes_after = self.live

    def count(self, tensors: object) -> None:
        """Take storages into account that existed before the mode was on."""
        for value in tree_iter(tensors):
            if isinstance(value, torch.Tensor):
                self._follow(value.untyped_storage())

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._forget, size)
        self._phase.peak_bytes = max(self._phase.peak_bytes, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._phase.flops += _flops(func, args, kwargs, out)
        self.count((args, kwargs, out))
        return out


def _flops(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    shapes = [tensor.shape for tensor in args if isinstance(tensor, torch.Tensor)]
    # torch's registry knows the attention kernels of GPUs only.
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*shapes[:3]))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*shapes[:4]))
    return 0
