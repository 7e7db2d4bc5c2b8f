"""pi0 and pi0.5 with one forward pass for both: prefix and action expert go through their blocks side by side.

Not obvious:
- The prefix never sees the expert, so of its last block only keys and values matter. The rest of that block and the
  final norm are computed when someone listens (a hook on one of them) or `output_hidden_states` is set, otherwise not.
- Time 1 is noise and time 0 data. Its embedding is computed in float64, as openpi and LeRobot do: the highest frequency
  is 1,571, and float32 sines of it are 2e-5 off.
- A missing camera takes no position, so a camera that is missing in a whole batch may as well be left out.
- The heads (state, action and time layers) compute in float32 under autocast, too, as openpi's do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, PI0Config, SiglipVisionModel

from prismatic.models.pi.blocks import AdaptiveRMSNorm, Block, KeysValues, RMSNorm, rotary
from prismatic.models.pi.weights import load_weights, save_weights


@dataclass
class PiOutput:
    """Result of a training forward.

    Attributes:
        losses: squared error of each number, [B, chunk, action dim] in float32, or [B, R, chunk, action dim].
        velocity: the prediction, of the same shape and type.
        hidden_states: with the policy's `output_hidden_states`, the prefix [B, prefix, width] as it enters each block
            of the language model, and after the final norm.
    """

    losses: Tensor
    velocity: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Stream(nn.Module):
    """Blocks and final norm of one of the two transformers, and its embeddings where it reads tokens."""

    def __init__(self, config: GemmaConfig, *, adaptive: bool = False, embeddings: bool = False) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        if embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, adaptive=adaptive) for _ in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)


class ImageProjector(nn.Module):
    """Linear layer from the vision tower's width to the language model's."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Project [..., vision width] to [..., width]."""
        return self.linear(features)


class PiPolicy(nn.Module):
    """pi0 (`config.model_type` "pi0") or pi0.5 ("pi05").

    Modules: `vision_tower`, `multi_modal_projector`, `language_model.layers[i]`, `language_model.norm`,
    `expert.layers[i]`, `expert.norm`, and the heads. A block's output is a tuple whose first entry is the state
    [B, prefix, width]; the prefix is [camera 0 | camera 1 | ... | language]. Set `output_hidden_states` to get these.
    """

    base_model_prefix = ""  # PEFT asks for it where a part is transformers' (here the vision tower).

    def __init__(self, config: PI0Config) -> None:
        super().__init__()
        self.config = cast(Any, config)  # Its parts may be dictionaries by their types, and never are.
        self.kind: str = config.model_type
        vision, text, expert = (
            self.config.vlm_config.vision_config,
            self.config.vlm_config.text_config,
            self.config.dit_config,
        )
        adaptive = self.kind == "pi05"
        self.vision_tower = SiglipVisionModel(vision)
        self.multi_modal_projector = ImageProjector(vision.hidden_size, text.hidden_size)
        self.language_model = Stream(text, embeddings=True)
        self.expert = Stream(expert, adaptive=adaptive)
        width = expert.hidden_size
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        if adaptive:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.max_state_dim, width)
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.output_hidden_states = False

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> PiPolicy:
        """Load a checkpoint folder of openpi (PyTorch), LeRobot, transformers or ours, in evaluation mode on the CPU.

        Raises:
            UsageError: see :func:`prismatic.models.pi.weights.load_weights`.
        """
        policy = load_weights(Path(folder), cls, dtype)
        embeddings: Any = policy.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # The only buffer, in no file.
        return policy.eval()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights, or those of `state_dict` by the same names, and config.json.

        openpi, LeRobot and transformers read the weights; transformers reads pi0's config.json.
        """
        save_weights(Path(folder), self.state_dict() if state_dict is None else state_dict)
        self.config.save_pretrained(folder)

    @property
    def tokens_per_image(self) -> int:
        """Prefix tokens of one camera."""
        return cast(Any, self.vision_tower.embeddings).num_patches

    @property
    def gradient_checkpointing(self) -> bool:
        """True when training recomputes the blocks in the backward pass; see :meth:`gradient_checkpointing_enable`."""
        return all(block.gradient_checkpointing for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return [*self.language_model.layers, *self.expert.layers]  # type: ignore[list-item]

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute the blocks of both streams and of the vision tower in the backward pass of training."""
        for block in self._blocks():
            block.gradient_checkpointing = enabled
        # transformers 5.24 renames the methods.
        tower, verb = self.vision_tower, "enable" if enabled else "disable"
        switch = getattr(tower, f"activation_checkpointing_{verb}", None) or getattr(
            tower, f"gradient_checkpointing_{verb}"
        )
        switch(*([{"use_reentrant": False}] if enabled else []))

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.gradient_checkpointing_enable(False)

    def forward(
        self,
        pixel_values: Tensor,
        image_masks: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        state: Tensor | None,
        actions: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> PiOutput:
        """Predict the velocity from data to noise at a point between, and its squared errors.

        Args:
            pixel_values: [B, C, 3, H, W] in [-1, 1].
            image_masks: bool [B, C], False for a missing camera.
            input_ids: [B, T], the prompt, right padded.
            attention_mask: bool [B, T], False for padding.
            state: [B, max_state_dim], normalized and zero padded; pi0.5 has it in the prompt and ignores it here.
            actions: [B, chunk, max_action_dim], normalized and zero padded.
            noise: like `actions`, or [B, R, chunk, max_action_dim]: R points of each sample, for which the prefix runs
                once. Drawn from the global generator when absent, as `time` is.
            time: [B], or [B, R], in (0, 1].
        """
        actions = actions.float()
        noise = torch.randn_like(actions) if noise is None else noise.float()
        time = self.draw_times(len(actions), actions.device) if time is None else time.float()
        prefix, prefix_mask = self.embed_prefix(pixel_values, image_masks, input_ids, attention_mask)
        states: list[Tensor] = []
        pasts = self._prefix_blocks(prefix, prefix_mask, states if self.output_hidden_states else None)
        shape = noise.shape
        if noise.ndim == 4:
            repeat = partial(torch.repeat_interleave, repeats=shape[1], dim=0)
            pasts = ((repeat(keys), repeat(values)) for keys, values in pasts)
            prefix_mask, actions, state = repeat(prefix_mask), repeat(actions), None if state is None else repeat(state)
            noise, time = noise.flatten(0, 1), time.flatten()
        at = time[:, None, None]
        suffix, condition = self.embed_suffix(state, at * noise + (1 - at) * actions, time)
        velocity = self._velocity(suffix, condition, pasts, prefix_mask, actions.shape[1])
        losses = F.mse_loss(velocity, noise - actions, reduction="none")
        return PiOutput(losses.view(shape), velocity.view(shape), tuple(states))

    @torch.no_grad()
    def sample_actions(
        self,
        pixel_values: Tensor,
        image_masks: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        state: Tensor | None,
        num_steps: int = 10,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Integrate from noise to actions [B, chunk, max_action_dim] (normalized) in `num_steps` Euler steps.

        Keys and values of the prefix are computed once.
        """
        shape = (len(input_ids), self.config.chunk_size, self.config.max_action_dim)
        actions = torch.randn(shape, device=input_ids.device) if noise is None else noise.float()
        prefix, prefix_mask = self.embed_prefix(pixel_values, image_masks, input_ids, attention_mask)
        pasts = list(self._prefix_blocks(prefix, prefix_mask))
        for step in range(num_steps):
            time = torch.full((shape[0],), 1 - step / num_steps, device=actions.device)
            suffix, condition = self.embed_suffix(state, actions, time)
            velocity = self._velocity(suffix, condition, iter(pasts), prefix_mask, actions.shape[1])
            actions = actions - velocity / num_steps
        return actions

    def draw_times(self, batch: int, device: torch.device) -> Tensor:
        """Draw `batch` times in (0, 1] from the configured Beta distribution, which favors noise."""
        config = self.config
        alpha, beta = (
            torch.tensor(value, dtype=torch.float32, device=device)
            for value in (config.time_sampling_beta_alpha, config.time_sampling_beta_beta)
        )
        drawn = torch.distributions.Beta(alpha, beta).sample((batch,))
        return drawn * config.time_sampling_scale + config.time_sampling_offset

    def embed_prefix(
        self, pixel_values: Tensor, image_masks: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States [B, C * tokens_per_image + T, width] that enter the first block, and their bool mask [B, prefix]."""
        batch, cameras = image_masks.shape
        features = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state
        images = self.multi_modal_projector(features).unflatten(0, (batch, cameras)).flatten(1, 2)
        embeddings = self.language_model.embed_tokens
        words = embeddings(input_ids) * math.sqrt(embeddings.embedding_dim)
        prefix = torch.cat([images.to(words.dtype), words], dim=1)
        image_mask = image_masks.bool().repeat_interleave(self.tokens_per_image, dim=1)
        return prefix, torch.cat([image_mask, attention_mask.bool()], dim=1)

    def embed_suffix(self, state: Tensor | None, noisy_actions: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """States that enter the expert (pi0: one of `state` before the chunk's), and pi0.5's condition [B, D]."""
        with torch.autocast(noisy_actions.device.type, enabled=False):
            weight = self.action_in_proj.weight
            embedded = self.action_in_proj(noisy_actions.to(weight.dtype))
            times = self._embed_time(time).to(weight.dtype)
            if self.kind == "pi05":
                return embedded, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(times))))
            if state is None:
                raise ValueError("state: None found; accepted: a tensor [B, max_state_dim] for pi0")
            pairs = torch.cat([embedded, times[:, None].expand_as(embedded)], dim=-1)
            embedded = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(pairs)))
            return torch.cat([self.state_proj(state.to(weight.dtype))[:, None], embedded], dim=1), None

    def _embed_time(self, time: Tensor) -> Tensor:
        """Sines, then cosines, of `time` [B] in periods from the shortest to the longest: [B, expert width]."""
        shortest, longest = self.config.min_period, self.config.max_period
        half = self.config.dit_config.hidden_size // 2
        fractions = torch.linspace(0, 1, half, dtype=torch.float64, device=time.device)
        angles = time.double()[:, None] * (2 * math.pi / (shortest * (longest / shortest) ** fractions))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _prefix_blocks(self, hidden: Tensor, mask: Tensor, states: list[Tensor] | None = None) -> Iterator[KeysValues]:
        """Run the prefix's blocks one at a time, and yield the keys and values of each.

        `states` receives the input of each block and the output of the final norm.
        """
        text = self.config.vlm_config.text_config
        rope = rotary(mask.cumsum(1) - 1, text.head_dim, text.rope_parameters["rope_theta"])
        added = self._additive(mask[:, None, None])
        blocks, norm = self.language_model.layers, self.language_model.norm
        complete = states is not None or _has_hooks(blocks[-1]) or _has_hooks(norm)
        for index, block in enumerate(blocks):
            last = index == len(blocks) - 1
            if states is not None:
                states.append(hidden)
            hidden, keys, values = block(hidden, rope, added, keys_only=last and not complete)
            if last and complete:
                normed = norm(hidden)
                if states is not None:
                    states.append(normed)
            yield keys, values

    def _velocity(
        self,
        hidden: Tensor,
        condition: Tensor | None,
        pasts: Iterator[KeysValues],
        prefix_mask: Tensor,
        chunk: int,
    ) -> Tensor:
        """Run the expert's blocks on the prefix's keys and values, and predict [B, chunk, action dim]."""
        expert = self.config.dit_config
        length = hidden.shape[1]
        positions = prefix_mask.sum(1, keepdim=True) + torch.arange(length, device=hidden.device)
        rope = rotary(positions, expert.head_dim, expert.rope_parameters["rope_theta"])
        mask = self._suffix_mask(prefix_mask, length)
        hidden = hidden.to(self.language_model.embed_tokens.weight.dtype)
        for block, past in zip(self.expert.layers, pasts):
            hidden, _, _ = block(hidden, rope, mask, past=past, condition=condition)
        hidden = self.expert.norm(hidden) if condition is None else self.expert.norm(hidden, condition)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out_proj(hidden[:, -chunk:].to(self.action_out_proj.weight.dtype)).float()

    def _suffix_mask(self, prefix_mask: Tensor, length: int) -> Tensor:
        """Actions see everything; pi0's state sees the prefix and itself. In the form of `Attention.forward`."""
        mask = torch.cat([prefix_mask, prefix_mask.new_ones(len(prefix_mask), length)], dim=1)[:, None, None]
        if self.kind == "pi0":
            mask = mask.repeat(1, 1, length, 1)
            mask[:, :, 0, prefix_mask.shape[1] + 1 :] = False
        return self._additive(mask)

    def _additive(self, mask: Tensor) -> Tensor:
        """Numbers that a bool mask adds to attention scores, in the type that attention computes in."""
        device = mask.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.language_model.embed_tokens.weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _has_hooks(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
