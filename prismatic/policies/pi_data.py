"""Data of pi0 and pi0.5: a frame of any dataset to their sample, samples to a batch; the images that they see.

Not obvious:
- Noise and time of a sample are drawn from the data's seed, the epoch and the frame. A resumed run, on any number of
  processes, trains on the same ones.
- A crop is taken out of the camera's picture before the letterbox, so that bars stay where they are. openpi crops
  after it; for square pictures that is the same.
- openpi also turns images by up to 5 degrees, which is not done here: stored features of a teacher cannot be turned.
- As openpi's, a wrist camera's colors are changed, and it is not cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismatic.models.pi.images import fitted_size, pil_letterbox, to_pixel_values
from prismatic.models.pi.prompts import prompt_text, tokenize
from prismatic.vla.batch import Batch, Frame, Sample
from prismatic.vla.datasets.image_transforms import (
    FULL_IMAGE,
    AugmentDraw,
    AugmentRanges,
    PixelBox,
    PolicyImageTransform,
    adjust_colors,
    jpeg_round_trip,
)

# openpi's ranges.
PI_RANGES = AugmentRanges(crop_area=0.95**2, brightness=0.3, contrast=(0.6, 1.4), saturation=(0.5, 1.5), hue=0.0)
_NOISE = 8  # Keeps the draws of noise apart from others of the same seed.


@dataclass(frozen=True)
class LetterboxTransform(PolicyImageTransform):
    """Camera image -> letterboxed image of the policy's size, for training and for rollouts."""

    def draw(self, rng: np.random.Generator, view: str = "") -> AugmentDraw | None:
        """An augmentation for one training image of a view; None without augmentation."""
        draw = super().draw(rng, view)
        return draw._replace(crop=FULL_IMAGE) if draw is not None and "wrist" in view else draw

    def content(self, image_hw: tuple[int, ...]) -> PixelBox:
        """The part of the result between the bars."""
        height, width, top, left = fitted_size(image_hw[0], image_hw[1], self.size[0])
        return top, left, top + height, left + width

    def train(self, image_HW3: np.ndarray, draw: AugmentDraw | None) -> np.ndarray:
        """A stored training frame letterboxed, and augmented with `draw`, uint8; bars stay black."""
        if draw is None:
            return pil_letterbox(image_HW3, self.size[0])
        boxed = pil_letterbox(_cropped(image_HW3, draw), self.size[0])
        top, left, bottom, right = self.content(image_HW3.shape)
        planar = np.ascontiguousarray(boxed[top:bottom, left:right].transpose(2, 0, 1), dtype=np.float32)
        planar *= np.float32(1 / 255)
        adjust_colors(planar, draw)
        boxed = np.zeros_like(boxed)
        boxed[top:bottom, left:right] = np.rint(planar * 255).astype(np.uint8).transpose(1, 2, 0)
        return boxed

    def rollout(self, image_HW3: np.ndarray) -> np.ndarray:
        """A rendered observation as training frames are: through JPEG, then letterboxed; never cropped."""
        return pil_letterbox(jpeg_round_trip(image_HW3), self.size[0])


def _cropped(image_HW3: np.ndarray, draw: AugmentDraw) -> np.ndarray:
    """The crop's pixels, in the aspect of the whole image."""
    height, width = image_HW3.shape[:2]
    crop = draw.crop
    rows, columns = round(crop.height * height), round(crop.width * width)
    top, left = min(round(crop.top * height), height - rows), min(round(crop.left * width), width - columns)
    return np.ascontiguousarray(image_HW3[top : top + rows, left : left + columns])


class PiImageProcessor(SimpleNamespace):
    """Pixels in [-1, 1], of one "featurizer"; see :class:`prismatic.policies.base.ImageProcessor`."""

    def __init__(self, side: int) -> None:
        super().__init__(means=((0.5,) * 3,), stds=((0.5,) * 3,), input_sizes=((3, side, side),))

    def apply_transform(self, image: Any) -> Tensor:
        """PIL image or uint8 array (H, W, 3) -> (3, H, W)."""
        return to_pixel_values(torch.from_numpy(np.array(image)).permute(2, 0, 1))


@dataclass
class PiProcessor:
    """Prompts and images of a checkpoint; see :class:`prismatic.policies.base.Processor`."""

    config: Any
    tokenizer: Any
    image_processor: PiImageProcessor

    def prompt_ids(self, instructions: Sequence[str], states: Sequence[np.ndarray | None] | None) -> list[Tensor]:
        """Token ids of each prompt, without padding; `states` are those that pi0.5 reads in words, normalized."""
        pairs = zip(instructions, states or [None] * len(instructions), strict=True)
        ids, mask = tokenize(self.tokenizer, [prompt_text(*pair) for pair in pairs], self.config.prompt_length)
        return [row[kept] for row, kept in zip(ids, mask)]

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


@dataclass
class PiBatchTransform:
    """Builds the sample of a frame.

    Attributes:
        processor: of the model.
        kind: "pi0" or "pi05".
        use_proprio: the policy sees the robot's state: pi0 as a token, pi0.5 in the prompt.
        num_images: views.
        use_wrist_image: more than one view.
        draws: noises and times of a sample, behind one another where there are several.
    """

    processor: PiProcessor
    kind: str
    use_proprio: bool
    num_images: int
    draws: int = 1

    @property
    def use_wrist_image(self) -> bool:
        """Views beside the first one."""
        return self.num_images > 1

    def __call__(self, frame: Frame) -> Sample:
        """See :class:`prismatic.vla.batch.Batch` for the tensors."""
        observation, config = frame["observation"], self.processor.config
        instruction = frame["task"]["language_instruction"]
        text = instruction.decode() if isinstance(instruction, bytes) else instruction
        state = observation["proprio"].reshape(-1) if self.use_proprio else None
        transform = self.processor.image_processor.apply_transform
        views = [name for name in observation if name.startswith("image_")][: self.num_images]
        boxes = [frame["views"][name.removeprefix("image_")] for name in views]
        seed, epoch, number = frame["draw"]
        rng = np.random.default_rng((seed, _NOISE, epoch, number))
        several = () if self.draws == 1 else (self.draws,)
        time = rng.beta(config.time_sampling_beta_alpha, config.time_sampling_beta_beta, several)
        scaled = time * config.time_sampling_scale + config.time_sampling_offset
        noise = rng.standard_normal((*several, len(frame["action"]), config.max_action_dim), dtype=np.float32)
        sample = Sample(
            pixel_values=torch.cat([transform(observation[name][0]) for name in views]),
            image_masks=torch.tensor([box is not None for box in boxes]),
            contents=torch.tensor([box or (0, 0, 0, 0) for box in boxes]),
            input_ids=self.processor.prompt_ids([text], None if self.kind == "pi0" else [state])[0],
            actions=padded(frame["action"], config.max_action_dim),
            noise=torch.from_numpy(noise),
            time=torch.as_tensor(scaled, dtype=torch.float32),
            dataset_name=frame["dataset_name"],
        )
        sample["proprio"] = padded(np.zeros(0) if state is None else state, config.max_state_dim)
        return sample


def padded(values: np.ndarray, width: int) -> np.ndarray:
    """`values` (..., w) with zeros behind, float32 (..., width)."""
    zeros = np.zeros((*values.shape[:-1], width - values.shape[-1]), np.float32)
    return np.concatenate([values.astype(np.float32), zeros], axis=-1)


def pad_prompts(prompts: Sequence[Tensor], length: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) with zeros behind, to `length` or the longest, and their mask."""
    lengths = torch.tensor([len(tokens) for tokens in prompts])
    ids = torch.zeros(len(prompts), max(length, int(lengths.max())), dtype=torch.long)
    for row, tokens in zip(ids, prompts):
        row[: len(tokens)] = tokens
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples to a batch; prompts are padded to the longest."""
    input_ids, attention_mask = pad_prompts([sample["input_ids"] for sample in samples])
    masks = torch.stack([sample["image_masks"] for sample in samples])
    batch = Batch(
        pixel_values=torch.stack([sample["pixel_values"] for sample in samples]),
        image_masks=masks,
        cameras=[tuple(row) for row in masks.tolist()],
        contents=torch.stack([sample["contents"] for sample in samples]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        actions=torch.from_numpy(np.stack([sample["actions"] for sample in samples])),
        proprio=torch.from_numpy(np.stack([sample["proprio"] for sample in samples])),
        noise=torch.stack([sample["noise"] for sample in samples]),
        time=torch.stack([sample["time"] for sample in samples]),
        dataset_names=[sample["dataset_name"] for sample in samples],
    )
    if "extras" in samples[0]:
        names = samples[0]["extras"]
        batch["extras"] = {name: torch.stack([sample["extras"][name] for sample in samples]) for name in names}
    return batch
