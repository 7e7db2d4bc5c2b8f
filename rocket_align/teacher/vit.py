"""Plain vision transformers of transformers as teachers: DINOv2 (with or without registers), Depth Anything's DINOv2
backbone, and any other whose configuration names hidden_size, num_hidden_layers, patch_size and image_size, alone or as
the vision encoder of a larger model (SigLIP, CLIP, PaliGemma, ...).

Not obvious:
- A layer's feature is the residual stream after that block, as transformers' `hidden_states[layer + 1]`: the model's
  final LayerNorm (which Depth Anything applies to what its depth head reads) is not applied.
- Every view is seen alone. The whole view is resized; the crop of DINOv2's own preprocessor would lose its border, and
  the patches would not lie where the student's do.
- Patches are the last tokens: class and register tokens stand before them in all of these models.
- Only DINOv2 takes other image sizes than its own; the others see their configuration's.
- transformers is imported when a model is built, so that nothing else here needs it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rocket_align.layers import resolve_layers
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.files import CONFIG_NAME, PREPROCESSOR_NAME, local_copy, read_object
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD, fit_images, normalize_views

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "depth_anything")
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = re.compile(r"(?:encoder\.layer|layers?)\.(\d+)\.")
# Nothing of these takes part in the features; some releases leave them out.
_UNUSED = ("mask_token", "pooler", "head")
_NEEDED = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")


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
        return config.backbone_config
    vision = getattr(config, "vision_config", config)
    if not all(isinstance(getattr(vision, name, None), int) for name in _NEEDED):
        raise ValueError(
            f"{file}: a {config.model_type} model; accepted: {', '.join(MODEL_TYPES)}, or another plain vision "
            f"transformer, whose configuration has {', '.join(_NEEDED)}"
        )
    return vision


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


def read_tensors(folder: Path, names: Callable[[Collection[str]], Mapping[str, str]]) -> dict[str, Tensor]:
    """Tensors of a model folder.

    Args:
        names: given the names in the files, says which of them to read, by the names that they get.

    Raises:
        ValueError: no safetensors, or unreadable ones; one line.
    """
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
            holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
            return {key: holders[name].get_tensor(name) for key, name in names(holders).items() if name in holders}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: not readable as safetensors ({str(error).splitlines()[0]})") from error


def _names_in_file(keys: Sequence[str], num_layers: int, stored: Collection[str]) -> dict[str, str]:
    """Names in the files of a bare model's tensors, without blocks from `num_layers` on.

    A larger model has its own prefix before them. Names behind it may be of an earlier release of transformers, which
    renames them when it loads.
    """
    parts = next((key for key in keys if "patch" in key), keys[0]).split(".")
    for start in range(len(parts)):
        own, tail = "".join(f"{part}." for part in parts[:start]), ".".join(parts[start:])
        prefixes = [name.removesuffix(tail) for name in stored if name == tail or name.endswith(f".{tail}")]
        if prefixes:
            prefix = min(prefixes, key=len)
            blocks = {name: _BLOCK.search(name, len(prefix)) for name in stored if name.startswith(prefix)}
            kept = [name for name, block in blocks.items() if block is None or int(block[1]) < num_layers]
            return {own + name.removeprefix(prefix): name for name in kept}
    return {}


def _build(config: Any, folder: Path) -> Any:
    """transformers' model with the folder's weights; every tensor it needs must be there."""
    from transformers import AutoModel

    try:
        cls: Any = AutoModel._model_mapping[type(config)]
    except KeyError:
        raise ValueError(f"{folder / CONFIG_NAME}: transformers has no model for {config.model_type}") from None
    with torch.device("meta"):
        keys = list(cls(config).state_dict())
    weights = read_tensors(folder, lambda stored: _names_in_file(keys, config.num_hidden_layers, stored))
    # A size that differs is reported by transformers with a RuntimeError of several lines.
    try:
        model, loading = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights that do not fit {CONFIG_NAME} ({' '.join(str(error).split())})") from error
    missing = sorted(name for name in loading["missing_keys"] if not any(word in name for word in _UNUSED))
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
    if config.model_type not in MODEL_TYPES:
        size = config.image_size
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
        self._mean, self._std = tuple(mean), tuple(std)
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
        mean, std, native = _preprocessing(folder, full)
        if full.model_type not in MODEL_TYPES and image_size not in (None, native):
            raise ValueError(f"image_size: found {image_size}; accepted for {full.model_type}: {native}")
        model = _build(config, folder)
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
        pixels = normalize_views(fitted, self._mean, self._std).flatten(0, 1).to(next(self.model.parameters()).dtype)
        # The caller's autocast must not override the precision asked for.
        with torch.autocast(pixels.device.type, enabled=False):
            states = self.model(pixels, output_hidden_states=True).hidden_states
        grid = height // self.patch_size, width // self.patch_size
        special = states[-1].shape[1] - grid[0] * grid[1]
        if special < 0:
            raise ValueError(f"teacher: found {states[-1].shape[1]} tokens; accepted: one of each patch, {grid}")
        features = tuple(states[i + 1][:, special:].unflatten(0, (batch, views)) for i in self.layers)
        return TeacherFeatures(features, grid, (height, width))
