"""From a checkpoint folder to the model, its heads and its FiLM layers, for training and for acting.

Not obvious:
- Nothing in a checkpoint is executed or changed: own model classes, safetensors or `weights_only` loading.
- Weights that a checkpoint lacks are an error, never random numbers. transformers makes them up and only warns.
- For acting, an adapter is merged into its base model in memory, with sums in float32, so it acts as the merged
  checkpoint does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import nn

from prismatic.checkpoint.folder import Checkpoint, StartingPoint
from prismatic.checkpoint.layout import (
    HEADS,
    LORA_FOLDER,
    VISION,
    PolicyShape,
    adapter_scaling,
    component_file,
    component_files,
)
from prismatic.models.lora import MAGNITUDE, merge_lora_state_dict, strip_module_prefix
from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED
from prismatic.vla.platforms import Platform

if TYPE_CHECKING:
    from peft import PeftModel

    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
    from prismatic.training.config import TrainConfig

    VLA: TypeAlias = OpenVLAForActionPrediction
    PolicyModel: TypeAlias = OpenVLAForActionPrediction | PeftModel


@dataclass
class PolicyParts:
    """The modules a policy is made of; absent ones are None.

    `vla` is the model or the PEFT wrapper that passes attributes on to it; `action_head` is an L1 or diffusion head.
    """

    vla: Any
    action_head: Any = None
    proprio_projector: nn.Module | None = None
    noisy_action_projector: nn.Module | None = None

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules beside the model, by name, as far as the policy has them."""
        return {name: module for name in HEADS if (module := getattr(self, name)) is not None}


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `torch.save` file; anything but tensors in it is refused without being run.

    Raises UsageError: the file cannot be read so.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UsageError(f"{file}: not a readable file of tensors ({one_line(error, 120)})") from error


def load_component(module: nn.Module, file: Path, begin_anew: Callable[[str], None] | None = None) -> None:
    """Load a component's state dict, saved with or without DDP's `module.` prefix.

    Args:
        begin_anew: told why a file of another kind or width is left alone, as when training begins with another head.

    Raises:
        UsageError: the file cannot be read, or its keys or shapes do not fit the module and `begin_anew` is None.
    """
    state = strip_module_prefix(read_state_dict(file))
    wrong = misfit(module, state)
    if wrong and begin_anew is None:
        raise UsageError(f"{file}: does not fit the model: {wrong}; accepted: a file of the same kind and width")
    if wrong and begin_anew is not None:
        begin_anew(f"{file.name.partition('--')[0]} begins anew: {file} is of another kind or width ({wrong})")
        return
    module.load_state_dict(state)


def misfit(module: nn.Module, state: Mapping[str, torch.Tensor]) -> str:
    """The first reason why `state` is not one of `module`, "" where it is."""
    own = module.state_dict()
    # What a module takes from a file and does not have before, as `MultiLayerAlignment` its targets' means.
    later = getattr(module, "later_state", ())
    for name in sorted((own.keys() | state.keys()).difference(later)):
        if name not in state or name not in own:
            return f"{name} is missing" if name in own else f"{name} is unknown"
        if own[name].shape != state[name].shape:
            return f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
    return ""


def wanted_heads(shape: PolicyShape) -> dict[str, str]:
    """The heads that the flags ask for, each with the flag that does.

    Raises UsageError: both action heads are asked for.
    """
    if shape.use_l1_regression and shape.use_diffusion:
        raise UsageError("--use_l1_regression, --use_diffusion: both are True; accepted: at most one of them")
    wanted = {}
    if shape.use_l1_regression:
        wanted["action_head"] = "--use_l1_regression"
    if shape.use_diffusion:
        wanted |= {"action_head": "--use_diffusion", "noisy_action_projector": "--use_diffusion"}
    if shape.use_proprio:
        wanted["proprio_projector"] = "--use_proprio"
    return wanted


def make_head(name: str, shape: PolicyShape, width: int, *, action_dim: int, proprio_dim: int) -> nn.Module:
    """A new head of the policy; `width` is the LLM's."""
    from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead
    from prismatic.models.projectors import NoisyActionProjector, ProprioProjector

    if name == "proprio_projector":
        return ProprioProjector(llm_dim=width, proprio_dim=proprio_dim)
    if name == "noisy_action_projector":
        return NoisyActionProjector(llm_dim=width)
    if shape.use_l1_regression:
        return L1RegressionActionHead(input_dim=width, hidden_dim=width, action_dim=action_dim)
    steps = shape.num_diffusion_steps_train
    return DiffusionActionHead(
        input_dim=width, hidden_dim=width, action_dim=action_dim, num_diffusion_steps_train=steps
    )


def _make_parts(vla: Any, shape: PolicyShape, platform: Platform) -> PolicyParts:
    sizes = {"action_dim": platform.action_dim, "proprio_dim": platform.proprio_dim}
    return PolicyParts(vla, **{name: make_head(name, shape, vla.llm_dim, **sizes) for name in wanted_heads(shape)})


def load_processor(folder: str | Path, flag: str = "--vla_path") -> PrismaticProcessor:
    """Tokenizer and image processor of a model's folder or hub id, which `flag` named; reads no weights.

    Raises UsageError: files are missing or damaged.
    """
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor

    with readable(folder, flag):
        return PrismaticProcessor.from_pretrained(str(folder))


def load_model(folder: str | Path, flag: str, dtype: torch.dtype, *, film: bool, **options: Any) -> VLA:
    """The model of a folder or hub id, which `flag` named, with all of its weights.

    `film` says that the vision backbone's weights come from its component file, so they may be missing here. Raises
    UsageError: there is no model, or weights are missing or of the wrong shape.
    """
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

    with readable(folder, flag):
        loaded: Any = OpenVLAForActionPrediction.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    vla, info = loaded
    missing = sorted(key for key in info["missing_keys"] if not (film and key.startswith(f"{VISION}.")))
    if wrong := [*missing, *map(str, info.get("mismatched_keys", ()))]:
        raise UsageError(
            f"{flag}: {folder}: {len(wrong)} weights missing or of the wrong shape: {', '.join(wrong[:3])}"
        )
    return vla


def load_for_training(config: TrainConfig, start: StartingPoint, platform: Platform, dtype: torch.dtype) -> PolicyModel:
    """The base model with LoRA: new, or the checkpoint's when resuming.

    Raises UsageError: no weights at the base model's place, or not all of them.
    """
    film = config.use_film and start.checkpoint is not None and component_file(start.checkpoint, VISION) is not None
    vla = load_model(start.base, "--vla_path", dtype, film=film)
    adapter = start.checkpoint / LORA_FOLDER if config.resume and start.checkpoint else None
    return prepare_for_training(vla, config, platform, adapter if adapter is not None and adapter.is_dir() else None)


def prepare_for_training(vla: VLA, config: TrainConfig, platform: Platform, adapter: Path | None = None) -> PolicyModel:
    """A loaded base model as the flags want it trained: images, checkpointing, LoRA (new or `adapter`'s), FiLM.

    Raises UsageError: an adapter that cannot be read, or of another model.
    """
    from prismatic.models.lora import add_lora, load_lora, openvla_targets

    vla.vision_backbone.set_num_images_in_input(config.num_images_in_input)
    vla.config.platform = platform.to_json()
    if config.gradient_checkpointing:
        vla.recompute_activations()
    model: PolicyModel = vla
    if config.use_lora and adapter is not None:
        try:
            model = load_lora(vla, adapter, is_trainable=True)
        except (*DAMAGED, SafetensorError) as error:
            raise UsageError(f"--resume: {adapter}: {one_line(error, 300)}") from error
    elif config.use_lora:
        model = add_lora(
            vla,
            config.lora_rank,
            config.lora_dropout,
            config.lora_alpha or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=openvla_targets(vla, config.lora_targets),
        )
    if config.use_film:
        wrap_film(model)
    return model


def wrap_film(vla: PolicyModel) -> None:
    """Put new FiLM layers into the vision backbone of a model or PEFT wrapper, in place."""
    from prismatic.models.film_vit_wrapper import FiLMedPrismaticVisionBackbone

    peft: Any = vla
    base = peft.get_base_model() if hasattr(vla, "get_base_model") else vla
    base.vision_backbone = FiLMedPrismaticVisionBackbone(vision_backbone=base.vision_backbone, llm_dim=base.llm_dim)
    # A policy acts on one prompt, without padding: a sample must not depend on how long its neighbors' prompts are.
    base.config.film_exclude_padding = True


def build_parts(
    config: TrainConfig, start: StartingPoint, vla: Any, platform: Platform, report: Callable[[str], None] = print
) -> PolicyParts:
    """The policy's heads; weights come from the folder of --vla_path when it holds them, else they are new.

    A new run may begin from a policy with another head or of another robot: what does not fit begins anew, and one line
    to `report` says so. A resumed one goes on with all of its parts. Raises UsageError: a file is damaged or, in a
    resume or of the vision backbone, does not fit.
    """
    parts = _make_parts(vla, config, platform)
    if start.checkpoint is None:
        return parts
    for name, file in component_files(start.checkpoint, names=tuple(parts.heads)).items():
        load_component(parts.heads[name], file, None if config.resume else report)
    if config.use_film and (vision := component_file(start.checkpoint, VISION)):
        scaling = adapter_scaling(start.checkpoint)
        adapter = getattr(vla, "peft_config", {}).get("default")
        same = scaling == {"alpha": getattr(adapter, "lora_alpha", None), "rank_stabilized": config.use_rslora}
        _load_trained_vision(vla.vision_backbone, vision, scaling, resume=config.resume, same=same)
    return parts


def _load_trained_vision(backbone: nn.Module, file: Path, scaling: dict[str, Any], *, resume: bool, same: bool) -> None:
    """Load a FiLM backbone; adapters of another rank, kind or scale than a new run's go into the weights first."""
    state = strip_module_prefix(read_state_dict(file))
    own = backbone.state_dict()
    if not resume and (misfit(backbone, state) or (not same and any(".lora_" in name for name in state))):
        plain = merge_lora_state_dict(state, **scaling)
        names = {name: name.replace(".base_layer.", ".") for name in own if ".lora_" not in name}
        new = {name: value for name, value in own.items() if name not in names}
        state = {name: plain.pop(plain_name) for name, plain_name in names.items() if plain_name in plain}
        for name in (name for name in new if MAGNITUDE in name):
            weight = state[name.split(MAGNITUDE)[0] + ".base_layer.weight"]
            new[name] = weight.float().flatten(1).norm(dim=1).to(new[name].dtype).view_as(new[name])
        state |= new | plain  # What is left of `plain` is unknown here.
    if wrong := misfit(backbone, state):
        raise UsageError(f"{file}: does not fit the model: {wrong}; accepted: the backbone of --vla_path")
    backbone.load_state_dict(state)


def load_policy(
    checkpoint: Checkpoint, shape: PolicyShape, device: torch.device, dtype: torch.dtype, load_in: str = ""
) -> PolicyParts:
    """Model, heads and statistics of one checkpoint, ready to act on `device`.

    Args:
        load_in: "8bit" or "4bit" for quantized weights.

    Raises:
        UsageError: the checkpoint lacks what the flags ask for, or its files do not fit.
    """
    vla = load_policy_model(checkpoint, shape, device, dtype, load_in)
    parts = _make_parts(vla, shape, vla.platform)
    for name, flag in wanted_heads(shape).items():
        load_component(parts.heads[name], checkpoint.component(name, flag))
        parts.heads[name].to(device, dtype).eval()
    return parts


def load_policy_model(
    checkpoint: Checkpoint, shape: PolicyShape, device: torch.device, dtype: torch.dtype, load_in: str = ""
) -> VLA:
    """Model, adapter, FiLM layers and statistics of a checkpoint, on its device; see :func:`load_policy`."""
    options = _quantization(checkpoint, shape, device, load_in) if load_in else {}
    vla = load_model(checkpoint.model_path, "--pretrained_checkpoint", dtype, film=shape.use_film, **options)
    if checkpoint.adapter_path is not None:
        vla = _merge_adapter(vla, checkpoint.adapter_path)
    if shape.use_film:
        _load_film(vla, checkpoint.component(VISION, "--use_film"))
    vla.vision_backbone.set_num_images_in_input(shape.num_images_in_input)
    vla.norm_stats = dict(checkpoint.statistics)
    vla.config.platform = checkpoint.platform.to_json()
    if not options:  # Quantized weights lie where they are to stay.
        nn.Module.to(vla, device)
    return vla.eval()


def _quantization(checkpoint: Checkpoint, shape: PolicyShape, device: torch.device, load_in: str) -> dict[str, object]:
    """Arguments of `from_pretrained` for 8- or 4-bit weights."""
    from transformers import BitsAndBytesConfig

    # Once for every layer it says how inputs are cast; without the package `kernels`, that it goes on without it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # FiLM checkpoints bring their own vision weights, which are loaded over the model's.
    plain = ["lm_head", *([VISION] if shape.use_film else [])]
    if load_in == "4bit" and device.type == "cpu":
        plain += _not_of_whole_blocks(checkpoint.model_path)
    settings = BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        llm_int8_skip_modules=plain,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def skeleton(folder: str | Path, flag: str = "--vla_path") -> VLA:
    """The model of a folder without its weights: layers and shapes on the meta device."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

    with readable(folder, flag), torch.device("meta"):
        return OpenVLAForActionPrediction(OpenVLAConfig.from_pretrained(str(folder)))


def _not_of_whole_blocks(folder: Path) -> list[str]:
    """Linear layers that bitsandbytes cannot multiply on CPUs: it wants rows of whole blocks (64), and 32 of them."""
    modules = skeleton(folder).named_modules()
    linear = ((name, layer) for name, layer in modules if isinstance(layer, nn.Linear))
    return [name for name, layer in linear if layer.in_features % 64 or layer.out_features % 32]


def _merge_adapter(vla: VLA, folder: Path) -> VLA:
    """The model with the adapter added into its weights, layer by layer: sums in float32, rounded once.

    Quantized weights take no sums: their layers keep the adapter beside them.
    """
    from peft.tuners.lora import LoraLayer

    from prismatic.models.lora import load_lora

    try:
        adapted = load_lora(vla, folder)
    except (*DAMAGED, SafetensorError) as error:
        raise UsageError(f"--pretrained_checkpoint: {folder}: {one_line(error, 300)}") from error
    model: Any = adapted.get_base_model()
    config: Any = adapted.peft_config[adapted.active_adapter]
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            lora: Any = layer
            plain = lora.get_base_layer()
            if plain.weight.is_floating_point():
                state = {f"layer.{key}": value for key, value in lora.state_dict().items()}
                merged = merge_lora_state_dict(state, config.lora_alpha, rank_stabilized=config.use_rslora)
                with torch.no_grad():
                    plain.weight.copy_(merged["layer.weight"])
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, plain)
    return model


def _load_film(vla: VLA, file: Path) -> None:
    from prismatic.models.film_vit_wrapper import load_film_backbone

    try:
        load_film_backbone(vla, read_state_dict(file), **adapter_scaling(file.parent))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{file}: {one_line(error, 300)}") from error


@contextmanager
def readable(folder: str | Path, flag: str) -> Iterator[None]:
    """Turn what transformers says of a missing or damaged file of a model into one line.

    A wrong value surfaces as whatever error it causes first, of many libraries; RuntimeError is the device's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) or (isinstance(error, RuntimeError) and type(error) is not RecursionError):
            raise
        reason = one_line(error, 300)
        told = reason if isinstance(error, OSError | SafetensorError) else f"damaged ({type(error).__name__}: {reason})"
        raise UsageError(f"{flag}: {folder}: {told}") from error
