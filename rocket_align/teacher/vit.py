"""Plain vision transformers as teachers: DINOv2 (with or without registers) and Depth Anything's DINOv2 backbone.

Not obvious:
- A layer's feature is the residual stream after that block, as transformers' `hidden_states[layer + 1]`: the model's
  final LayerNorm (which Depth Anything applies to what its depth head reads) is not applied.
- Every view is seen alone. The whole view is resized; the crop of DINOv2's own preprocessor would lose its border, and
  the patches would not lie where the student's do.
- transformers is imported when a model is built, so that nothing else here needs it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rocket_align.layers import resolve_layers
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.files import CONFIG_NAME, PREPROCESSOR_NAME, local_copy, read_object
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD, fit_images

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "depth_anything")
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Where the transformer's tensors lie in a Depth Anything model, and in a DINOv2 with a classification head.
_PREFIXES = ("backbone.", "dinov2_with_registers.", "dinov2.")
_BLOCK = re.compile(r"(?:encoder\.layer|layers?)\.(\d+)\.")


def read_backbone_config(folder: Path) -> Any:
    """transformers' configuration of the vision transformer in `folder`.

    Raises ValueError: no config.json, or not of a model this module knows; one line.
    """
    from transformers import AutoConfig

    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{folder}: no {CONFIG_NAME}; accepted: a folder or hub id of {', '.join(MODEL_TYPES)}")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file}: not readable as a model's configuration ({' '.join(str(error).split())})") from error
    if config.model_type == "depth_anything":
        config = config.backbone_config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"{file}: a {config.model_type} model; accepted: {', '.join(MODEL_TYPES)} (DINOv2 backbones)")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises ValueError: none there, an index that is not one, or that names a missing file.
    """
    index = folder / _WEIGHTS_INDEX
    names = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and index.is_file():
        mapped = read_object(index).get("weight_map")
        if not isinstance(mapped, dict) or not mapped:
            raise ValueError(f"{index}: no weight_map; accepted: the index of a model in several safetensors files")
        names = sorted(set(map(str, mapped.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / missing[0]}: no such file; accepted: a teacher's weights as safetensors")
    return [folder / name for name in names]


def _read_weights(folder: Path, num_layers: int) -> dict[str, Tensor]:
    """Tensors of the first `num_layers` blocks and of what stands before them, under the bare model's names."""
    weights = {}
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
            holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
            prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in holders)), "")
            for name, file in holders.items():
                block = _BLOCK.search(name)
                if name.startswith(prefix) and (block is None or int(block[1]) < num_layers):
                    weights[name.removeprefix(prefix)] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: not readable as safetensors ({str(error).splitlines()[0]})") from error
    return weights


def _build(config: Any, weights: dict[str, Tensor], folder: Path) -> Any:
    """transformers' model with `weights`; every tensor it needs must be there."""
    import transformers

    cls: Any = transformers.Dinov2Model
    if config.model_type == "dinov2_with_registers":
        cls = transformers.Dinov2WithRegistersModel
    # A size that differs is reported by transformers with a RuntimeError of several lines.
    try:
        model, loading = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights that do not fit {CONFIG_NAME} ({' '.join(str(error).split())})") from error
    # Depth Anything's backbone was saved without the mask token in some releases; it takes no part.
    missing = sorted(name for name in loading["missing_keys"] if "mask_token" not in name)
    if missing:
        raise ValueError(f"{folder}: missing {', '.join(missing[:3])} ({len(missing)} in all)")
    return model


def _preprocessing(folder: Path, config: Any) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """(mean, std, image size) of preprocessor_config.json; without one, ImageNet's and the size in config.json."""
    size, mean, std = config.image_size, IMAGENET_MEAN, IMAGENET_STD
    file = folder / PREPROCESSOR_NAME
    if file.is_file():
        values = read_object(file)
        mean, std = tuple(values.get("image_mean", mean)), tuple(values.get("image_std", std))
        sizes = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
        sizes = sizes if isinstance(sizes, dict) else {"height": sizes or size}
        size = sizes.get("height") or sizes.get("shortest_edge") or size
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{file}: image_mean and image_std have {len(mean)} and {len(std)} numbers; accepted: 3")
    side = size if isinstance(size, int) else size[0]
    return mean, std, max(1, side // config.patch_size) * config.patch_size


class ViTTeacher(nn.Module):
    """A frozen DINOv2 transformer cut after the last requested block.

    Args:
        model: transformers' `Dinov2Model` or `Dinov2WithRegistersModel`, at least as deep as the layers ask.
        layers: 0-based blocks whose outputs are the features.
        mean, std: what pixels in [0, 1] are normalized with.
        image_size: pixels of a view's width; a multiple of the patch size.

    Raises:
        ValueError: an image size that is no multiple of the patch size.
    """

    def __init__(
        self,
        model: Any,
        layers: tuple[int, ...],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        image_size: int = 518,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.patch_size: int = self.model.config.patch_size
        self.image_size = image_size
        if image_size < 1 or image_size % self.patch_size:
            raise ValueError(
                f"image_size: found {image_size}; accepted: a multiple of the patch size {self.patch_size}"
            )
        self._colors = tuple(zip(mean, std))
        self._num_special = 1 + int(getattr(self.model.config, "num_register_tokens", 0))
        self.requires_grad_(False)
        self.train(False)

    @property
    def channels(self) -> int:
        """Channels of a feature."""
        return int(self.model.config.hidden_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        layers: str | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> ViTTeacher:
        """Load a folder or hub id of a DINOv2 or Depth Anything model in transformers' layout (safetensors).

        Blocks after the last layer and Depth Anything's neck and head are neither read nor built.

        Args:
            layers: 0-based blocks, negative ones from the end; integers or a comma string; any order, also
                repeated.
            image_size: width in pixels a view is resized to; by default that of the model's preprocessor (224 for
                DINOv2, 518 for Depth Anything), rounded down to a multiple of the patch.

        Raises:
            ValueError: nothing usable at `path`, weights that do not fit, or layers out of range; one line.
        """
        folder = local_copy(path)
        full = read_backbone_config(folder)
        chosen = resolve_layers(layers, full.num_hidden_layers, convention="python")
        if not chosen:
            raise ValueError("layers: found none; accepted: at least one teacher layer")
        # Which stages a backbone hands out refers to its full depth.
        settings = {k: v for k, v in full.to_dict().items() if k not in ("out_features", "out_indices", "stage_names")}
        config = type(full).from_dict({**settings, "num_hidden_layers": max(chosen) + 1})
        model = _build(config, _read_weights(folder, max(chosen) + 1), folder)
        mean, std, native = _preprocessing(folder, full)
        teacher = cls(model, chosen, mean, std, image_size=image_size or native)
        return teacher.to(device=device, dtype=dtype)

    def train(self, mode: bool = True) -> ViTTeacher:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BV3HW: Tensor) -> TeacherFeatures:
        """Features of `self.layers`, in that order, in the precision of the weights.

        Args:
            images_BV3HW: values in [0, 1] (clamped to it), any size: resized here, on the device (see `fit_images`).

        Returns:
            Features of shape (B, V, P, hidden size), without class and register tokens.
        """
        batch, views = images_BV3HW.shape[:2]
        fitted = fit_images(images_BV3HW.float().clamp(0, 1), self.image_size, patch_size=self.patch_size)
        height, width = fitted.shape[-2:]
        # Plain numbers per channel: a constant tensor would be copied from the host in every step.
        normed = [(color - mean) / std for color, (mean, std) in zip(fitted.unbind(2), self._colors)]
        pixels = torch.stack(normed, dim=2).flatten(0, 1).to(next(self.model.parameters()).dtype)
        # The caller's autocast must not override the precision asked for.
        with torch.autocast(pixels.device.type, enabled=False):
            states = self.model(pixels, output_hidden_states=True).hidden_states
        features = tuple(states[i + 1][:, self._num_special :].unflatten(0, (batch, views)) for i in self.layers)
        return TeacherFeatures(features, (height // self.patch_size, width // self.patch_size), (height, width))
