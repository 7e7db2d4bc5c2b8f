"""State-dict files of a checkpoint's components: read without running anything, loaded or refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from prismatic.models.lora import strip_module_prefix
from prismatic.util.errors import UsageError


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `torch.save` file; anything but tensors in it is refused without being run.

    Raises:
        UsageError: the file cannot be read so.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UsageError(f"{file}: not a readable file of tensors ({' '.join(str(error).split())[:120]})") from error


def load_component(module: nn.Module, file: Path) -> None:
    """Load a component's state dict, saved with or without DDP's `module.` prefix.

    Raises:
        UsageError: the file cannot be read, or keys or shapes do not fit the module.
    """
    state = strip_module_prefix(read_state_dict(file))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{file}: does not fit the model: {' '.join(str(error).split())[:300]}") from error
