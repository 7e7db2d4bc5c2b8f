"""LoRA adapters of OpenVLA: which modules get one, how released adapter files load and merge.

Upstream's "all-linear" means: every layer whose last name is that of some linear layer. So the patch embedding
convolutions (`proj`) and the language model's head get an adapter too (439 modules in OpenVLA-7B). Newer PEFT versions
read "all-linear" more narrowly, hence the explicit names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prismatic.util.errors import UsageError
from prismatic.util.flags import split_names

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

# In the names of weights that PEFT trains in full beside adapters, and of those that they replace.
FULLY_TRAINED, _REPLACED = ".modules_to_save.", ".original_module."
_LORA_A, _LORA_B = ".lora_A.", ".lora_B."
MAGNITUDE = ".lora_magnitude_vector"
ALL_LINEAR = "all-linear"
_FILM_LAYER = re.compile(r"vision_backbone\.vision_backbone\..*\.blocks\.\d+\.(?:scale|shift)\.")


def lora_target_modules(model: nn.Module) -> list[str]:
    """Sorted last names of the linear layers of `model`, which is what upstream's "all-linear" adapts.

    A head that shares its weights with the token embeddings is left out: merging an adapter of it would change them.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        names.discard("lm_head")
    return sorted(names)


def choose_targets(layers: Sequence[str], chosen: str) -> list[str]:
    """The `layers`, by their full names, that `--lora_targets` asks for.

    Args:
        chosen: ALL_LINEAR for all of them, or a comma list of ends of names: "q_proj,v_proj", "mlp.up_proj".

    Raises:
        UsageError: an end that fits no layer.
    """
    ends = split_names(chosen)
    if ends == (ALL_LINEAR,):
        return list(layers)
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in layers):
            last = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(f"--lora_targets: {end} found; accepted: {ALL_LINEAR}, or of {', '.join(last)}")
    return [name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)]


def openvla_targets(model: nn.Module, chosen: str) -> list[str]:
    """Layers of OpenVLA to adapt: last names for ALL_LINEAR, as upstream has them, else full names."""
    last = lora_target_modules(model)
    if split_names(chosen) == (ALL_LINEAR,):
        return last
    return choose_targets([name for name, _ in model.named_modules() if name.rpartition(".")[2] in last], chosen)


def lora_config(
    model: nn.Module, rank: int = 32, dropout: float = 0.0, alpha: int | None = None, **settings: Any
) -> LoraConfig:
    """Upstream's LoRA settings for `model`: alpha min(rank, 16), Gaussian initialization, all linear layers.

    `settings` are further ones of PEFT's LoraConfig (use_dora, use_rslora, target_modules).
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"lora_rank: found {rank}; accepted: a positive integer")
    settings.setdefault("target_modules", lora_target_modules(model))
    return LoraConfig(
        r=rank,
        lora_alpha=min(rank, 16) if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        **settings,
    )


def add_lora(
    model: OpenVLAForActionPrediction, rank: int = 32, dropout: float = 0.0, alpha: int | None = None, **settings: Any
) -> PeftModel:
    """`model` wrapped by PEFT with fresh adapters, which alone are trainable; arguments as of :func:`lora_config`."""
    return wrap_lora(model, lora_config(model, rank, dropout, alpha, **settings))


def wrap_lora(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`model` wrapped by PEFT, a linear layer and its adapter as one function."""
    from peft import get_peft_model

    from prismatic.models.lora_linear import fuse_lora_layers

    adapted: Any = get_peft_model(cast(Any, model), config)
    fuse_lora_layers(adapted)
    return adapted


def load_lora(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """`model` wrapped by PEFT with the adapter in `folder`.

    Older PEFT also wrote the frozen base weight of the adapted head (`lm_head.base_layer.weight`) into the file; such a
    file loads like one without. Adapters trained with FiLM load into the plain model; FiLM goes around it later.
    Raises ValueError when the file lacks weights of an adapter or has unknown ones, or when its settings ask for a
    package that is not here.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    # It may have moved since; PEFT would only warn.
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {name_without_film(key): value for key, value in weights.items() if ".base_layer." not in key}
    try:
        peft_model = wrap_lora(model, config)
    except ImportError as error:  # Of megatron, say.
        raise ValueError(f"adapter_config.json asks for a package that is not here ({error})") from error
    result: Any = set_peft_model_state_dict(peft_model, weights)
    missing = [key for key in result.missing_keys if any(part in key for part in (_LORA_A, _LORA_B, MAGNITUDE))]
    if missing or result.unexpected_keys:
        names = ", ".join((missing + list(result.unexpected_keys))[:3])
        raise ValueError(
            f"{folder}: found {len(missing)} adapter weights missing and {len(result.unexpected_keys)} unknown "
            f"({names}); accepted: an adapter of this model"
        )
    return peft_model


def name_without_film(name: str) -> str:
    """The name of a weight in the plain model, for a name inside the FiLM wrapper of the vision backbone."""
    plain = name.replace("vision_backbone.vision_backbone.", "vision_backbone.")
    return plain if plain == name else re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", plain)


def state_dict_without_film(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` under the plain model's names; FiLM's own layers, which that model lacks, are left out."""
    return {name_without_film(key): value for key, value in state_dict.items() if not _FILM_LAYER.search(key)}


def strip_module_prefix(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` without the `module.` that DistributedDataParallel puts before every name."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def own_alpha(layer: str, patterns: Mapping[str, float], default: float) -> float:
    """Alpha of a layer by PEFT's `alpha_pattern`: the first expression that its name ends with counts."""
    return next((alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def merge_lora_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    alpha: float | None = None,
    *,
    alpha_pattern: Mapping[str, float] | None = None,
    rank_stabilized: bool = False,
) -> dict[str, torch.Tensor]:
    """Plain weights of a state dict that holds `X.base_layer.*`, `X.lora_A.*.weight` and `X.lora_B.*.weight`.

    Modules that were trained in full beside the adapters take their place.

    The update is (alpha / rank) * B @ A, alpha defaulting to min(rank, 16), and `alpha_pattern` giving some layers
    their own (see :func:`own_alpha`); alpha / sqrt(rank) for rank-stabilized adapters (rsLoRA, arXiv 2312.03732). Where
    there is a `X.lora_magnitude_vector` (DoRA, arXiv 2402.09353), the rows of the sum are scaled to those norms. Works
    for linear and convolution layers. A state dict without adapters comes back as it is. Sums are formed on the
    weights' device and returned on the CPU: a GPU that trains a model may have no room for another one.
    """
    adapters = {key.split(_LORA_A)[0]: key for key in state_dict if _LORA_A in key}
    magnitudes = {key.split(MAGNITUDE)[0]: value for key, value in state_dict.items() if MAGNITUDE in key}
    merged = {
        key.replace(".base_layer.", ".").replace(f"{FULLY_TRAINED}default.", "."): value
        for key, value in state_dict.items()
        if not any(part in key for part in (_LORA_A, _LORA_B, MAGNITUDE, _REPLACED))
    }
    for name, key_a in adapters.items():
        lora_a, lora_b = state_dict[key_a].float(), state_dict[key_a.replace(_LORA_A, _LORA_B)].float()
        rank = lora_a.shape[0]
        own = own_alpha(name, alpha_pattern or {}, min(rank, 16) if alpha is None else alpha)
        scale = own / (rank**0.5 if rank_stabilized else rank)
        weight = merged[f"{name}.weight"]
        total = weight.float().flatten(1) + scale * (lora_b.flatten(1) @ lora_a.flatten(1))
        if name in magnitudes:
            total *= magnitudes[name].float().view(-1, 1) / total.norm(dim=1, keepdim=True)
        merged[f"{name}.weight"] = total.view(weight.shape).to(weight.dtype).cpu()
    return merged
