"""Continuous action heads on the hidden states of the action tokens: L1 regression and diffusion.

Parameter names are those of the released `action_head--*_checkpoint.pt` files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


class MLPResNetBlock(nn.Module):
    """Pre-norm residual block: x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """LayerNorm, linear, ReLU, residual blocks, LayerNorm, linear: (..., input_dim) -> (..., output_dim)."""

    def __init__(self, num_blocks: int, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def _group_by_action(hidden: torch.Tensor, action_dim: int) -> torch.Tensor:
    """(B, T*A, D) -> (B, T, A*D). Raises ValueError when the tokens are no whole number of actions."""
    batch, tokens, width = hidden.shape
    if tokens % action_dim:
        raise ValueError(
            f"action hidden states: found {tokens} tokens; accepted: a multiple of {action_dim} (action_dim)"
        )
    return hidden.reshape(batch, tokens // action_dim, action_dim * width)


class L1RegressionActionHead(nn.Module):
    """Regresses the action chunk; trained with the mean absolute error on normalized actions (OpenVLA-OFT)."""

    def __init__(self, input_dim: int = 4096, hidden_dim: int = 4096, action_dim: int = 7) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = MLPResNet(2, input_dim * action_dim, hidden_dim, action_dim)

    def predict_action(self, actions_hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states of the action tokens (B, T*A, D) -> normalized actions (B, T, A)."""
        return self.model(_group_by_action(actions_hidden_states, self.action_dim))

    def forward(self, actions_hidden_states: torch.Tensor) -> torch.Tensor:
        """Same as :meth:`predict_action`, so that wrappers such as DDP see the call."""
        return self.predict_action(actions_hidden_states)


class SinusoidalPositionalEncoding(nn.Module):
    """Diffusion timesteps (B,) -> (B, dim): sines then cosines at frequencies 1 to 1/10000."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2 or dim < 4:
            raise ValueError(f"time embedding: found width {dim}; accepted: an even number of at least 4")
        self.dim = dim

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, dim), float32."""
        half = self.dim // 2
        # Product before quotient: rounding in this order is upstream's, and sampling amplifies any difference.
        exponent = -math.log(10000) * torch.arange(half, device=timesteps.device) / (half - 1)
        angles = timesteps[:, None] * exponent.exp()[None]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class NoisePredictionModel(nn.Module):
    """Hidden states grouped by action (B, T, A*D) -> the noise in each action (B, T, A)."""

    def __init__(self, transformer_hidden_dim: int, hidden_dim: int, action_dim: int = 7) -> None:
        super().__init__()
        self.mlp_resnet = MLPResNet(2, transformer_hidden_dim, hidden_dim, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.mlp_resnet(obs)


class DiffusionActionHead(nn.Module):
    """Predicts the noise in a noisy action chunk; DDIM turns it into actions (OpenVLA-OFT's diffusion variant).

    The noise schedule is diffusers' `squaredcos_cap_v2`. `noise_scheduler.set_timesteps(n)` chooses fewer steps for
    sampling than for training.
    """

    def __init__(
        self, input_dim: int = 4096, hidden_dim: int = 4096, action_dim: int = 7, num_diffusion_steps_train: int = 50
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.num_diffusion_steps_train = num_diffusion_steps_train
        self.noise_predictor = NoisePredictionModel(input_dim * action_dim, hidden_dim, action_dim)
        self.noise_scheduler: Any = _ddim_scheduler(num_diffusion_steps_train)
        self.time_encoder = SinusoidalPositionalEncoding(hidden_dim)

    def sample_noisy_actions(self, ground_truth_actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Noise (B, T, A) at a random timestep of each sample, added to normalized actions (B, T, A).

        Returns `noise`, `noisy_actions`, `timesteps` (B,) and `diffusion_timestep_embeddings` (B, 1, hidden_dim).
        """
        actions = ground_truth_actions
        noise = torch.randn_like(actions)
        timesteps = torch.randint(0, self.num_diffusion_steps_train, (actions.shape[0],), device=actions.device)
        return {
            "noise": noise,
            "noisy_actions": self.noise_scheduler.add_noise(actions, noise, timesteps),
            "timesteps": timesteps,
            "diffusion_timestep_embeddings": self.embed_timesteps(timesteps, actions.dtype),
        }

    def embed_timesteps(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Timesteps (B,) -> their tokens (B, 1, hidden_dim)."""
        return self.time_encoder(timesteps).to(dtype).unsqueeze(1)

    def predict_noise(self, actions_hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states of the action tokens (B, T*A, D) -> predicted noise (B, T, A)."""
        return self.noise_predictor(_group_by_action(actions_hidden_states, self.action_dim))

    def forward(self, actions_hidden_states: torch.Tensor) -> torch.Tensor:
        """Same as :meth:`predict_noise`, so that wrappers such as DDP see the call."""
        return self.predict_noise(actions_hidden_states)

    def remove_noise(self, noise_pred: torch.Tensor, timestep: Any, noisy_actions: torch.Tensor) -> torch.Tensor:
        """One DDIM step: the actions (B, T, A) one timestep less noisy."""
        return self.noise_scheduler.step(noise_pred, timestep, noisy_actions).prev_sample


def _ddim_scheduler(num_train_timesteps: int) -> DDIMScheduler:
    # diffusers takes a second to import and only this head needs it.
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2")
