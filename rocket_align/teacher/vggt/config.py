"""A VGGT's sizes and files: a folder of our own (config.json + model.safetensors) or a released file.

The default sizes are VGGT-1B's.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocket_align.teacher.files import CONFIG_NAME, local_copy, read_object, replacing

PatchEmbedKind = Literal["dinov2", "conv"]
WEIGHT_NAMES = ("model.safetensors", "model.pt")
AGGREGATOR_PREFIX = "aggregator."
# Parts of a VGGT checkpoint that reading features does not need.
HEAD_PREFIXES = ("camera_head.", "depth_head.", "point_head.", "track_head.")
_BLOCK = re.compile(r"aggregator\.(?:frame|global)_blocks\.(\d+)\.")


@dataclass(frozen=True)
class VGGTConfig:
    """Everything that decides the parameter names and shapes of a VGGT aggregator.

    Raises ValueError: a size that cannot be built, naming the field and what is accepted.
    """

    image_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    rope_frequency: float = 100.0
    layer_scale_init: float = 0.01
    patch_embed: PatchEmbedKind = "dinov2"
    # The vision transformer that embeds patches (patch_embed="dinov2"); its width is embed_dim.
    vit_depth: int = 24
    vit_num_heads: int = 16
    vit_mlp_ratio: float = 4.0
    vit_num_register_tokens: int = 4
    # The heads, which are built only when asked for.
    camera_depth: int = 4
    camera_num_heads: int = 16
    dense_layers: tuple[int, ...] = (4, 11, 17, 23)
    dense_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    dense_features: int = 256

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind not in (int, float):
                continue
            if isinstance(value, bool) or not isinstance(value, int | kind) or not abs(value) < 2**31:
                accepted = "a whole number below 2^31" if kind is int else "a number below 2^31"
                raise ValueError(f"{name}: found {value!r}; accepted: {accepted}")
        for name in ("dense_layers", "dense_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name}: found {getattr(self, name)}; accepted: four numbers")
        if self.patch_embed not in get_args(PatchEmbedKind):
            raise ValueError(
                f"patch_embed: found {self.patch_embed!r}; accepted: {', '.join(get_args(PatchEmbedKind))}"
            )
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "vit_depth", "vit_num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}; accepted: 1 or more")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: found {self.image_size}; accepted: a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim: found {self.embed_dim}; accepted: a multiple of 4 * num_heads = {4 * self.num_heads} "
                "(2-D rotary positions need head widths divisible by 4)"
            )
        if self.patch_embed == "dinov2" and self.embed_dim % self.vit_num_heads:
            raise ValueError(f"vit_num_heads: found {self.vit_num_heads}; accepted: a divisor of {self.embed_dim}")

    @property
    def grid_size(self) -> int:
        """Patches along each side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def num_special_tokens(self) -> int:
        """Tokens that stand before the patches of every view: one camera token and the registers."""
        return 1 + self.num_register_tokens

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps({"model_type": "vggt", **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_file(cls, path: str | Path) -> VGGTConfig:
        """Read a config.json: our own, or that of a released VGGT, which names fewer sizes and the heads it has.

        Raises ValueError: not JSON, or a field this class does not have.
        """
        values = read_object(Path(path))
        values.pop("model_type", None)
        if "img_size" in values:
            values["image_size"] = values.pop("img_size")
        values = {name: value for name, value in values.items() if not name.startswith("enable_")}
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{path}: unknown fields {', '.join(unknown)}; accepted: {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path}: a value of another type found ({error})") from None


def find_weights(path: str | Path) -> tuple[Path, VGGTConfig]:
    """The weight file at `path` (a folder, a file or a hub id) and its sizes: config.json's beside it, else VGGT-1B's.

    Raises ValueError: nothing there, naming what is accepted.
    """
    place = local_copy(path)
    if place.is_dir():
        weights = next((place / name for name in WEIGHT_NAMES if (place / name).is_file()), None)
        if weights is None:
            raise ValueError(f"{place}: no teacher weights; accepted: a folder with {' or '.join(WEIGHT_NAMES)}")
    elif place.is_file():
        weights = place
        if not _can_hold_tensors(place):
            raise ValueError(f"{place}: no file of tensors; accepted: .safetensors, or what torch.save wrote")
    else:
        raise ValueError(f"{place}: no such file or folder; accepted: a VGGT folder or weight file (.safetensors, .pt)")
    config = weights.parent / CONFIG_NAME
    return weights, VGGTConfig.from_file(config) if config.is_file() else VGGTConfig()


def _can_hold_tensors(file: Path) -> bool:
    """Tell by its first bytes a file of safetensors (a length, then JSON), or of torch.save (zip, or pickle)."""
    with file.open("rb") as stream:
        head = stream.read(9)
    return head[8:] == b"{" or head.startswith((b"PK", b"\x80"))


def _is_needed(name: str, num_layers: int) -> bool:
    block = _BLOCK.match(name)
    return not name.startswith(HEAD_PREFIXES) and (block is None or int(block[1]) < num_layers)


def read_weights(path: Path, num_layers: int, prefixes: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors of the first `num_layers` aggregator layers, and of everything whose name starts with one of `prefixes`.

    Later layers and heads stay on disk. Unknown names are returned too, so that the caller can refuse them. Raises
    ValueError: a file that is neither safetensors nor a plain dictionary of tensors.
    """
    also = tuple(prefixes)

    def needed(held: Iterable[str]) -> list[str]:
        names = list(held)
        _refuse_other_models(names, path)
        return [name for name in names if _is_needed(name, num_layers) or name.startswith(also)]

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in needed(file.keys())}
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: not readable as VGGT weights ({str(error).splitlines()[0]})") from error
    except (pickle.UnpicklingError, EOFError) as error:
        accepted = ".safetensors or a torch state dict"
        raise ValueError(f"{path}: not a plain file of tensors; accepted: {accepted}") from error
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{path}: not a dictionary of tensors; accepted: a VGGT state dict")
    return {name: stored[name] for name in needed(stored)}


def _refuse_other_models(names: Iterable[str], path: Path) -> None:
    """Refuse a file without any of VGGT's tensors: nobody said what it holds."""
    if not any(name.startswith(AGGREGATOR_PREFIX) for name in names):
        raise ValueError(
            f"{path}: none of VGGT's tensors ({AGGREGATOR_PREFIX}...), but {_some(names)}; accepted: VGGT's weights, "
            f"or of another teacher a folder with {CONFIG_NAME} and model.safetensors, as transformers saves"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def load_strictly(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put `weights` into `module`, all of them and nothing left out.

    Raises ValueError: one line that names the file and the missing, unexpected or differently shaped tensors.
    """
    wanted = module.state_dict()
    problems = {
        "missing": wanted.keys() - weights.keys(),
        "unexpected": weights.keys() - wanted.keys(),
        "wrong shapes:": [
            f"{name} {tuple(weights[name].shape)} for {tuple(wanted[name].shape)}"
            for name in wanted.keys() & weights.keys()
            if weights[name].shape != wanted[name].shape
        ],
    }
    said = [f"{problem} {_some(names)}" for problem, names in problems.items() if names]
    if said:
        raise ValueError(
            f"{path}: {'; '.join(said)}; accepted: weights for the sizes in {CONFIG_NAME} (VGGT-1B if none)"
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
