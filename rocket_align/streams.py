"""Find the blocks of a model's language model or vision encoder, the norm behind them, and the multimodal projector.

Not obvious: the search goes by structure (lists of equal blocks) and by words in the modules' paths, since no attribute
is common to all models. It never guesses: where several places fit, it names them and asks for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

_VISION = re.compile(r"vision|visual|image|siglip|featurizer|vit\b", re.IGNORECASE)
_EXPERT = re.compile(r"(?<!with_)expert|action|\bdit\b|diffusion|teacher|align", re.IGNORECASE)
_LANGUAGE = re.compile(r"language|text|llm|\blm\b|decoder", re.IGNORECASE)
_PROJECTOR = ("multi_modal_projector", "mm_projector", "connector", "projector", "merger", "aligner")
_FINAL_NORM = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm", "norm_f")
# First norm of a pre-norm block: its input is the residual stream before the block.
_BLOCK_NORM = (
    "input_layernorm", "ln_1", "norm1", "layer_norm1", "layernorm_before", "attention_norm", "ln1", "norm_1",
)  # fmt: skip
ROLES = ("blocks", "final_norm", "vision", "projector")


@dataclass(frozen=True)
class Stream:
    """One residual stream of a model."""

    kind: str  # "language", "vision" or "projector"
    path: str  # Dotted path of the blocks, or of the projector
    blocks: tuple[nn.Module, ...]  # The blocks in order; for "projector" the projector alone
    final_norm: nn.Module | None  # The norm behind the last block, where the stream has one
    # Modules around the blocks, the model first; a forward pass lies within a call of one of them
    callers: tuple[nn.Module, ...]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block_norm(self, index: int) -> nn.Module | None:
        """The norm whose input is the stream before block `index`; behind the last block, the final norm."""
        if index == self.depth:
            return self.final_norm
        norms = (getattr(self.blocks[index], name, None) for name in _BLOCK_NORM)
        return next((norm for norm in norms if isinstance(norm, nn.Module)), None)

    def place(self, name: str, strategy: str) -> tuple[nn.Module | None, str]:
        """Module and side of it where the hook of strategy "layer" or "norm" goes; None where there is none."""
        kind, _, index = name.partition(".")
        if kind == "final_norm":
            return self.final_norm, "output"
        if strategy == "layer":
            return (self.blocks[0], "input") if kind == "embeddings" else (self.blocks[int(index or 0)], "output")
        if kind == "projector":
            return None, "output"
        return self.block_norm(int(index) + 1 if index else 0), "input"

    def state_index(self, name: str) -> int | None:
        """Index in `hidden_states`, of which the last is after the final norm; None for what is not among them."""
        kind, _, index = name.partition(".")
        if kind == "block" and int(index) + 1 < self.depth:
            return int(index) + 1
        return {"embeddings": 0, "final_norm": self.depth}.get(kind)


def find_stream(model: nn.Module, layers: str | Sequence[int | str], modules: Mapping[str, str]) -> Stream:
    """The stream that `layers` belong to.

    Args:
        layers: tap names or numbers; numbers are blocks of the language model.
        modules: dotted paths of what is not to be searched, by role (`ROLES`).

    Raises:
        ValueError: one line: taps of several streams, an unknown role or path, no such part, or several.
    """
    unknown = sorted(set(modules) - set(ROLES))
    if unknown:
        raise ValueError(f"modules: found {', '.join(unknown)}; accepted: {', '.join(ROLES)}")
    entries = layers.split(",") if isinstance(layers, str) else layers
    kinds = {_kind(str(entry).strip()) for entry in entries}
    if len(kinds) != 1:
        raise ValueError(
            f"layers: found {layers!r}, taps of {len(kinds)} streams; accepted: one or more taps of one stream"
        )
    kind = kinds.pop()
    if kind == "projector":
        path = modules.get("projector") or _only("projector", _projectors(model))
        return Stream(kind, path, (_module(model, "projector", path),), None, _callers(model, path))
    role = "vision" if kind == "vision" else "blocks"
    path = modules.get(role) or _only(role, _stacks(model, vision=kind == "vision"))
    stack = _module(model, role, path)
    blocks = tuple(stack.children())
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or not blocks:
        raise ValueError(f"modules: found {path} ({type(stack).__name__}) for {role}; accepted: a list of blocks")
    owner = model.get_submodule(path.rpartition(".")[0])
    named = {name: child for name, child in owner.named_children() if name in _FINAL_NORM}
    norm = _module(model, "final_norm", modules["final_norm"]) if "final_norm" in modules else None
    return Stream(kind, path, blocks, norm or next(iter(named.values()), None), _callers(model, path))


def _kind(entry: str) -> str:
    if entry.startswith("vision"):
        return "vision"
    return "projector" if entry == "projector" else "language"


def _module(model: nn.Module, role: str, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"modules: no {path} for {role} in {type(model).__name__} ({error})") from None


def _callers(model: nn.Module, path: str) -> tuple[nn.Module, ...]:
    parts = path.split(".")[:-1]
    modules = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    return tuple(module for module in modules if not isinstance(module, (nn.ModuleList, nn.Sequential)))


def _only(role: str, paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    listed = ", ".join(paths[:4]) or "none"
    raise ValueError(f'modules: found {listed} for {role}; accepted: one, given as modules={{"{role}": PATH}}')


def _projectors(model: nn.Module) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in _PROJECTOR]
    return [path for path in paths if not _EXPERT.search(path)]


def _stacks(model: nn.Module, *, vision: bool) -> list[str]:
    """Paths of the lists of equal blocks that are the vision encoder's, or else the language model's."""
    paths: list[str] = []
    for path, module in model.named_modules():
        children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        composed = alike and all(next(child.children(), None) is not None for child in children)
        if composed and path and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    seeing = [path for path in paths if _VISION.search(path)]
    if vision:
        return seeing
    reading = [path for path in paths if path not in seeing and not _EXPERT.search(path)]
    named = [path for path in reading if _LANGUAGE.search(path)]
    return named if len(named) == 1 else reading
