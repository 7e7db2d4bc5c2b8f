"""From a checkpoint folder to a policy that answers robots, singly as upstream's functions do or in batches.

`get_vla`, `get_processor`, `get_action_head`, `get_proprio_projector`, `get_noisy_action_projector` and
`get_vla_action` have upstream's signatures; `cfg` is :class:`PolicyFlags` or any object with upstream's flags as
attributes. :class:`OpenVLAPolicy` is what our own rollouts and server use; what a folder holds, and how it is loaded,
is :mod:`prismatic.checkpoint`'s.

Proprio values outside the statistics' range are clipped; a constant dimension is not zeroed here, as in upstream.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from experiments.robot.libero.suites.tasks import unnorm_key_for
from experiments.robot.policy import Array, PolicyFlags, Query
from prismatic.checkpoint.folder import Checkpoint, open_checkpoint, resolve_unnorm_key
from prismatic.checkpoint.load import load_component, load_policy, load_policy_model, load_processor, make_head
from prismatic.util.errors import UsageError
from prismatic.vla.action_tokenizer import action_prompt
from prismatic.vla.datasets.image_transforms import center_crop_box, prepare_policy_image, resize_and_crop
from prismatic.vla.platforms import LIBERO, Normalization, Platform, scaled_numbers

if TYPE_CHECKING:
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor


def resolve_device(name: str = "auto") -> torch.device:
    """ "auto" is this process's GPU when there is one, else the CPU. Raises UsageError for a GPU that is not there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device: cuda was asked for, but torch finds no GPU; accepted here: cpu, auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU (as upstream evaluates) and float32 on the CPU, where bfloat16 is slow."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def quantization(cfg: PolicyFlags) -> str:
    """ "8bit" or "4bit" where the flags ask for it, else "". Raises UsageError for both, or without bitsandbytes."""
    kinds = [kind for kind in ("8bit", "4bit") if getattr(cfg, f"load_in_{kind}", False)]
    if len(kinds) > 1:
        raise UsageError("--load_in_8bit, --load_in_4bit: both are True; accepted: one of them")
    if not kinds:
        return ""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--load_in_{kinds[0]}: needs the package bitsandbytes: pip install 'rocket-vla[quant]'")
    return kinds[0]


def normalize_proprio(
    proprio: Array, norm_stats: Mapping[str, Any], kind: Normalization = LIBERO.normalization
) -> Array:
    """Proprio state (..., P) to [-1, 1] with the "proprio" statistics of the training data, float64.

    Unlike in training, dimensions that never change in the data are not zeroed; so does upstream's evaluation.
    """
    low, high = (np.array(bound) for bound in kind.bounds(norm_stats))
    mask = scaled_numbers(norm_stats, len(low))
    scaled = 2 * (proprio - low) / (high - low + 1e-8) - 1
    return np.clip(np.where(mask, scaled, proprio), -1.0, 1.0)


def get_vla(cfg: PolicyFlags) -> nn.Module:
    """Load the model of `cfg.pretrained_checkpoint`, ready for inference. Raises UsageError when that cannot be."""
    return load_policy_model(_checkpoint_of(cfg), cfg, *placement(cfg), quantization(cfg))


def get_processor(cfg: PolicyFlags) -> PrismaticProcessor:
    """Tokenizer and image processor of `cfg.pretrained_checkpoint`."""
    return load_processor(_checkpoint_of(cfg).processor_path, "--pretrained_checkpoint")


def get_proprio_projector(cfg: PolicyFlags, llm_dim: int, proprio_dim: int) -> nn.Module:
    """The trained projector of the robot's state."""
    return _load_head(cfg, "proprio_projector", "--use_proprio", llm_dim, proprio_dim=proprio_dim)


def get_noisy_action_projector(cfg: PolicyFlags, llm_dim: int) -> nn.Module:
    """The trained projector of noisy actions of a diffusion policy."""
    return _load_head(cfg, "noisy_action_projector", "--use_diffusion", llm_dim)


def get_action_head(cfg: PolicyFlags, llm_dim: int, action_dim: int = LIBERO.action_dim) -> nn.Module:
    """The trained L1 or diffusion head, as `cfg` asks. Raises UsageError for both or none, or without its file."""
    if cfg.use_l1_regression == cfg.use_diffusion:
        raise UsageError("--use_l1_regression, --use_diffusion: a head needs exactly one of them")
    flag = "--use_l1_regression" if cfg.use_l1_regression else "--use_diffusion"
    return set_diffusion_steps(_load_head(cfg, "action_head", flag, llm_dim, action_dim=action_dim), cfg)


def get_vla_action(  # noqa: PLR0913 - upstream's signature
    cfg: PolicyFlags,
    vla: OpenVLAForActionPrediction,
    processor: PrismaticProcessor,
    obs: Mapping[str, Array],
    task_label: str,
    action_head: nn.Module | None = None,
    proprio_projector: nn.Module | None = None,
    noisy_action_projector: nn.Module | None = None,
    use_film: bool = False,
) -> list[Array]:
    """A chunk of actions for one observation: list of T un-normalized actions (A,), gripper 1 = open.

    Args:
        obs: full_image uint8 (H, W, 3), wrist images under every key containing "wrist", state (P,). Images that have
            the policy's size already are taken as prepared and only center-cropped. Nothing in it is changed.
    """
    size = image_size(vla)
    names = ["full_image", *(name for name in obs if "wrist" in name)][: cfg.num_images_in_input]
    images = prepare_images_for_vla([obs[name] for name in names], cfg, size)
    transform = processor.image_processor.apply_transform
    pixel_values = torch.cat([transform(Image.fromarray(image)) for image in images])[None]
    proprio = None
    if cfg.use_proprio:
        statistics = vla.norm_stats[cfg.unnorm_key]["proprio"]
        proprio = normalize_proprio(np.asarray(obs["state"]), statistics, vla.platform.normalization)[None]
    actions_BTA = _predict(
        vla,
        processor,
        [task_label],
        pixel_values,
        unnorm_key=cfg.unnorm_key,
        proprio=proprio,
        proprio_projector=proprio_projector,
        action_head=action_head,
        noisy_action_projector=noisy_action_projector,
        use_film=use_film,
    )
    return list(actions_BTA[0])


def prepare_images_for_vla(
    images: Sequence[Array], cfg: PolicyFlags, size: tuple[int, int] = (224, 224)
) -> list[Array]:
    """Images (H, W, 3) as the policy wants them: JPEG and resize unless of `size` already, then the center crop."""
    prepared = []
    for image in images:
        if image.shape[:2] != size:
            prepared.append(prepare_policy_image(image, size, cfg.center_crop))
        else:
            prepared.append(_crop(image, size) if cfg.center_crop else image)
    return prepared


def image_size(vla: OpenVLAForActionPrediction) -> tuple[int, int]:
    """(height, width) of the images `vla` takes."""
    side = vla.config.image_sizes[0]
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


PolicyT = TypeVar("PolicyT", bound="OpenVLAPolicy")


class OpenVLAPolicy:
    """A loaded checkpoint that answers batches of queries; see :class:`experiments.robot.policy.Policy`.

    Args:
        vla: model on its device; its `norm_stats` are the checkpoint's.
        parts: action_head, proprio_projector, noisy_action_projector, as far as the policy has them.
        cfg: num_images_in_input, center_crop, use_proprio, use_film.

    Attributes:
        text_tokens: length that prompts are padded to; None pads to the longest of a batch.
    """

    text_tokens: int | None = None

    def __init__(
        self,
        vla: OpenVLAForActionPrediction,
        processor: PrismaticProcessor,
        parts: Mapping[str, nn.Module],
        cfg: PolicyFlags,
        unnorm_key: str,
    ) -> None:
        self.vla, self.processor, self.unnorm_key = vla, processor, unnorm_key
        self.platform: Platform = vla.platform
        self._parts, self._cfg = dict(parts), cfg
        self._threads = ThreadPoolExecutor(max_workers=8)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images."""
        return image_size(self.vla)

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Statistics of the data, by name."""
        return self.vla.norm_stats

    @classmethod
    def from_checkpoint(cls: type[PolicyT], checkpoint: Checkpoint | str, cfg: PolicyFlags, unnorm_key: str) -> PolicyT:
        """Load all that `cfg` asks for, from `checkpoint` alone. Raises UsageError when it lacks something."""
        if isinstance(checkpoint, str):
            checkpoint = open_checkpoint(checkpoint, getattr(cfg, "base_checkpoint", "") or None)
        suite = getattr(cfg, "task_suite_name", "")
        find_key = unnorm_key_for if suite else resolve_unnorm_key
        unnorm_key = find_key(checkpoint.statistics, unnorm_key, suite)
        parts = load_policy(checkpoint, cfg, *placement(cfg), quantization(cfg))
        if parts.action_head is not None:
            set_diffusion_steps(parts.action_head, cfg)
        processor = load_processor(checkpoint.processor_path, "--pretrained_checkpoint")
        return cls(parts.vla, processor, parts.heads, cfg, unnorm_key)

    def act(self, queries: Sequence[Query], unnorm_key: str | None = None) -> Array:
        """Un-normalized action chunks, float64 (B, T, A), gripper 1 = open, for B queries.

        `unnorm_key` names other statistics than the policy's own.
        """
        key = unnorm_key or self.unnorm_key
        used = self._cfg.num_images_in_input
        views = [[query.image, query.wrist_image, *query.extra_images][:used] for query in queries]
        prepared = [query.prepared for query, images in zip(queries, views) for _ in images]
        pixels = list(self._threads.map(self._prepare, [image for images in views for image in images], prepared))
        count = len(views[0])
        pixel_values = [torch.cat(pixels[start : start + count]) for start in range(0, len(pixels), count)]
        arguments: dict[str, Any] = {"unnorm_key": key, "use_film": self._cfg.use_film, **self._parts}
        arguments["text_tokens"] = self.text_tokens
        if self._cfg.use_proprio:
            statistics = self.vla.norm_stats[key]["proprio"]
            states = np.stack([query.state for query in queries])
            arguments["proprio"] = normalize_proprio(states, statistics, self.platform.normalization)
        if self._cfg.use_diffusion:
            arguments["initial_noise"] = self._noise(queries)
        instructions = [query.instruction for query in queries]
        return _predict(self.vla, self.processor, instructions, torch.stack(pixel_values), **arguments)

    def _prepare(self, image: Array, prepared: bool) -> torch.Tensor:
        size = image_size(self.vla)
        if prepared:
            (ready,) = prepare_images_for_vla([image], self._cfg, size)
        else:
            ready = prepare_policy_image(image, size, self._cfg.center_crop)
        return self.processor.image_processor.apply_transform(Image.fromarray(ready))

    def _noise(self, queries: Sequence[Query]) -> torch.Tensor:
        """Noise (B, T, A) to start diffusion from: each query's own, whatever batch it is in."""
        shape = (self.platform.chunk, self.platform.action_dim)
        seeded = (torch.Generator().manual_seed(query.seed) for query in queries)
        return torch.stack([torch.randn(shape, generator=generator) for generator in seeded])


@torch.inference_mode()
def _predict(
    vla: OpenVLAForActionPrediction,
    processor: PrismaticProcessor,
    instructions: Sequence[str],
    pixel_values: torch.Tensor,
    text_tokens: int | None = None,
    **arguments: Any,
) -> Array:
    """Action chunks (B, T, A) for B instructions with pixels (B, c*V, H, W); prompts padded to `text_tokens`."""
    device = next(vla.parameters()).device
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    prompts = [action_prompt(instruction) for instruction in instructions]
    padding = "longest" if text_tokens is None else "max_length"
    text = tokenizer(prompts, padding=padding, max_length=text_tokens, return_tensors="pt")
    if text_tokens is not None and text["input_ids"].shape[1] > text_tokens:
        raise ValueError(f"a prompt of {text['input_ids'].shape[1]} tokens; all were to have {text_tokens}")
    actions_BTA, _ = vla.predict_action(
        input_ids=text["input_ids"].to(device),
        attention_mask=text["attention_mask"].to(device),
        pixel_values=pixel_values.to(device, vla.vision_backbone.dtype),
        **arguments,
    )
    return actions_BTA


def _checkpoint_of(cfg: PolicyFlags) -> Checkpoint:
    return open_checkpoint(str(cfg.pretrained_checkpoint), getattr(cfg, "base_checkpoint", "") or None)


def placement(cfg: PolicyFlags) -> tuple[torch.device, torch.dtype]:
    """Device and type of the policy; upstream's flags do not name them."""
    device = resolve_device(getattr(cfg, "device", "auto"))
    return device, resolve_dtype(getattr(cfg, "dtype", "auto"), device)


def _load_head(
    cfg: PolicyFlags, name: str, flag: str, llm_dim: int, *, action_dim: int = 1, proprio_dim: int = 1
) -> nn.Module:
    """A head of `cfg.pretrained_checkpoint`, on the policy's device and in its type."""
    head = make_head(name, cfg, llm_dim, action_dim=action_dim, proprio_dim=proprio_dim)
    load_component(head, _checkpoint_of(cfg).component(name, flag))
    return head.to(*placement(cfg)).eval()


def set_diffusion_steps(head: nn.Module, cfg: PolicyFlags) -> nn.Module:
    """Let a diffusion head take as many steps as the flags say; other heads are left alone."""
    if cfg.use_diffusion:
        scheduler: Any = head.noise_scheduler
        scheduler.set_timesteps(cfg.num_diffusion_steps_inference)
    return head


def _crop(image: Array, size: tuple[int, int]) -> Array:
    """The center crop alone, for an image that was resized before; rounding as in the whole image path."""
    planar_3HW = resize_and_crop(image, size, center_crop_box()) * np.float32(255.5 / 255.0)
    return np.ascontiguousarray(np.minimum(planar_3HW, 255.0).astype(np.uint8).transpose(1, 2, 0))
