"""The batch that the data hand to training. B batch, V views, S sequence, T chunk, A action and P proprio numbers."""

from __future__ import annotations

from typing import TypedDict

import torch


class _Always(TypedDict):
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    actions: torch.Tensor


class Batch(_Always, total=False):
    """What :class:`prismatic.util.data_utils.PaddedCollatorForActionPrediction` returns.

    pixel_values: (B, 6 * V, H, W) float32; views in order primary, wrist(s); the 6 channels of a view are its RGB
        normalized for the first vision tower (DINOv2) and again for the second (SigLIP). A single-tower model has 3.
    input_ids: (B, S) int64, right-padded: BOS, prompt, T * A action tokens, stop.
    attention_mask: (B, S) bool, False on padding.
    labels: (B, S) int64; -100 everywhere but on action tokens and stop.
    actions: (B, T, A) float32, normalized.
    proprio: (B, P) float32, normalized; absent when the policy does not use it.
    dataset_names: B names; absent when the samples carry none.
    extras: tensors (B, ...) of what is stored beside the data, see `RLDSDataset.extras`; absent when nothing is.
    """

    proprio: torch.Tensor
    dataset_names: list[str]
    extras: dict[str, torch.Tensor]
