"""Putting samples together to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from prismatic.vla.batch import Batch, Sample
from prismatic.vla.constants import IGNORE_INDEX


@dataclass
class PaddedCollatorForActionPrediction:
    """Right-pads the token sequences and stacks the rest; see :class:`prismatic.vla.batch.Batch` for the shapes."""

    model_max_length: int  # Longest sequence the model takes
    pad_token_id: int  # Id that fills `input_ids`; the attention mask is False exactly there
    padding_side: str = "right"  # "right" only, the side the bidirectional policy is trained with
    pixel_values_dtype: torch.dtype = torch.float32  # Type of `pixel_values`

    def __post_init__(self) -> None:
        if self.padding_side != "right":
            raise ValueError(f"padding_side is {self.padding_side!r}; accepted: right")

    def __call__(self, instances: Sequence[Sample]) -> Batch:
        """Collate samples of :class:`prismatic.vla.datasets.RLDSBatchTransform`.

        Raises ValueError: a sequence is longer than `model_max_length` (cutting it would lose action tokens).
        """
        longest = max(len(instance["input_ids"]) for instance in instances)
        if longest > self.model_max_length:
            raise ValueError(
                f"a sequence has {longest} tokens; accepted: at most {self.model_max_length}, instruction too long"
            )
        input_ids = self._pad([instance["input_ids"] for instance in instances], self.pad_token_id)
        batch = Batch(  # type: ignore[typeddict-item]
            **self._images(instances),
            input_ids=input_ids,
            attention_mask=input_ids.ne(self.pad_token_id),
            labels=self._pad([instance["labels"] for instance in instances], IGNORE_INDEX),
            actions=_stack([instance["actions"] for instance in instances]),
        )
        if "proprio" in instances[0]:
            # A sample's proprio is (window 1, P).
            batch["proprio"] = _stack([instance["proprio"] for instance in instances]).flatten(1)
        if "dataset_name" in instances[0]:
            batch["dataset_names"] = [instance["dataset_name"] for instance in instances]
        if "extras" in instances[0]:
            names = instances[0]["extras"]
            batch["extras"] = {
                name: torch.stack([instance["extras"][name] for instance in instances]) for name in names
            }
        return batch

    def _pad(self, sequences: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(list(sequences), batch_first=True, padding_value=value)

    def _images(self, instances: Sequence[Sample]) -> Any:
        if "deferred" in instances[0]:
            samples = [instance["deferred"] for instance in instances]
            return {"deferred": samples[0].collate(samples)}
        return {"pixel_values": self._pixels(instances)}

    def _pixels(self, instances: Sequence[Sample]) -> torch.Tensor:
        names = [name for name in ("pixel_values", "pixel_values_wrist") if name in instances[0]]
        views = [[instance[name] for name in names] for instance in instances]
        channels = sum(len(view) for view in views[0])
        # Every view is copied once, into its place; stacking and then joining the views would copy it twice.
        pixels = torch.empty(len(views), channels, *views[0][0].shape[1:], dtype=self.pixel_values_dtype)
        for row, parts in zip(pixels, views, strict=True):
            for place, part in zip(row.split([len(part) for part in parts]), parts, strict=True):
                place.copy_(part)
        return pixels


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(array, dtype=np.float32) for array in arrays]))
