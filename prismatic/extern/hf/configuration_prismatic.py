"""Configuration of Prismatic vision-language models and of OpenVLA.

Two fields go beyond upstream's; upstream ignores both:

- `timm_override_kwargs`: keyword arguments on top of each timm id, so the real classes come in small sizes;
- `platform` (OpenVLA): name or fields of the robot platform, see `prismatic.vla.platforms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig

from prismatic.util.errors import unknown_name
from prismatic.vla.platforms import Platform, get_platform


@dataclass(frozen=True)
class VisionBackboneSpec:
    """The timm models of one vision backbone: one id, or two whose patch features are concatenated."""

    timm_ids: tuple[str, ...]
    image_size: int
    act_layers: tuple[str | None, ...]


_DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
_CLIP = "vit_large_patch14_clip_"
_SIGLIP = "vit_so400m_patch14_siglip_"

VISION_BACKBONES: dict[str, VisionBackboneSpec] = {
    "in1k-vit-l": VisionBackboneSpec(("vit_large_patch16_224.augreg_in21k_ft_in1k",), 224, (None,)),
    "dinov2-vit-l": VisionBackboneSpec((_DINOV2,), 224, (None,)),
    "clip-vit-l": VisionBackboneSpec((_CLIP + "224.openai",), 224, ("quick_gelu",)),
    "clip-vit-l-336px": VisionBackboneSpec((_CLIP + "336.openai",), 336, ("quick_gelu",)),
    "siglip-vit-so400m": VisionBackboneSpec((_SIGLIP + "224",), 224, (None,)),
    "siglip-vit-so400m-384px": VisionBackboneSpec((_SIGLIP + "384",), 384, (None,)),
    "dinoclip-vit-l-336px": VisionBackboneSpec((_DINOV2, _CLIP + "336.openai"), 336, (None, "quick_gelu")),
    "dinosiglip-vit-so-224px": VisionBackboneSpec((_DINOV2, _SIGLIP + "224"), 224, (None, None)),
    "dinosiglip-vit-so-384px": VisionBackboneSpec((_DINOV2, _SIGLIP + "384"), 384, (None, None)),
}

RESIZE_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")


class PrismaticConfig(PretrainedConfig):
    """A Prismatic VLM: timm vision backbone(s), an MLP projector, a Llama.

    `image_sizes` (pixels), `timm_model_ids`, `timm_override_act_layers` and `timm_override_kwargs` have one entry per
    vision model; those left out follow from `vision_backbone_id`. Defaults are upstream's.

    Raises UsageError or ValueError in one line for an unknown backbone, resize strategy or language model and for lists
    of the wrong length.
    """

    model_type: ClassVar[str] = "prismatic"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig}

    vision_backbone_id: str = "siglip-vit-so400m"
    llm_backbone_id: str = "vicuna-v15-7b"
    arch_specifier: str = "no-align+gelu-mlp"
    use_fused_vision_backbone: bool | None = None
    image_resize_strategy: str = "letterbox"
    text_config: Any = None  # A dictionary becomes a LlamaConfig
    llm_max_length: int = 2048
    pad_token_id: int = 32000
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    hf_llm_id: str | None = None
    image_sizes: list[int] | None = None
    timm_model_ids: list[str] | None = None
    timm_override_act_layers: list[str | None] | None = None
    timm_override_kwargs: list[dict[str, object]] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if isinstance(self.text_config, dict):
            _check_language_model(self.text_config)
        super().__post_init__(**kwargs)
        # transformers ties weights by the field of the whole model; a Llama's own field says what the checkpoint has.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.image_resize_strategy not in RESIZE_STRATEGIES:
            raise unknown_name("image_resize_strategy", self.image_resize_strategy, RESIZE_STRATEGIES)
        self._fill_vision_fields()

    def _fill_vision_fields(self) -> None:
        if self.vision_backbone_id not in VISION_BACKBONES:
            raise unknown_name("vision_backbone_id", self.vision_backbone_id, VISION_BACKBONES)
        spec = VISION_BACKBONES[self.vision_backbone_id]
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(spec.timm_ids) == 2
        if self.timm_model_ids is None:
            self.timm_model_ids = list(spec.timm_ids)
        count = len(self.timm_model_ids)
        if count != 1 + self.use_fused_vision_backbone:
            raise ValueError(
                f"timm_model_ids: found {count} ids with use_fused_vision_backbone={self.use_fused_vision_backbone}; "
                "accepted: 2 ids when it is True, 1 when it is False"
            )
        self.image_sizes = self.image_sizes or [spec.image_size] * count
        self.timm_override_act_layers = self.timm_override_act_layers or list(spec.act_layers)
        self.timm_override_kwargs = self.timm_override_kwargs or [{} for _ in range(count)]
        for name in ("image_sizes", "timm_override_act_layers", "timm_override_kwargs"):
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name}: found {len(getattr(self, name))} entries; accepted: {count}, one per vision model"
                )


class OpenVLAConfig(PrismaticConfig):
    """A Prismatic VLM that predicts actions.

    norm_stats: {dataset: {"action": {...}, "proprio": {...}}}, the statistics that un-normalize actions.
    n_action_bins: bins of the discrete action tokens.
    platform: name (or dictionary of fields) of the robot platform.
    film_exclude_padding: average the language embeddings that FiLM gets over real tokens only. Released FiLM
        checkpoints were trained with padding in the mean, which is the default.
    """

    model_type: ClassVar[str] = "openvla"

    norm_stats: dict[str, Any] | None = None
    n_action_bins: int = 256
    platform: str | dict[str, object] = "libero"
    film_exclude_padding: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.platform, Platform):
            self.platform = self.platform.to_dict()
        self.get_platform()

    def get_platform(self) -> Platform:
        """The robot platform that the `platform` field names or describes."""
        return get_platform(self.platform)

    @property
    def action_vocab_size(self) -> int:
        """Tokens of the vocabulary without the rows that pad the embedding matrix (32064 - 64 = 32000)."""
        return self.text_config.vocab_size - self.pad_to_multiple_of


def _check_language_model(text_config: dict[str, object]) -> None:
    model_type = text_config.get("model_type", "llama")
    if model_type != "llama":
        raise ValueError(f"text_config.model_type: found {model_type!r}; accepted: 'llama'")
