"""Read and write VGGT weights: a folder of our own (config.json + model.safetensors) or a released file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocket_align.teacher.files import CONFIG_NAME, local_copy, replacing
from rocket_align.teacher.vggt.config import VGGTConfig

WEIGHT_NAMES = ("model.safetensors", "model.pt")
AGGREGATOR_PREFIX = "aggregator."
# Parts of a VGGT checkpoint that reading features does not need.
HEAD_PREFIXES = ("camera_head.", "depth_head.", "point_head.", "track_head.")
_BLOCK = re.compile(r"aggregator\.(?:frame|global)_blocks\.(\d+)\.")


def find_weights(path: str | Path) -> tuple[Path, VGGTConfig]:
    """The weight file at `path` (a folder, a file or a hub id) and its sizes: config.json's beside it, else VGGT-1B's.

    Raises:
        ValueError: nothing there, naming what is accepted.
    """
    place = local_copy(path)
    if place.is_dir():
        weights = next((place / name for name in WEIGHT_NAMES if (place / name).is_file()), None)
        if weights is None:
            raise ValueError(f"{place}: no teacher weights; accepted: a folder with {' or '.join(WEIGHT_NAMES)}")
    elif place.is_file():
        weights = place
    else:
        raise ValueError(f"{place}: no such file or folder; accepted: a VGGT folder or weight file (.safetensors, .pt)")
    config = weights.parent / CONFIG_NAME
    return weights, VGGTConfig.from_file(config) if config.is_file() else VGGTConfig()


def _is_needed(name: str, num_layers: int) -> bool:
    block = _BLOCK.match(name)
    return not name.startswith(HEAD_PREFIXES) and (block is None or int(block[1]) < num_layers)


def read_weights(path: Path, num_layers: int, prefixes: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors of the first `num_layers` aggregator layers, and of everything whose name starts with one of `prefixes`.

    Later layers and heads stay on disk. Unknown names are returned too, so that the caller can refuse them.

    Raises:
        ValueError: a file that is neither safetensors nor a plain dictionary of tensors.
    """
    also = tuple(prefixes)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                held = list(file.keys())
                _refuse_other_models(held, path)
                names = [name for name in held if _is_needed(name, num_layers) or name.startswith(also)]
                return {name: file.get_tensor(name) for name in names}
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not readable as VGGT weights ({str(error).splitlines()[0]})") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path}: not a plain file of tensors; accepted: .safetensors or a torch state dict"
        ) from error
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{path}: not a dictionary of tensors; accepted: a VGGT state dict")
    _refuse_other_models(stored, path)
    return {name: value for name, value in stored.items() if _is_needed(name, num_layers) or name.startswith(also)}


def _refuse_other_models(names: Iterable[str], path: Path) -> None:
    """Refuse a file without any of VGGT's tensors: what it is of nobody said."""
    listed = list(names)
    if not any(name.startswith(AGGREGATOR_PREFIX) for name in listed):
        raise ValueError(
            f"{path}: none of VGGT's tensors ({AGGREGATOR_PREFIX}...), but {_some(listed)}; accepted: VGGT's weights, "
            f"or of another teacher a folder with {CONFIG_NAME} and model.safetensors, as transformers saves"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def load_strictly(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put `weights` into `module`, all of them and nothing left out.

    Raises:
        ValueError: one line that names the file and the missing, unexpected or differently shaped tensors.
    """
    wanted = module.state_dict()
    problems = []
    if missing := wanted.keys() - weights.keys():
        problems.append(f"missing {_some(missing)}")
    if unexpected := weights.keys() - wanted.keys():
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if shapes:
        problems.append(f"wrong shapes: {_some(shapes)}")
    if problems:
        raise ValueError(
            f"{path}: {'; '.join(problems)}; accepted: weights for the sizes in {CONFIG_NAME} (VGGT-1B if none)"
        )
    module.load_state_dict(weights, assign=True)


def save_folder(folder: str | Path, config: VGGTConfig, weights: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, each to a temporary name first, then renamed.

    Args:
        weights: tensors under upstream's names ("aggregator.camera_token", ...; heads may be among them).
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / CONFIG_NAME) as file:
        file.write_text(config.to_json(), encoding="utf-8")
    # The weights last: a folder that has them is complete.
    with replacing(target / WEIGHT_NAMES[0]) as file:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, file)
