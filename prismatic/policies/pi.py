"""pi0 and pi0.5: flow matching on action chunks, trained in full or with LoRA on both of their transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from prismatic.checkpoint.folder import Checkpoint, StartingPoint
from prismatic.checkpoint.layout import LORA_FOLDER
from prismatic.checkpoint.load import PolicyParts, readable
from prismatic.models.lora import choose_targets, load_lora, wrap_lora
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.prompts import load_tokenizer
from prismatic.models.pi.trainable import dead_parameters, fully_trained, lora_targets
from prismatic.models.pi.weights import parameter_dtype, read_config
from prismatic.policies.pi_data import (
    PI_RANGES,
    LetterboxTransform,
    PiBatchTransform,
    PiImageProcessor,
    PiProcessor,
    collate,
)
from prismatic.training.module import Coefficient, StepOutput, TrainablePolicy
from prismatic.training.objectives import chunk_l1_metrics
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED, find_folder
from prismatic.vla.batch import Batch, Sample
from prismatic.vla.platforms import OPENPI_NORMALIZATION, Platform, get_platform

if TYPE_CHECKING:
    from prismatic.training.config import TrainConfig


_EXPERT = r"expert\..*"  # The action expert's layers, in PEFT's patterns.


def _read(base: str, flag: str = "--vla_path") -> Any:
    """The model's configuration; of weights, headers alone are read."""
    folder = find_folder(flag, base)
    with readable(folder, flag):
        return read_config(folder)


def make_processor(config: Any, folder: Path) -> PiProcessor:
    """Prompts by the tokenizer of a folder, images of the model's size."""
    return PiProcessor(config, load_tokenizer(folder), PiImageProcessor(config.vlm_config.vision_config.image_size))


class TrainablePi(TrainablePolicy):
    """The policy with its flow-matching loss: the mean over the chunk and all of the model's action numbers."""

    def __init__(
        self, parts: PolicyParts, platform: Platform, auxiliary: nn.Module, auxiliary_coeff: Coefficient
    ) -> None:
        super().__init__(parts, auxiliary, auxiliary_coeff)
        self.platform = platform

    @property
    def policy(self) -> PiPolicy:
        """The model without the PEFT wrapper."""
        return self.vla.get_base_model() if hasattr(self.vla, "get_base_model") else self.vla

    def forward(self, batch: Batch, targets: object) -> StepOutput:
        """Flow-matching loss with the auxiliary one; the latter changes nothing in the former."""
        noise, time = batch["noise"], batch["time"]
        output = self.vla(**self._observation(batch), actions=batch["actions"], noise=noise, time=time)
        # A velocity that is off by e means actions that are off by time * e.
        errors = time[..., None, None] * output.losses.detach().sqrt()[..., : self.platform.action_dim]
        errors = errors.flatten(0, -3)
        metrics = chunk_l1_metrics(errors, torch.zeros_like(errors))
        return self.add_auxiliary(
            output.losses.mean(),
            metrics,
            hidden_states=output.hidden_states or (output.losses,),
            vision_start=0,
            num_vision_tokens=batch["image_masks"].shape[1] * self.policy.tokens_per_image,
            teacher=targets,
            mask_BN=self.token_mask(batch),
        )

    def token_mask(self, batch: Batch) -> Tensor:
        """(B, N) bool: the image tokens whose patch begins inside of what a camera filled."""
        vision = self.policy.config.vlm_config.vision_config
        corners = torch.arange(0, vision.image_size, vision.patch_size, device=batch["contents"].device)
        top, left, bottom, right = batch["contents"][..., None].unbind(-2)
        rows, columns = (corners >= top) & (corners < bottom), (corners >= left) & (corners < right)
        return (rows[..., None] & columns[..., None, :] & batch["image_masks"][..., None, None]).flatten(1)

    @torch.no_grad()
    def sampled_errors(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """L1 errors of normalized action chunks, sampled from noise of that seed."""
        actions = batch["actions"]
        noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(seed)).to(actions)
        steps = self.policy.config.num_inference_steps
        sampled = self.policy.sample_actions(**self._observation(batch), num_steps=steps, noise=noise)
        real = slice(self.platform.action_dim)
        return chunk_l1_metrics(sampled[..., real], actions[..., real])

    def _observation(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "pixel_values": batch["pixel_values"].unflatten(1, (-1, 3)),
            "image_masks": batch["image_masks"],
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "state": batch["proprio"],
        }


class _Pi:
    """See :class:`prismatic.policies.base.PolicyFamily`."""

    name: str
    indexing = "openpi-torch"
    unused_parameters = False

    def check(self, config: TrainConfig, start: StartingPoint) -> None:
        """Refuse the heads and switches that are OpenVLA's."""
        for flag in ("use_diffusion", "use_film"):
            if getattr(config, flag):
                raise UsageError(f"--{flag}: True found; accepted for {self.name}: False")
        model, robot = _read(start.base), get_platform(config.platform)
        widths = {"action": (robot.action_dim, model.max_action_dim), "state": (robot.proprio_dim, model.max_state_dim)}
        for kind, (wanted, most) in widths.items():
            if wanted > most:
                raise UsageError(
                    f"--platform: {robot.name} has {kind}s of {wanted} numbers; accepted: up to {most}, the model's"
                )
        if config.use_lora:
            with torch.device("meta"):
                choose_targets(lora_targets(PiPolicy(model)), config.lora_targets)
        elif config.lora_expert_rank:
            raise UsageError(
                f"--lora_expert_rank: {config.lora_expert_rank} found; accepted with --use_lora False: 0, no adapters"
            )

    def platform(self, config: TrainConfig, base: str) -> Platform:
        """The robot of the flags, with the model's chunk and openpi's normalization."""
        robot = get_platform(config.platform)
        return replace(robot, chunk=_read(base).chunk_size, normalization=OPENPI_NORMALIZATION[self.name])

    def depth(self, base: str) -> int:
        """Blocks of the prefix."""
        return int(_read(base).vlm_config.text_config.num_hidden_layers)

    def patch_pixels(self, base: str) -> int:
        """Side of a patch of the vision tower."""
        return int(_read(base).vlm_config.vision_config.patch_size)

    def load_processor(self, folder: str | Path, flag: str = "--vla_path") -> PiProcessor:
        """Tokenizer of the folder, and the image size of its model."""
        return make_processor(_read(str(folder), flag), find_folder(flag, str(folder)))

    def batch_transform(self, config: TrainConfig, processor: Any, platform: Platform) -> PiBatchTransform:
        """Letterboxed views, prompt, padded actions and state, noise and time."""
        draws = config.repeated_diffusion_steps
        return PiBatchTransform(processor, self.name, config.use_proprio, config.num_images_in_input, draws)

    def image_transform(self, processor: Any, *, image_aug: bool, image_crop: bool = True) -> LetterboxTransform:
        """openpi's letterbox; with `image_aug` its colors, and its crop with `image_crop`."""
        side = processor.image_processor.input_sizes[0][-1]
        ranges = PI_RANGES if image_crop else replace(PI_RANGES, crop_area=1.0)
        return LetterboxTransform((side, side), ranges if image_aug else None)

    def collator(self, processor: Any) -> Callable[[Sequence[Sample]], Batch]:
        """Prompts padded to the longest."""
        return collate

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
        """The policy: all of it trains, or heads, vision tower and LoRA; what no loss reaches is frozen."""
        folder = find_folder("--vla_path", start.base)
        policy = PiPolicy.from_pretrained(folder)
        policy.config.platform = platform.to_json()
        if self.name == "pi05":
            policy.config.discrete_state_input = config.use_proprio  # openpi's name for a state in the prompt.
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        policy.output_hidden_states = bool(states)
        uses_final = len(policy.language_model.layers) in states
        if not config.use_lora:
            for name in dead_parameters(policy, uses_final_norm=uses_final):
                policy.get_parameter(name).requires_grad_(False)
            return PolicyParts(policy)
        named: Any = policy
        named.name_or_path = str(start.base)  # PEFT records it.
        for name, parameter in policy.named_parameters():
            if name.startswith(("language_model.", "expert.")):
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(parameter_dtype(name, dtype))
        adapter = start.checkpoint / LORA_FOLDER if config.resume and start.checkpoint else None
        if adapter is not None and adapter.is_dir():
            try:
                return PolicyParts(load_lora(policy, adapter, is_trainable=True))
            except (*DAMAGED, SafetensorError) as error:
                raise UsageError(f"--resume: {adapter}: {one_line(error, 300)}") from error
        rank = config.lora_expert_rank or config.lora_rank
        own = rank != config.lora_rank
        lora = LoraConfig(
            rank_pattern={_EXPERT: rank} if own else {},
            alpha_pattern={_EXPERT: config.lora_alpha or rank} if own else {},
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or config.lora_rank,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=choose_targets(lora_targets(policy, uses_final_norm=uses_final), config.lora_targets),
            modules_to_save=fully_trained(policy),
        )
        return PolicyParts(wrap_lora(policy, lora))

    def trainable(
        self,
        config: TrainConfig,
        parts: PolicyParts,
        platform: Platform,
        processor: Any,
        auxiliary: nn.Module,
        coeff: Coefficient,
    ) -> TrainablePi:
        """The policy with its flow-matching loss."""
        return TrainablePi(parts, platform, auxiliary, coeff)

    def student_dim(self, parts: PolicyParts) -> int:
        """Width of the prefix."""
        return int(parts.vla.config.vlm_config.text_config.hidden_size)

    def blocks(self, parts: PolicyParts) -> nn.ModuleList:
        """Blocks of the prefix."""
        layers: nn.ModuleList = parts.vla.language_model.layers
        return layers

    def image_tokens(self, parts: PolicyParts) -> int:
        """Tokens of a camera."""
        return int(parts.vla.tokens_per_image)


class Pi0(_Pi):
    """pi0."""

    name = "pi0"


class Pi05(_Pi):
    """pi0.5."""

    name = "pi05"


def load_acting(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PiPolicy:
    """The policy of a checkpoint, adapters merged in float32, ready to act on `device`.

    Raises UsageError: weights are missing, damaged or of other shapes.
    """
    policy: Any = PiPolicy.from_pretrained(checkpoint.model_path)
    if checkpoint.adapter_path is not None:
        try:
            adapted: Any = load_lora(policy, checkpoint.adapter_path)
        except (*DAMAGED, SafetensorError) as error:
            reason = one_line(error, 300)
            raise UsageError(f"--pretrained_checkpoint: {checkpoint.adapter_path}: {reason}") from error
        policy = adapted.merge_and_unload()
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, dtype))
    return policy.to(device).eval()
