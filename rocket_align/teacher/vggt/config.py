"""Sizes of a VGGT teacher; the defaults are VGGT-1B. Imports no torch, so configurations stay cheap to read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rocket_align.teacher.files import read_object

PatchEmbedKind = Literal["dinov2", "conv"]


@dataclass(frozen=True)
class VGGTConfig:
    """Everything that decides the parameter names and shapes of a VGGT aggregator.

    Raises:
        ValueError: a size that cannot be built, naming the field and what is accepted.
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

        Raises:
            ValueError: not JSON, or a field this class does not have.
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
        return cls(**values)
