"""One frame of a dataset -> one training sample: pixels, prompt and action tokens, labels, normalized actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from prismatic.vla.action_tokenizer import action_prompt
from prismatic.vla.batch import Frame, Sample
from prismatic.vla.constants import EMPTY_TOKEN_ID, IGNORE_INDEX, STOP_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prismatic.vla.action_tokenizer import ActionTokenizer

_MAX_PROMPTS = 10_000


@dataclass
class RLDSBatchTransform:
    """Builds the sample of a frame in upstream's layout.

    The sequence is BOS, prompt, the lone word-boundary token, one token for each number of the action chunk, stop.
    Labels are -100 before the first action token.
    """

    action_tokenizer: ActionTokenizer  # Normalized actions -> token ids
    base_tokenizer: PreTrainedTokenizerBase  # The language model's tokenizer
    # PIL image -> (6, H, W) tensor; the processor's `image_processor.apply_transform`
    image_transform: Callable[[Image.Image], torch.Tensor]
    prompt_builder_fn: Callable[[str], str] = action_prompt  # Instruction -> prompt
    predict_stop_token: bool = True  # Whether the stop token has a label
    use_wrist_image: bool = False  # Whether the sample holds the views after the first (the wrist's, or others)
    use_proprio: bool = False  # Whether it holds the proprioceptive state
    # With these views, how many the dataset is to read in all; None for as many as it has
    num_images: int | None = None
    _prompt_ids: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rlds_batch: Frame) -> Sample:
        """Transform one frame; its first view is "image_primary", or the first there is.

        See :class:`Frame` for what it holds, and :class:`prismatic.vla.batch.Batch`, whose row the sample is.
        """
        observation, actions = rlds_batch["observation"], rlds_batch["action"]
        instruction = rlds_batch["task"]["language_instruction"]
        prompt = self._prompt(instruction.decode() if isinstance(instruction, bytes) else instruction)
        action_ids = self.action_tokenizer.encode_actions_to_token_ids(actions).ravel().tolist()
        input_ids = torch.tensor([*prompt, *action_ids, STOP_INDEX])
        labels = input_ids.clone()
        labels[: len(prompt)] = IGNORE_INDEX
        if not self.predict_stop_token:
            labels[-1] = IGNORE_INDEX
        sample: Sample = {  # type: ignore[typeddict-item]
            **self._images(rlds_batch),
            "input_ids": input_ids,
            "labels": labels,
            "dataset_name": rlds_batch["dataset_name"],
            "actions": actions,
        }
        if self.use_proprio:
            sample["proprio"] = observation["proprio"]
        return sample

    def _views(self, names: list[str], primary: str) -> list[str]:
        """The views that the sample holds, the main one first."""
        first = primary if primary in names else names[0]
        return [first, *(name for name in names if name != first)] if self.use_wrist_image else [first]

    def _images(self, rlds_batch: Frame) -> Any:
        """The sample's entries for its images."""
        observation = rlds_batch["observation"]
        names = [name for name in observation if name.startswith("image_")]
        pixels = [self._pixels(observation[name]) for name in self._views(names, "image_primary")]
        if not self.use_wrist_image:
            return {"pixel_values": pixels[0]}
        further = pixels[1:]
        return {"pixel_values": pixels[0], "pixel_values_wrist": torch.cat(further) if len(further) > 1 else further[0]}

    def _prompt(self, instruction: str) -> list[int]:
        """Token ids up to the first action token; kept for some thousand instructions, most data have fewer."""
        ids = self._prompt_ids.get(instruction)
        if ids is None:
            if len(self._prompt_ids) >= _MAX_PROMPTS:
                self._prompt_ids.clear()
            ids = self.base_tokenizer(self.prompt_builder_fn(instruction), add_special_tokens=True).input_ids
            if ids[-1] != EMPTY_TOKEN_ID:
                ids = [*ids, EMPTY_TOKEN_ID]
            self._prompt_ids[instruction] = ids
        return ids

    def _pixels(self, image_1HW3: np.ndarray) -> torch.Tensor:
        if getattr(self.image_transform, "takes_arrays", False):
            return self.image_transform(image_1HW3[0])  # type: ignore[arg-type]
        return self.image_transform(Image.fromarray(image_1HW3[0]))
