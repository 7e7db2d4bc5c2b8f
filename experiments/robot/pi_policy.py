"""pi0 and pi0.5 answer robots: see :class:`experiments.robot.policy.Policy`.

Not obvious:
- As openpi's server, the policy letterboxes whatever size comes, and crops nothing, `center_crop` or not. Rendered
  images go through JPEG first, as the data did; those of clients do not. LeRobot's checkpoints get LeRobot's letterbox.
- An answer has the robot's width and the units of the data. Checkpoints of this project close LIBERO's gripper at 0 and
  open it at 1; openpi's own, and LeRobot's, have the simulator's -1 (open) and +1.
- Action numbers that the statistics mark as `delta` were learned as differences to the state; answers are absolute.
  Of folders of openpi's and LeRobot's, which do not say it, `delta_actions` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments.robot.libero.suites.tasks import unnorm_key_for
from experiments.robot.openvla_utils import placement
from experiments.robot.policy import Array, PolicyFlags, Query
from prismatic.checkpoint.folder import Checkpoint, open_checkpoint, resolve_unnorm_key
from prismatic.checkpoint.foreign import for_robot
from prismatic.models.pi.images import letterbox, pil_letterbox
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.normalization import LEROBOT
from prismatic.policies.pi import load_acting, make_processor
from prismatic.policies.pi_data import LetterboxTransform, PiProcessor, pad_prompts, padded
from prismatic.vla.datasets.image_transforms import jpeg_round_trip
from prismatic.vla.datasets.statistics import openpi_normalizer
from prismatic.vla.datasets.transitions import check_deltas
from prismatic.vla.platforms import LIBERO, OpenPINormalization, Platform

PolicyT = TypeVar("PolicyT", bound="PiActingPolicy")


class PiActingPolicy:
    """A loaded checkpoint that answers batches of queries.

    Args:
        vla: the policy on its device.
        statistics: of the data, by name.
        cfg: num_images_in_input, use_proprio.

    Attributes:
        text_tokens: None pads prompts to the longest of a batch, another value to the model's prompt length.
    """

    text_tokens: int | None = None

    def __init__(
        self,
        vla: PiPolicy,
        processor: PiProcessor,
        statistics: Mapping[str, Any],
        platform: Platform,
        cfg: PolicyFlags,
        unnorm_key: str,
    ) -> None:
        self.vla, self.processor, self.statistics, self.platform = vla, processor, statistics, platform
        self.unnorm_key, self._cfg = unnorm_key, cfg
        height, width = processor.image_processor.input_sizes[0][-2:]
        self.image_hw = (int(height), int(width))

    @classmethod
    def from_checkpoint(cls: type[PolicyT], checkpoint: Checkpoint | str, cfg: PolicyFlags, unnorm_key: str) -> PolicyT:
        """Load everything from `checkpoint`. Raises UsageError: it lacks something or does not fit."""
        if isinstance(checkpoint, str):
            checkpoint = open_checkpoint(checkpoint, getattr(cfg, "base_checkpoint", "") or None)
        suite = getattr(cfg, "task_suite_name", "")
        find_key = unnorm_key_for if suite else resolve_unnorm_key
        key = find_key(checkpoint.statistics, unnorm_key, suite)
        told = getattr(cfg, "delta_actions", "")
        checkpoint = for_robot(checkpoint, key, told)
        for name, numbers in checkpoint.statistics.items():
            if (delta := numbers.get("action", {}).get("delta")) and not told:
                check_deltas(f"{checkpoint.path}: statistics of {name!r}", delta, checkpoint.platform)
        policy = load_acting(checkpoint, *placement(cfg))
        processor = make_processor(policy.config, checkpoint.processor_path)
        return cls(policy, processor, checkpoint.statistics, checkpoint.platform, cfg, key)

    @torch.no_grad()
    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> Array:
        """Un-normalized action chunks, float64 (B, T, A), for B queries.

        `unnorm_key` names other statistics than the policy's own.
        """
        statistics = self.statistics[unnorm_key or self.unnorm_key]
        device, config = next(self.vla.parameters()).device, self.vla.config
        states = self._states(queries, statistics)
        input_ids, attention_mask = self._prompts([query.instruction for query in queries], states)
        pixels = torch.stack([self._pixels(query) for query in queries])
        actions = self.vla.sample_actions(
            pixels.to(device),
            torch.ones(pixels.shape[:2], dtype=torch.bool, device=device),
            input_ids.to(device),
            attention_mask.to(device),
            torch.from_numpy(padded(np.stack(states), config.max_state_dim)).to(device),
            num_steps=config.num_inference_steps,
            noise=torch.stack([self._noise(query.seed) for query in queries]).to(device),
        )
        normalized = actions[..., : self.platform.action_dim].double().cpu().numpy()
        answer = openpi_normalizer(statistics["action"], self._kind).unnormalize(normalized)
        if delta := statistics["action"].get("delta"):
            counted = np.flatnonzero(delta)
            answer[..., counted] += np.stack([query.state[counted] for query in queries])[:, None]
        return answer

    @property
    def _kind(self) -> OpenPINormalization:
        kind = self.platform.normalization
        assert isinstance(kind, OpenPINormalization)
        return kind

    def _noise(self, seed: int) -> Tensor:
        shape = (self.vla.config.chunk_size, self.vla.config.max_action_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def _states(self, queries: Sequence[Query], statistics: Mapping[str, Any]) -> list[Array]:
        """Normalized states, of no number for a policy that sees none."""
        if not self._cfg.use_proprio:
            return [np.zeros(0)] * len(queries)
        normalizer = openpi_normalizer(statistics["proprio"], self._kind)
        return [normalizer.normalize(np.asarray(query.state, dtype=np.float64)) for query in queries]

    def _prompts(self, instructions: Sequence[str], states: Sequence[Array]) -> tuple[Tensor, Tensor]:
        spoken = states if self.vla.kind == "pi05" and self._cfg.use_proprio else None
        rows = self.processor.prompt_ids(instructions, spoken)
        return pad_prompts(rows, 0 if self.text_tokens is None else self.vla.config.prompt_length)

    def _pixels(self, query: Query) -> Tensor:
        """(V, 3, H, W) in [-1, 1]."""
        views = [query.image, query.wrist_image, *query.extra_images][: self._cfg.num_images_in_input]
        side, rendered = self.image_hw[0], LetterboxTransform(self.image_hw).rollout
        if self.platform.name == LEROBOT:
            ready = [_lerobot_letterbox(view if query.prepared else jpeg_round_trip(view), side) for view in views]
        else:
            ready = [pil_letterbox(view, side) if query.prepared else rendered(view) for view in views]
        return torch.stack([self.processor.image_processor.apply_transform(view) for view in ready])


def _lerobot_letterbox(image: Array, side: int) -> Array:
    return letterbox(torch.from_numpy(image).permute(2, 0, 1), side).permute(1, 2, 0).numpy()


class OpenPISimulated(PiActingPolicy):
    """A checkpoint of openpi or LeRobot in LIBERO: its gripper (-1 open, +1 closed) is answered as 1 open, 0 closed."""

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> Array:
        """See :meth:`PiActingPolicy.act`."""
        actions = super().act(queries, unnorm_key)
        if self.platform.action_dim == LIBERO.action_dim:  # Other robots' grippers are their own.
            actions[..., -1] = (1 - actions[..., -1]) / 2
        return actions
