"""Types that the data hand on: a frame, the sample made of it, the batch of samples.

B batch, V views, S sequence, T chunk, A action and P proprio numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch


class Frame(TypedDict):
    """A frame of a dataset, resized, augmented and normalized, in upstream's layout.

    action: (T, A) float32.
    observation: image_{view} (1, H, W, 3) uint8 for every view in the order the policy sees them, proprio (1, P)
        float32 where the robot has states, timestep (1,) int64.
    task: language_instruction, as text or UTF-8 bytes.
    """

    dataset_name: str
    action: np.ndarray
    observation: dict[str, np.ndarray]
    task: dict[str, str | bytes]


class _AlwaysInSample(TypedDict):
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    actions: np.ndarray
    dataset_name: str


class Sample(_AlwaysInSample, total=False):
    """One row of a :class:`Batch` before padding; every view but the first is in `pixel_values_wrist`."""

    pixel_values_wrist: torch.Tensor
    proprio: np.ndarray
    extras: Mapping[str, torch.Tensor]


class _AlwaysInBatch(TypedDict):
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    actions: torch.Tensor


class Batch(_AlwaysInBatch, total=False):
    """Samples as :class:`prismatic.util.data_utils.PaddedCollatorForActionPrediction` collates them.

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
    """

    proprio: torch.Tensor
    dataset_names: list[str]
    extras: dict[str, torch.Tensor]
    diffusion_noise: torch.Tensor
