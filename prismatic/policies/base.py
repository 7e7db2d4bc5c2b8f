"""The protocol of a policy family: what differs between OpenVLA and other policies, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from prismatic.vla.batch import Batch, Frame, Sample
from prismatic.vla.datasets.image_transforms import PolicyImageTransform
from prismatic.vla.platforms import Platform

if TYPE_CHECKING:
    from prismatic.checkpoint.folder import StartingPoint
    from prismatic.checkpoint.load import PolicyParts
    from prismatic.training.config import TrainConfig
    from prismatic.training.module import Coefficient, TrainablePolicy


class ImageProcessor(Protocol):
    """Normalization of a policy's images: per featurizer means and deviations, and (3, height, width)."""

    means: Sequence[Sequence[float]]
    stds: Sequence[Sequence[float]]
    input_sizes: Sequence[Sequence[int]]

    def apply_transform(self, image: Any, /) -> Tensor: ...


class Processor(Protocol):
    """Tokenizer and image processor of a model's folder."""

    tokenizer: Any
    image_processor: Any

    def save_pretrained(self, folder: Path, /) -> Any: ...


class PolicyFamily(Protocol):
    """One kind of policy."""

    name: str  # As `--policy` has it
    indexing: str  # How `--vla_layers_align` counts the student's states, see `rocket_align`
    unused_parameters: bool  # Some trainable parameters take no part in the loss, which DDP has to look for

    def check(self, config: TrainConfig, start: StartingPoint) -> None:
        """Refuse flags that the family does not have; reads no weights. Raises UsageError."""

    def platform(self, config: TrainConfig, base: str) -> Platform:
        """The robot of the flags, with the chunk and the normalization that the model has."""

    def depth(self, base: str) -> int:
        """Blocks of the language model, from the config file."""

    def patch_pixels(self, base: str) -> int:
        """Side of an image patch, from the config file. Raises UsageError where it does not tell."""

    def load_processor(self, folder: str | Path, flag: str = "--vla_path") -> Processor:
        """Tokenizer and image processor of a folder or hub id, which `flag` named."""

    def batch_transform(self, config: TrainConfig, processor: Any, platform: Platform) -> Callable[[Frame], Sample]:
        """Frame to sample."""

    def image_transform(self, processor: Any, *, image_aug: bool, image_crop: bool = True) -> PolicyImageTransform:
        """Camera image to the policy's image, for training and rollouts."""

    def collator(self, processor: Any) -> Callable[[Sequence[Sample]], Batch]:
        """Samples to batch."""

    def build(
        self,
        config: TrainConfig,
        start: StartingPoint,
        platform: Platform,
        dtype: torch.dtype,
        *,
        states: Sequence[int],
        report: Callable[[str], None],
    ) -> PolicyParts:
        """Model and heads, with what trains set to; `states` are the hidden states that another loss will use.

        Raises UsageError: weights are missing, damaged or of other shapes.
        """

    def trainable(
        self,
        config: TrainConfig,
        parts: PolicyParts,
        platform: Platform,
        processor: Any,
        auxiliary: nn.Module,
        coeff: Coefficient,
    ) -> TrainablePolicy:
        """The module that training wraps: policy, action loss and auxiliary loss behind one forward."""

    def student_dim(self, parts: PolicyParts) -> int:
        """Width of the hidden states."""

    def blocks(self, parts: PolicyParts) -> nn.ModuleList:
        """Blocks of the transformer that reads the image tokens."""

    def image_tokens(self, parts: PolicyParts) -> int:
        """Image tokens a view."""
