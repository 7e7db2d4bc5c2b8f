"""Taps: collect the residual stream of a model in its own forward pass, without changing its code.

    taps = attach(model, layers=("block.2", "block.4", "final_norm"), image_tokens=range(0, 512))
    output = model(**batch)                                    # any call of the model, in training or not
    aligned = alignment.align(taps.take(), teacher(images))    # (K, B, 512, D) against the teacher's features

Names of taps: "embeddings" (input of block 0), "block.k" (stream after block k, 0-based, before any final norm),
"final_norm" (output of the norm behind the last block); "vision.k" (after block k of the vision encoder); "projector"
(output of the multimodal projector). :func:`rocket_align.layers.tap_names` makes them of numbers.

Not obvious:
- Some training loops never call a layer: they call its parts (LeRobot's and openpi's pi0, SmolVLA), so that hooks on
  layers never fire. The input of a layer's first norm is then the stream after the block before it: strategy "norm".
- Hooks fire again when gradient checkpointing recomputes a block in the backward pass. Those calls are not collected;
  gradients through the tensors of the first pass are those without checkpointing.
- Rows are copied out of the stream when the pass ends, so that no tap keeps text or action tokens alive. Hooks compute
  nothing: inside a checkpointed block the recomputation would miss it. `take` hands the rows over and drops them: kept
  until the next step they would keep the whole graph.
- A model that never calls its own `forward` through `__call__` (PEFT calls the wrapped model's directly) opens no pass:
  the taps then take a pass to begin when, complete, they begin to fire again.
- Faults are told by `take`, never by a hook: generation with the same model goes on whatever its shapes are.
- Attach before torch.compile; hooks added to compiled code are ignored by torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rocket_align.alignment import AlignOutput, MultiLayerAlignment
from rocket_align.layers import TapConvention, tap_names
from rocket_align.rows import ImageTokens, RowPicker
from rocket_align.streams import Stream, find_stream
from rocket_align.teacher.base import AlignmentTargets, TeacherFeatures

log = logging.getLogger(__name__)

Strategy = Literal["auto", "layer", "norm", "returned"]
# A strategy and the name of a tap.
_Key = tuple[str, str]
_STRATEGIES = ("layer", "norm", "returned")


def attach(
    model: nn.Module,
    layers: str | Sequence[int | str],
    image_tokens: ImageTokens = None,
    *,
    convention: TapConvention = "blocks",
    strategy: Strategy = "auto",
    example: Mapping[str, object] | Sequence[object] | Callable[[], object] | None = None,
    modules: Mapping[str, str] | None = None,
    views: int = 1,
) -> Taps:
    """Collect the stream at `layers` in every forward pass of `model` from now on.

    Args:
        model: the module that the training step calls. Wrap it with PEFT before or after; attach before torch.compile,
            DDP and FSDP2.
        layers: names of taps (see the module), or numbers in `convention`; all of one stream.
        image_tokens: rows to keep. Positions (range, slice, integers), the same in every sample; or the image token's
            id, looked up in the call's `input_ids`; or a function of the call's arguments that returns a bool mask
            (B, S). None keeps all rows. For "vision.k" and "projector": rows of one view.
        convention: meaning of numbers, see :func:`rocket_align.layers.tap_names`.
        strategy: "layer" (forward hooks on blocks), "norm" (pre-hooks on the next block's first norm), "returned"
            (`output_hidden_states=True`), or "auto": the first of them in which every tap fires once.
        example: a batch for one dry forward (keyword arguments, positional ones, or a function that runs it), which
            decides and checks at once. Without it, the first forward does.
        modules: dotted paths where the search is not clear: "blocks", "final_norm", "vision", "projector".
        views: cameras of a sample, for "vision.k" and "projector" (one call of B * views images, or one call a view).

    Raises:
        ValueError: one line: layers, modules or a strategy that the model does not have; with `example` also what
            :meth:`Taps.take` refuses.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy: found {strategy!r}; accepted: {', '.join(get_args(Strategy))}")
    stream = find_stream(model, layers, modules or {})
    names = tap_names(layers, stream.depth, convention=convention)
    taps = Taps(model, stream, names, image_tokens, strategy=strategy, views=views)
    if example is not None:
        try:
            taps.dry_run(example)
        except BaseException:
            taps.detach()
            raise
    return taps


class Taps:
    """The collected stream of one model; made by :func:`attach`.

    Attributes:
        names: names of the taps, in the order of `layers`.
        strategy: the strategy in force; "auto" until a forward pass has decided it.
        mask: after `take`, where `image_tokens` are looked up in each sample and their number differs: (B, N) bool,
            False behind a sample's last image token; else None.
    """

    _attached = False

    def __init__(
        self,
        model: nn.Module,
        stream: Stream,
        names: Sequence[str],
        image_tokens: ImageTokens,
        *,
        strategy: Strategy = "auto",
        views: int = 1,
    ) -> None:
        self.names = tuple(names)
        self.strategy: str = strategy
        self.mask: Tensor | None = None
        self._model, self._stream, self._views = model, stream, views
        self._picker = RowPicker(image_tokens)
        self._rows: dict[_Key, list[Tensor]] = {}
        self._fault = ""
        self._picked = False
        # Index of the module in whose call a forward pass runs; None between passes.
        self._caller: int | None = None
        self._begun = self._checked = False
        self._attached = True
        self._handles: list[RemovableHandle] = []
        for index, module in enumerate(stream.callers):
            self._handles.append(module.register_forward_pre_hook(partial(self._open, index), with_kwargs=True))
        self._hooks = {kind: self._hook(kind) for kind in (_STRATEGIES if strategy == "auto" else (strategy,))}
        # Behind those of "returned", so that the pass is open when they fire.
        for index, module in enumerate(stream.callers):
            self._handles.append(module.register_forward_hook(partial(self._close, index)))
        if not any(self._hooks.values()):
            self.detach()
            raise ValueError(f"strategy: found {strategy}, but {stream.path} has no place for {', '.join(self.names)}")

    def __repr__(self) -> str:
        return f"Taps({', '.join(self.names)} of {self._stream.path}; strategy {self.strategy})"

    def __reduce__(self) -> tuple[Callable[..., object], tuple[type[Taps]]]:
        # A copy of the model (an average of its weights, a saved module) is not tapped.
        return object.__new__, (Taps,)

    def detach(self) -> None:
        """Remove all hooks and what was collected."""
        for handle in [*self._handles, *(handle for handles in self._hooks.values() for handle in handles)]:
            handle.remove()
        self._handles.clear()
        self._hooks.clear()
        self._rows.clear()
        self._attached = False

    def dry_run(self, example: Mapping[str, object] | Sequence[object] | Callable[[], object]) -> None:
        """Run one forward pass in training mode, decide and check; random numbers and modes stay as they were.

        Raises ValueError: what :meth:`take` refuses.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.train()
        try:
            with torch.random.fork_rng():
                if callable(example):
                    example()
                elif isinstance(example, Mapping):
                    self._model(**example)
                else:
                    self._model(*example)
        finally:
            for module, mode in modes:
                module.training = mode
        self.take()

    def clear(self) -> None:
        """Forget what was collected since the last `take`."""
        self._rows, self._fault, self._begun, self._picked = {}, "", False, False

    def take(self) -> Tensor:
        """Rows of the last forward pass (K, B, N, D), with gradient; handed over once.

        Raises ValueError: one line: no forward pass since the last call, taps that did not fire once in it, rows that
        are not in the sequence, or (in a pass with gradients) a stream in which nothing trains.
        """
        self._pick()
        rows, fault = self._rows, self._fault
        begun = self._begun or bool(rows)
        self.clear()
        if not begun:
            raise ValueError(f"taps: no forward pass of {type(self._model).__name__} since the last take")
        kind = self._fired_once(rows, fault)
        collected = {name: self._views_joined(rows[kind, name]) for name in self.names}
        if not self._checked and torch.is_grad_enabled():
            for name, tensor in collected.items():
                self._check_gradient(name, tensor)
            self._checked = True
        self.mask = self._picker.valid
        return torch.stack([collected[name] for name in self.names])

    def _fired_once(self, rows: dict[_Key, list[Tensor]], fault: str) -> str:
        """The strategy whose taps all fired as often as they should; settles it."""
        counts = {kind: [len(rows.get((kind, name), ())) for name in self.names] for kind in self._hooks}
        accepted = {1} if self._stream.kind == "language" else {1, self._views}
        for kind, times in counts.items():
            if self._hooks[kind] and all(count in accepted for count in times) and not fault:
                self._settle(kind)
                return kind
        if fault:
            raise ValueError(fault)
        seen = "; ".join(f"{kind} {', '.join(map(str, times))}" for kind, times in counts.items() if self._hooks[kind])
        raise ValueError(
            f"taps: {', '.join(self.names)} of {self._stream.path} fired in one forward pass ({seen}) times; "
            "accepted: each once; attach to the module that the training step calls, or name the blocks by modules="
        )

    def _settle(self, strategy: str) -> None:
        if self.strategy == strategy and len(self._hooks) == 1:
            return
        for kind in [kind for kind in self._hooks if kind != strategy]:
            for handle in self._hooks.pop(kind):
                handle.remove()
        self.strategy = strategy
        log.info("%s: %s", type(self._model).__name__, self)

    def _views_joined(self, calls: list[Tensor]) -> Tensor:
        if len(calls) > 1:
            return torch.cat(calls, dim=1)
        if self._stream.kind == "language" or self._views == 1:
            return calls[0]
        if len(calls[0]) % self._views:
            raise ValueError(f"views: found {len(calls[0])} images; accepted: a multiple of {self._views} views")
        return calls[0].unflatten(0, (-1, self._views)).flatten(1, 2)

    def _check_gradient(self, name: str, rows: Tensor) -> None:
        """Refuse a tap below which nothing trains: its loss would train nothing but the projector."""
        trains = any(parameter.requires_grad for block in self._below(name) for parameter in block.parameters())
        if trains and not rows.requires_grad:
            raise ValueError(
                f"taps: {name} has no gradient though blocks before it train; accepted: a forward pass with gradients, "
                "and gradient checkpointing with use_reentrant=False"
            )
        if not trains and not (rows.requires_grad and _reaches_weights(self._model, rows)):
            raise ValueError(
                f"taps: the stream at {name} of {self._stream.path} is frozen: aligning it trains nothing but the "
                "projector; accepted: a stream whose blocks or inputs train (unfreeze them, or add LoRA)"
            )

    def _below(self, name: str) -> Sequence[nn.Module]:
        kind, _, index = name.partition(".")
        if index:
            return self._stream.blocks[: int(index) + 1]
        return () if kind == "embeddings" else self._stream.blocks

    def _hook(self, kind: str) -> list[RemovableHandle]:
        """Hooks of one strategy; none where it has no place for one of the taps."""
        if kind == "returned":
            indices = {name: self._stream.state_index(name) for name in self.names}
            states = {name: index for name, index in indices.items() if index is not None}
            if len(states) < len(indices):
                return []
            return [self._stream.callers[0].register_forward_hook(partial(self._from_states, states))]
        places = {name: self._stream.place(name, kind) for name in self.names}
        handles: list[RemovableHandle] = []
        for name, (module, side) in places.items():
            if module is None:
                for handle in handles:
                    handle.remove()
                return []
            if side == "output":
                handles.append(module.register_forward_hook(partial(self._from_output, (kind, name))))
            else:
                hook = partial(self._from_input, (kind, name))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    # Hooks return None: torch puts anything else in the place of a module's input or output.

    def _open(self, index: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self._attached:
            return
        # An outer module, or the same again after a pass that ended in an exception.
        if self._caller is None or index <= self._caller:
            self._caller = index
            self._begun, self._picked = True, False
            self._fault = ""
            self._rows.clear()
            self._picker.clear()
        self._picker.look(args, kwargs)

    def _close(self, index: int, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if self._attached and index == self._caller:
            self._caller = None
            self._pick()

    def _pick(self) -> None:
        """Put the image tokens' rows in the place of the streams."""
        if self._picked:
            return
        self._picked = True
        for key, streams in self._rows.items():
            try:
                self._rows[key] = [self._picker.pick(stream) for stream in streams]
            except ValueError as error:
                self._fault = f"taps: {key[1]}: {error}"

    def _from_output(self, key: _Key, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self._collect(key, output)

    def _from_input(self, key: _Key, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._collect(key, args if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))

    def _from_states(self, states: dict[str, int], module: nn.Module, args: tuple[object, ...], output: object) -> None:
        returned = (
            output.get("hidden_states") if isinstance(output, Mapping) else getattr(output, "hidden_states", None)
        )
        if self._attached and isinstance(returned, (tuple, list)) and len(returned) == self._stream.depth + 1:
            for name, index in states.items():
                self._collect(("returned", name), returned[index])

    def _collect(self, key: _Key, value: Any) -> None:
        if not self._attached:
            return
        if self._caller is None:
            if torch._C._current_graph_task_id() != -1:
                return  # Gradient checkpointing recomputes the block in the backward pass.
            if key in self._rows and all((key[0], name) in self._rows for name in self.names):
                self._rows.clear()
                self._picker.clear()
        while isinstance(value, (tuple, list)):
            value = value[0]
        self._rows.setdefault(key, []).append(value)


class AlignedModel(nn.Module):
    """A model and its alignment behind one `forward`: wrap this one in DDP or FSDP2, so that the projectors' gradients
    are averaged, too, and weights that the alignment alone reaches are known to be used.

    Args:
        model: the tapped model.
        alignment: its loss.
        taps: one tap per pair of layers, attached to `model`.
    """

    def __init__(self, model: nn.Module, alignment: MultiLayerAlignment, taps: Taps) -> None:
        super().__init__()
        self.model, self.alignment, self.taps = model, alignment, taps

    def forward(
        self,
        *args: Any,
        teacher: TeacherFeatures | AlignmentTargets | None,
        mask_BN: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, AlignOutput]:
        """The model's output, and the alignment of its forward pass; see :meth:`MultiLayerAlignment.align`."""
        output = self.model(*args, **kwargs)
        return output, self.alignment.align(self.taps.take(), teacher, mask_BN)


def _reaches_weights(model: nn.Module, rows: Tensor) -> bool:
    """Tell whether a gradient at `rows` reaches any trainable weight; True where that cannot be told."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The weights of a sharded model are no leaves of its graph.
    if not weights or any(hasattr(weight, "placements") for weight in weights):
        return bool(weights)
    try:
        gradients = torch.autograd.grad(rows.float().square().sum(), weights, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return True  # Reentrant checkpointing knows no gradients of chosen tensors.
    return any(bool(gradient.any()) for gradient in gradients if gradient is not None)
