"""Models of timm as teachers: any that hands out intermediate features, and the frozen copy of an OpenVLA policy's own
primary vision encoder.

Not obvious:
- A layer is what timm's `forward_intermediates` counts: a block of a vision transformer, a stage of a convolutional
  network. No norm is applied, and blocks behind the last layer are dropped where the model can.
- Every view is resized whole to the model's own size and seen alone.
- timm is imported when a model is built, so that nothing else here needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rocket_align.layers import resolve_layers
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.files import CONFIG_NAME, PREPROCESSOR_NAME, local_copy, read_object
from rocket_align.teacher.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize_views, resize_views
from rocket_align.teacher.vit import read_tensors


@dataclass(frozen=True)
class TimmSource:
    """Facts in a folder's configuration: how to build the model, and what its images look like."""

    architecture: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    prefix: str = ""  # Of the tensors' names

    def build(self, device: str = "cpu") -> Any:
        """The model with random weights.

        Raises ValueError: an architecture that timm does not have, or one without intermediate features; one line.
        """
        import timm

        try:
            with torch.device(device):
                model = timm.create_model(self.architecture, pretrained=False, **{**self.options, "num_classes": 0})
        except (RuntimeError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.architecture}: timm {timm.__version__} cannot build it ({reason})") from error
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{self.architecture}: accepted: a timm model with forward_intermediates")
        return model


def read_timm_source(folder: Path) -> TimmSource:
    """Read config.json of a model in timm's layout, or of an OpenVLA policy.

    Raises ValueError: values that are missing or of another kind; one line.
    """
    file = folder / CONFIG_NAME
    values = read_object(file)
    try:
        if values.get("model_type") == "openvla":
            return _openvla_source(folder, values)
        images = values.get("pretrained_cfg", {})
        options = {**values.get("model_args", {}), "pretrained_cfg": images}
        colors = tuple(images.get("mean", IMAGENET_MEAN)), tuple(images.get("std", IMAGENET_STD))
        return TimmSource(str(values["architecture"]), int(images["input_size"][-1]), options, *colors)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a model of timm or OpenVLA ({type(error).__name__}: {error})") from error


def _openvla_source(folder: Path, values: dict[str, Any]) -> TimmSource:
    size = int(values["image_sizes"][0])
    options: dict[str, Any] = {"img_size": size, **(values.get("timm_override_kwargs") or [{}])[0]}
    if activation := (values.get("timm_override_act_layers") or [None])[0]:
        options["act_layer"] = activation
    images = read_object(folder / PREPROCESSOR_NAME)
    colors = tuple(images["means"][0]), tuple(images["stds"][0])
    prefix = "vision_backbone.featurizer."
    return TimmSource(str(values["timm_model_ids"][0]), size, options, *colors, prefix)


def describe_timm(folder: Path) -> tuple[int, int]:
    """Layers, and channels of the last, from the configuration alone."""
    info = read_timm_source(folder).build("meta").feature_info
    return len(info), int(info[-1]["num_chs"])


class TimmTeacher(nn.Module):
    """A frozen model of timm.

    Args:
        model: one with `forward_intermediates`.
        layers: 0-based blocks or stages whose outputs are the features.
        mean, std: what pixels in [0, 1] are normalized with.
        image_size: pixels of a view's sides, as the model sees it.
    """

    def __init__(
        self, model: Any, layers: tuple[int, ...], mean: Sequence[float], std: Sequence[float], *, image_size: int
    ) -> None:
        super().__init__()
        self.model, self.layers, self.image_size = model, layers, image_size
        self._mean, self._std = tuple(mean), tuple(std)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        layers: str | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TimmTeacher:
        """Load a folder or hub id in timm's layout, or an OpenVLA policy's primary vision encoder (safetensors).

        Args:
            layers: 0-based, negative ones from the end; integers or a comma string; any order, also repeated.

        Raises:
            ValueError: nothing usable at `path`, weights that do not fit, or layers out of range; one line.
        """
        folder = local_copy(path)
        source = read_timm_source(folder)
        model = source.build()
        chosen = resolve_layers(layers, len(model.feature_info), convention="python")
        if not chosen:
            raise ValueError("layers: found none; accepted: at least one teacher layer")
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers(sorted(set(chosen)), prune_norm=True, prune_head=True)
        # OpenVLA's files have their own name for timm's `gamma`.
        names = {key: source.prefix + key for key in model.state_dict()}
        if source.prefix:
            names = {key: name.replace(".gamma", ".scale_factor") for key, name in names.items()}
        weights = read_tensors(folder, lambda _: names)
        missing = [names[key] for key in names if key not in weights]
        if missing:
            raise ValueError(f"{folder}: missing {', '.join(missing[:3])} ({len(missing)} in all)")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: weights that do not fit {CONFIG_NAME} ({reason})") from error
        teacher = cls(model, chosen, source.mean, source.std, image_size=source.size)
        return teacher.to(device=device, dtype=dtype)

    def train(self, mode: bool = True) -> TimmTeacher:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BV3HW: Tensor) -> TeacherFeatures:
        """Features of `self.layers`, in that order, in the precision of the weights.

        Args:
            images_BV3HW: values in [0, 1] (clamped to it), any size: resized here, on the device.

        Returns:
            Features of shape (B, V, P, channels), without class and register tokens.

        Raises:
            ValueError: layers whose grids differ, as stages of a convolutional network do.
        """
        batch, views = images_BV3HW.shape[:2]
        images = resize_views(images_BV3HW.float().clamp(0, 1), self.image_size)
        pixels = normalize_views(images, self._mean, self._std).flatten(0, 1)
        wanted = sorted(set(self.layers))
        with torch.autocast(pixels.device.type, enabled=False):
            maps = self.model.forward_intermediates(
                pixels.to(next(self.model.parameters()).dtype), indices=wanted, norm=False, intermediates_only=True
            )
        grids = {tuple(features.shape[-2:]) for features in maps}
        if len(grids) > 1:
            raise ValueError(f"layers: found grids {sorted(grids)} in {wanted}; accepted: layers of one grid")
        flat = {
            layer: tokens.flatten(2).transpose(1, 2).unflatten(0, (batch, views)) for layer, tokens in zip(wanted, maps)
        }
        size = (self.image_size, self.image_size)
        return TeacherFeatures(tuple(flat[layer] for layer in self.layers), grids.pop(), size)
