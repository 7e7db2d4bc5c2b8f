"""From flags to a policy ready for training: base model, LoRA, heads, processor, and where each came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from prismatic.models.components import load_component
from prismatic.training.checkpoint import VISION_COMPONENT, component_file, load_training_state
from prismatic.training.config import TrainConfig
from prismatic.training.folders import split_checkpoint_name
from prismatic.training.objectives import (
    DiffusionObjective,
    DiscreteObjective,
    L1Objective,
    Objective,
    PolicyParts,
)
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json
from prismatic.util.hub import HUB_ID, find_folder
from prismatic.vla.platforms import Platform

if TYPE_CHECKING:
    from prismatic.vla.datasets import RLDSDataset

LORA_FOLDER = "lora_adapter"


@dataclass
class Sources:
    """Where the weights come from: the base model and, for a resume, the adapter of a checkpoint folder."""

    base: str
    checkpoint: Path | None
    step: int


def _check_components(config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuse flags that leave trained parts of a checkpoint out or, in a resume, begin others anew."""
    uses = {
        "action_head": ("--use_l1_regression, --use_diffusion", config.objective != "discrete"),
        "noisy_action_projector": ("--use_diffusion", config.objective == "diffusion"),
        "proprio_projector": ("--use_proprio", config.use_proprio),
        VISION_COMPONENT: ("--use_film", config.use_film),
    }
    if checkpoint is None:
        return
    for name, (flag, used) in uses.items():
        there = component_file(checkpoint, name) is not None
        if used != there and (config.resume or (there and name == VISION_COMPONENT)):
            holds = "holds a" if there else "holds no"
            raise UsageError(f"{flag}: {used} found, but {checkpoint} {holds} {name}; accepted: {not used}")


def _check_model(base: str) -> None:
    """Refuse a folder that holds another model than OpenVLA's; of a hub id nothing is known yet."""
    if not Path(base).is_dir():
        return
    file = Path(base) / "config.json"
    found = read_json(file).get("model_type")
    if found != "openvla":
        raise UsageError(f"--vla_path: {file}: model_type {found!r} found; accepted: 'openvla'")


def find_sources(config: TrainConfig) -> Sources:
    """Resolve --vla_path and --resume.

    Raises:
        UsageError: the checkpoint's adapter does not name its base model, its step cannot be told, the flags do not
            fit the parts it holds, or there is another model than OpenVLA's.
    """
    if not config.resume:
        # Of a hub repository the heads are wanted here; the model itself is fetched by from_pretrained.
        checkpoint = find_folder("--vla_path", str(config.vla_path), ["config.json", "*_checkpoint.pt"])
        _check_components(config, checkpoint)
        _check_model(str(checkpoint))
        return Sources(config.vla_path, checkpoint, 0)
    folder = Path(config.vla_path)
    _check_components(config, folder)
    step = config.resume_step
    if step is None:
        _, step = split_checkpoint_name(folder.name)
        state = load_training_state(folder, lazily=True)
        if state is not None:
            step = int(state["step"])
        if step is None:
            raise UsageError(f"--resume_step: {folder} does not tell its step; accepted: the step as a number")
    adapter = folder / LORA_FOLDER / "adapter_config.json"
    base = str(folder)
    if config.use_lora and adapter.is_file():
        base = config.base_checkpoint or str(read_json(adapter).get("base_model_name_or_path") or "")
        if not base:
            raise UsageError(
                f"{adapter}: names no base_model_name_or_path; accepted: the base model's folder or hub id"
            )
        if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
            raise UsageError(f"{adapter}: no such base model: {base}; accepted: another one with --base_checkpoint")
    _check_model(base)
    return Sources(base, folder, step)


@contextmanager
def _readable(base: str) -> Iterator[None]:
    """Turn what transformers says of a missing or damaged file of the base model into one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--vla_path: {base}: {' '.join(str(error).split())[:300]}") from error


def student_depth(config: TrainConfig) -> int:
    """Blocks of the base model's LLM, from its config file alone."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    base = find_sources(config).base
    with _readable(base):
        return int(OpenVLAConfig.from_pretrained(base).text_config.num_hidden_layers)


def load_processor(sources: Sources) -> Any:
    """Tokenizer and image processor of the base model; reads no weights."""
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor

    with _readable(sources.base):
        return PrismaticProcessor.from_pretrained(sources.base)


def load_vla(config: TrainConfig, sources: Sources, platform: Platform, dtype: torch.dtype) -> Any:
    """The base model with LoRA: new, or the checkpoint's when resuming.

    Raises:
        UsageError: no weights at the base model's place, or not all of them.
    """
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

    with _readable(sources.base):
        loaded: Any = OpenVLAForActionPrediction.from_pretrained(sources.base, dtype=dtype, output_loading_info=True)
    vla, info = loaded
    # transformers makes missing weights up and only warns. Those of a FiLM backbone may come from its component file.
    film = config.use_film and sources.checkpoint and component_file(sources.checkpoint, VISION_COMPONENT)
    if missing := sorted(key for key in info["missing_keys"] if not (film and key.startswith("vision_backbone."))):
        raise UsageError(f"--vla_path: {sources.base} lacks {len(missing)} weights of the model, such as {missing[0]}")
    adapter = sources.checkpoint / LORA_FOLDER if config.resume and sources.checkpoint else None
    return adapt_vla(vla, config, platform, adapter if adapter is not None and adapter.is_dir() else None)


def adapt_vla(vla: Any, config: TrainConfig, platform: Platform, adapter: Path | None = None) -> Any:
    """A loaded base model as the flags want it trained: images, checkpointing, LoRA (new or `adapter`'s), FiLM.

    Raises:
        UsageError: an adapter that cannot be read, or of another model.
    """
    from prismatic.models.lora import add_lora, load_lora

    vla.vision_backbone.set_num_images_in_input(config.num_images_in_input)
    vla.config.platform = platform.to_dict()
    if config.gradient_checkpointing:
        vla.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.use_lora and adapter is not None:
        try:
            vla = load_lora(vla, adapter, is_trainable=True)
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise UsageError(f"--resume: {adapter}: {' '.join(str(error).split())[:300]}") from error
    elif config.use_lora:
        vla = add_lora(vla, config.lora_rank, config.lora_dropout)
    if config.use_film:
        _wrap_film(vla)
    return vla


def _wrap_film(vla: Any) -> None:
    from prismatic.models.film_vit_wrapper import FiLMedPrismaticVisionBackbone

    base = vla.get_base_model() if hasattr(vla, "get_base_model") else vla
    base.vision_backbone = FiLMedPrismaticVisionBackbone(vision_backbone=base.vision_backbone, llm_dim=base.llm_dim)
    # A policy acts on one prompt, without padding: a sample must not depend on how long its neighbors' prompts are.
    base.config.film_exclude_padding = True


def build_parts(config: TrainConfig, sources: Sources, vla: Any, platform: Platform) -> PolicyParts:
    """The policy's heads; weights come from the folder of --vla_path when it holds them, else they are new."""
    from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead
    from prismatic.models.projectors import NoisyActionProjector, ProprioProjector

    width = vla.llm_dim
    parts = PolicyParts(vla)
    if config.use_l1_regression:
        parts.action_head = L1RegressionActionHead(input_dim=width, hidden_dim=width, action_dim=platform.action_dim)
    elif config.use_diffusion:
        parts.action_head = DiffusionActionHead(
            input_dim=width,
            hidden_dim=width,
            action_dim=platform.action_dim,
            num_diffusion_steps_train=config.num_diffusion_steps_train,
        )
        parts.noisy_action_projector = NoisyActionProjector(llm_dim=width)
    if config.use_proprio:
        parts.proprio_projector = ProprioProjector(llm_dim=width, proprio_dim=platform.proprio_dim)
    if sources.checkpoint is not None:
        for name in ("action_head", "proprio_projector", "noisy_action_projector"):
            module, file = getattr(parts, name), component_file(sources.checkpoint, name)
            if module is not None and file is not None:
                load_component(module, file)
        vision = component_file(sources.checkpoint, VISION_COMPONENT)
        if config.use_film and vision is not None:
            load_component(vla.vision_backbone, vision)
    return parts


def make_objective(config: TrainConfig, platform: Platform, tokenizer: Any) -> Objective:
    """The action loss the flags ask for."""
    from prismatic.vla.action_tokenizer import ActionTokenizer

    if config.objective == "l1":
        return L1Objective(platform)
    if config.objective == "diffusion":
        return DiffusionObjective(platform)
    return DiscreteObjective(platform, ActionTokenizer(tokenizer))


def make_dataset(config: TrainConfig, processor: Any, platform: Platform, *, train: bool) -> RLDSDataset:
    """The training data of the flags (augmented where they say so), or the validation split without augmentation."""
    from prismatic.vla.action_tokenizer import ActionTokenizer
    from prismatic.vla.datasets import RLDSBatchTransform, RLDSDataset

    transform = RLDSBatchTransform(
        ActionTokenizer(processor.tokenizer),
        processor.tokenizer,
        image_transform=processor.image_processor.apply_transform,
        use_wrist_image=config.num_images_in_input > 1,
        use_proprio=config.use_proprio,
        num_images=config.num_images_in_input,
    )
    size = processor.image_processor.input_sizes[0][-2:]
    return RLDSDataset(
        config.data_root_dir,
        config.dataset_name,
        transform,
        resize_resolution=(int(size[0]), int(size[1])),
        image_aug=config.image_aug and train,
        train=train,
        platform=platform,
        seed=config.seed,
        fraction=config.data_fraction,
        holdout=config.val_fraction if config.use_val_set else 0.0,
    )
