"""The frozen VGGT teacher: images in, patch features of some aggregator layers out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rocket_align.layers import resolve_layers
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.preprocess import fit_images
from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, find_weights, load_strictly, read_weights


class VGGTTeacher(nn.Module):
    """A frozen VGGT aggregator cut after the last requested layer.

    Args:
        config: sizes of the full model.
        layers: 0-based aggregator layers, negative ones from the end; integers or a comma string; any order,
            also repeated.

    Raises:
        ValueError: no layer, or layers the model does not have.
    """

    def __init__(self, config: VGGTConfig, layers: str | Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.layers = resolve_layers(layers, config.depth, convention="python")
        if not self.layers:
            raise ValueError("layers: found none; accepted: at least one teacher layer")
        self.aggregator = VGGTAggregator(config, num_layers=max(self.layers) + 1)
        self._freeze()

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    @property
    def embed_dim(self) -> int:
        """Width of one attention stream; features have twice as many channels."""
        return self.config.embed_dim

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        layers: str | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> VGGTTeacher:
        """Load a folder (config.json + model.safetensors), VGGT-1B's folder (model.safetensors or model.pt), or a file.

        Without a config.json the sizes are VGGT-1B's. Weights of later layers and of the heads are not read. Raises
        ValueError: nothing at `path`, a file with missing or unexpected tensors, or layers out of range.
        """
        weights_path, config = find_weights(path)
        with torch.device("meta"):
            teacher = cls(config, layers)
        weights = read_weights(weights_path, num_layers=max(teacher.layers) + 1)
        load_strictly(teacher, weights, weights_path)
        teacher._freeze()
        return teacher.to(device=device, dtype=dtype)

    def train(self, mode: bool = True) -> VGGTTeacher:
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BV3HW: Tensor) -> TeacherFeatures:
        """Features of `self.layers`, in that order, in the precision of the weights.

        Args:
            images_BV3HW: values in [0, 1] (clamped to it), any size: resized here, on the device, to
                `config.image_size` (bicubic; a non-square image keeps its aspect ratio, see `fit_images`).

        Returns:
            Features of shape (B, V, P, 2 * embed_dim); special tokens dropped.
        """
        pixels = images_BV3HW.float().clamp(0, 1)
        fitted = fit_images(pixels, self.config.image_size, patch_size=self.config.patch_size)
        height, width = fitted.shape[-2:]
        # The caller's autocast must not override the precision asked for.
        with torch.autocast(fitted.device.type, enabled=False):
            features = self.aggregator(fitted, self.layers)
        patch = self.config.patch_size
        return TeacherFeatures(features, (height // patch, width // patch), (height, width))
