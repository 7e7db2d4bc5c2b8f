"""Types that the data hand on: a frame, the sample made of it, the batch of samples.

B batch, V views, S sequence, T chunk, A action and P proprio numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
import torch


class Frame(TypedDict):
    """A frame of a dataset, resized, augmented and normalized, in upstream's layout.

    action: (T, A) float32.
    views: for every view the part of its image that a camera filled, in pixels (top, left, bottom, right), or None
        where the dataset has no such camera and the image is black.
    draw: seed of the data, epoch and frame: all that a sample may depend on beside the data.
    observation: image_{view} (1, H, W, 3) uint8 for every view in the order the policy sees them, proprio (1, P)
        float32 where the robot has states, timestep (1,) int64.
    task: language_instruction, as text or UTF-8 bytes.
    """

    dataset_name: str
    action: np.ndarray
    observation: dict[str, np.ndarray]
    task: dict[str, str | bytes]
    views: dict[str, tuple[int, int, int, int] | None]
    draw: tuple[int, int, int]


class _AlwaysInSample(TypedDict):
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    actions: np.ndarray
    dataset_name: str


class Sample(_AlwaysInSample, total=False):
    """One row of a :class:`Batch` before padding; OpenVLA's have every view but the first in `pixel_values_wrist`."""

    labels: torch.Tensor
    deferred: Any
    pixel_values_wrist: torch.Tensor
    image_masks: torch.Tensor
    contents: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    proprio: np.ndarray
    extras: Mapping[str, torch.Tensor]


class _AlwaysInBatch(TypedDict):
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    actions: torch.Tensor


class Batch(_AlwaysInBatch, total=False):
    """Samples as the family's collator puts them together, OpenVLA's
    :class:`prismatic.util.data_utils.PaddedCollatorForActionPrediction`.

    pixel_values: (B, 6 * V, H, W) float32; views in order primary, wrist(s); the 6 channels of a view are its RGB
        normalized for the first vision tower (DINOv2) and again for the second (SigLIP). A single-tower model has 3.
    input_ids: (B, S) int64, right-padded: BOS, prompt, T * A action tokens, stop.
    attention_mask: (B, S) bool, False on padding.
    labels: (B, S) int64; -100 everywhere but on action tokens and stop.
    actions: (B, T, A) float32, normalized.
    proprio: (B, P) float32, normalized; absent when the policy does not use it.
    dataset_names: B names; absent when the samples carry none.
    extras: tensors (B, ...) of what is stored beside the data, see `RLDSDataset.extras`; absent when nothing is.
    diffusion_noise: (B, T, A), the noise that the diffusion objective put into the actions; absent before.

    pi0 and pi0.5: `pixel_values` (B, 3 * V, H, W) in [-1, 1], no labels, `actions` and `proprio` padded with zeros to
    the model's width, and
    image_masks: (B, V) bool, False where the dataset has no such camera.
    cameras: the same as tuples on the host.
    contents: (B, V, 4) int64, the part of an image that the camera filled, see `Frame.views`.
    noise: (B, T, width), time: (B,): where between actions and noise the sample is trained.
    """

    labels: torch.Tensor
    image_masks: torch.Tensor
    cameras: list[tuple[bool, ...]]
    contents: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    proprio: torch.Tensor
    dataset_names: list[str]
    extras: dict[str, torch.Tensor]
    diffusion_noise: torch.Tensor
