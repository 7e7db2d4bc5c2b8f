"""Prismatic vision-language model and OpenVLA on stock transformers and timm, with upstream's weight names.

Non-obvious behavior, all of it upstream's:

- The sequence is [BOS | patches of all images (| proprio token | diffusion time token) | prompt, action tokens, stop].
- Attention is bidirectional over all tokens that are not padding: the Llama gets a 4-D boolean mask.
- Embeddings of action tokens are zeroed (parallel decoding), or replaced by projected noisy actions (diffusion). Where
  they are comes from `labels` in training.
- The vision features are the output of each ViT's second-to-last block; the last block and SigLIP's attention pooling
  have weights but are never run.
- The hidden state at position i predicts token i + 1, so the states of the actions start one position early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerScale as TimmLayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
from prismatic.models.llama_layers import use_fused_layers
from prismatic.vla.action_tokenizer import ActionBins, get_all_actions_mask
from prismatic.vla.constants import EMPTY_TOKEN_ID, IGNORE_INDEX, STOP_INDEX
from prismatic.vla.platforms import Platform, scaled_numbers

if TYPE_CHECKING:
    from prismatic.models.action_heads import DiffusionActionHead, L1RegressionActionHead

# The attention implementations that give the same outputs; flex attention of torch 2.14 aborts the process on CPUs.
ATTENTION = ("sdpa", "eager")


@dataclass
class PrismaticCausalLMOutputWithPast(ModelOutput):
    """Output of the model's forward.

    loss: scalar next-token loss over labels that are not -100; None without labels or logits.
    logits: (B, S, vocabulary), None when `compute_logits=False`. S counts all tokens, S = patches etc. + text.
    hidden_states: L + 1 tensors (B, S, D): embeddings, then each layer; the last one after the final norm.
    projector_features: (B, P, D), the tokens between BOS and prompt: patches, proprio and time tokens.
    last_hidden_state: (B, S, D), always given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    projector_features: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None

    @property
    def past_key_values(self) -> None:
        """Always None: every token sees every other, so nothing can be kept. No field, since its name has changed."""


class LayerScale(nn.Module):
    """timm's LayerScale with the parameter name of OpenVLA checkpoints (`scale_factor` for `gamma`)."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(gamma.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) times one factor per channel."""
        return x * self.scale_factor


class PrismaticVisionBackbone(nn.Module):
    """One timm ViT, or two whose patch features are concatenated on the channels; one to many images per sample."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.use_fused_vision_backbone = bool(config.use_fused_vision_backbone)
        self.num_images_in_input = 1
        self.featurizer = _create_featurizer(config, 0)
        if self.use_fused_vision_backbone:
            self.fused_featurizer = _create_featurizer(config, 1)
            counts = [featurizer.patch_embed.num_patches for featurizer in self.featurizers]
            if counts[0] != counts[1]:
                raise ValueError(f"image_sizes: the two vision models see {counts} patches; accepted: equal numbers")
        self.embed_dim = sum(featurizer.embed_dim for featurizer in self.featurizers)

    @property
    def featurizers(self) -> tuple[VisionTransformer, ...]:
        """The timm models in the order of their channels."""
        if self.use_fused_vision_backbone:
            return self.featurizer, self.fused_featurizer
        return (self.featurizer,)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; taken from one that quantization leaves alone."""
        return self.featurizer.pos_embed.dtype  # type: ignore[union-attr]

    def get_num_patches(self) -> int:
        """Patches of one image."""
        return self.featurizer.patch_embed.num_patches

    def get_num_images_in_input(self) -> int:
        """Images (camera views) of one sample."""
        return self.num_images_in_input

    def set_num_images_in_input(self, num_images_in_input: int) -> None:
        """Say how many images one sample has. Raises ValueError for less than one."""
        if num_images_in_input < 1:
            raise ValueError(f"num_images_in_input: found {num_images_in_input}; accepted: 1 or more")
        self.num_images_in_input = num_images_in_input

    def forward(self, pixel_values: torch.Tensor, language_BD: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, c*V, H, W), c = 3 per vision model -> patch features (B, V*P, C).

        language_BD is the mean language embedding, for blocks that FiLM has been added to.
        """
        views = self.num_images_in_input
        channels = 3 * len(self.featurizers)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels * views:
            raise ValueError(
                f"pixel_values: found shape {tuple(pixel_values.shape)}; accepted: (batch, {channels * views}, height, "
                f"width), {channels} channels for each of {views} image(s) (num_images_in_input)"
            )
        images = pixel_values.reshape(-1, channels, *pixel_values.shape[-2:])
        language = None if language_BD is None else language_BD.repeat_interleave(views, dim=0)
        features = [
            _patch_features(featurizer, images[:, 3 * i : 3 * i + 3], language)
            for i, featurizer in enumerate(self.featurizers)
        ]
        patches = torch.cat(features, dim=2) if len(features) > 1 else features[0]
        return patches.reshape(pixel_values.shape[0], -1, patches.shape[-1])


def _create_featurizer(config: PrismaticConfig, index: int) -> VisionTransformer:
    assert config.image_sizes and config.timm_model_ids  # Filled in by the configuration, like the two lists below.
    assert config.timm_override_act_layers and config.timm_override_kwargs
    options: dict[str, Any] = {"img_size": config.image_sizes[index], "num_classes": 0}
    if config.timm_override_act_layers[index] is not None:
        options["act_layer"] = config.timm_override_act_layers[index]
    options.update(config.timm_override_kwargs[index])
    featurizer = timm.create_model(config.timm_model_ids[index], pretrained=False, **options)
    for module in list(featurizer.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmLayerScale):
                setattr(module, name, LayerScale(child.gamma))
    return cast(VisionTransformer, featurizer)


def _patch_features(featurizer: Any, images: torch.Tensor, language: torch.Tensor | None) -> torch.Tensor:
    """Output of the second-to-last block without class and register tokens: (B, 3, H, W) -> (B, P, C)."""
    if language is None:
        index = len(featurizer.blocks) - 2
        return featurizer.forward_intermediates(
            images, indices=[index], stop_early=True, output_fmt="NLC", intermediates_only=True
        )[0]
    x = featurizer.norm_pre(featurizer.patch_drop(featurizer._pos_embed(featurizer.patch_embed(images))))
    for block in featurizer.blocks[:-1]:
        if featurizer.grad_checkpointing and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, language, use_reentrant=False)
        else:
            x = block(x, language)
    return x[:, featurizer.num_prefix_tokens :]


class PrismaticProjector(nn.Module):
    """MLP from vision features to the language model's width: two layers, three for a fused backbone."""

    def __init__(self, use_fused_vision_backbone: bool, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.use_fused_vision_backbone = use_fused_vision_backbone
        hidden_dim = 4 * vision_dim if use_fused_vision_backbone else llm_dim
        self.fc1 = nn.Linear(vision_dim, hidden_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, llm_dim)
        if use_fused_vision_backbone:
            self.act_fn2 = nn.GELU()
            self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, img_patches: torch.Tensor) -> torch.Tensor:
        """(B, P, vision_dim) -> (B, P, llm_dim)."""
        projected = self.fc2(self.act_fn1(self.fc1(img_patches)))
        return self.fc3(self.act_fn2(projected)) if self.use_fused_vision_backbone else projected


class PrismaticPreTrainedModel(PreTrainedModel):
    """Loading, saving and gradient checkpointing for Prismatic models."""

    config_class = PrismaticConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities: str | list[str] = ["image", "text"]  # noqa: RUF012 - typed by the base class
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrismaticProjector", "LlamaDecoderLayer", "Block"]  # noqa: RUF012 - typed by the base class
    _supports_sdpa = True

    def recompute_activations(self) -> None:
        """Turn gradient checkpointing on, by whichever name the installed transformers has for it."""
        enable = getattr(self, "activation_checkpointing_enable", None) or self.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Also reach the timm models, which transformers does not know."""
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, PrismaticVisionBackbone):
                for featurizer in module.featurizers:
                    featurizer.set_grad_checkpointing(enable)


class PrismaticForConditionalGeneration(PrismaticPreTrainedModel):
    """Vision backbone, projector and Llama; text in, next-token logits and hidden states out."""

    def __init__(self, config: PrismaticConfig) -> None:
        if config._attn_implementation is not None:
            _check_attention(config._attn_implementation)
        super().__init__(config)
        self.vision_backbone: Any = PrismaticVisionBackbone(config)
        llm_dim = config.text_config.hidden_size
        self.projector = PrismaticProjector(
            bool(config.use_fused_vision_backbone), self.vision_backbone.embed_dim, llm_dim
        )
        self.language_model = LlamaForCausalLM(config.text_config)
        use_fused_layers(self.language_model)
        self.vocab_size = config.text_config.vocab_size
        self.pad_token_id = config.pad_token_id
        self.llm_dim = llm_dim
        self.post_init()

    # transformers finds the input embeddings by itself, since the Llama is called `language_model`; not so the head.

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True when activations are computed anew in the backward pass; peft asks by this name, deprecated in 5.24."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head, tokens from hidden states."""
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the language model another head."""
        self.language_model.lm_head = new_embeddings

    def forward(  # noqa: PLR0913 - the interface of transformers and of upstream
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        compute_logits: bool = True,
        proprio: torch.Tensor | None = None,
        proprio_projector: nn.Module | None = None,
        noisy_actions: torch.Tensor | None = None,
        noisy_action_projector: nn.Module | None = None,
        diffusion_timestep_embeddings: torch.Tensor | None = None,
        use_film: bool = False,
        last_state_of_text: bool = False,
    ) -> PrismaticCausalLMOutputWithPast:
        """One pass over [BOS | patches (| proprio | time) | text].

        input_ids, attention_mask (1 or True on real tokens, right padded), labels: (B, S_text). Action tokens are those
        that `labels` marks; without labels no embedding is zeroed or replaced.
        pixel_values: (B, c*V, H, W), V images per sample as set on the vision backbone.
        proprio: (B, proprio_dim) normalized. noisy_actions: (B, T, A) with diffusion_timestep_embeddings (B, 1, D).
        compute_logits=False runs no language-model head: loss and logits are None, the rest is the same.
        last_state_of_text=True lets the last block of float32 training compute the text's rows alone; the last hidden
        state of BOS, patches, proprio and time then means nothing.
        """
        action_mask = self._action_mask_from_labels(labels)
        text = self.get_input_embeddings()(input_ids)
        text_mask = _as_bool_mask(attention_mask, input_ids)
        language = self._film_language(text, text_mask, action_mask, use_film)
        patches = self._project_images(pixel_values, language)
        prefix = self._prefix_tokens(patches, proprio, proprio_projector, diffusion_timestep_embeddings)
        text = self._mask_action_embeddings(text, action_mask, noisy_actions, noisy_action_projector)
        self.language_model.model.layers[-1].first_row = prefix.shape[1] if last_state_of_text else 0
        outputs = self._run_language_model(text, text_mask, prefix, output_hidden_states)
        return self._assemble_output(outputs, prefix, labels, compute_logits)

    # === Parts of the forward pass ===

    def _action_mask_from_labels(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """A plain VLM knows no actions; OpenVLA finds its action tokens in the labels."""
        return None

    def _film_language(
        self,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        action_mask: torch.Tensor | None,
        use_film: bool,
        exclude_padding: bool | None = None,
    ) -> torch.Tensor | None:
        """Mean embedding (B, D) of the text without action tokens, for FiLM; None without FiLM.

        Padding (where `text_mask` is False) is left out as asked for, by default as the configuration says.
        """
        if not use_film:
            return None
        if exclude_padding is None:
            exclude_padding = getattr(self.config, "film_exclude_padding", False)
        kept = text_mask if exclude_padding else torch.ones_like(text_mask)
        if action_mask is not None:
            kept = kept & ~action_mask
        weight = kept.to(text.dtype).unsqueeze(-1)
        return (text * weight).sum(dim=1) / weight.sum(dim=1)

    def _project_images(self, pixel_values: torch.Tensor | None, language: torch.Tensor | None) -> torch.Tensor:
        """Images (B, c*V, H, W) -> tokens (B, V*P, D)."""
        if pixel_values is None:
            raise ValueError("pixel_values: found None; accepted: images (batch, channels * images, height, width)")
        pixel_values = pixel_values.to(self.vision_backbone.dtype)
        if language is None:
            return self.projector(self.vision_backbone(pixel_values))
        return self.projector(self.vision_backbone(pixel_values, language.to(self.vision_backbone.dtype)))

    def _prefix_tokens(
        self,
        patches: torch.Tensor,
        proprio: torch.Tensor | None,
        proprio_projector: nn.Module | None,
        time_embeddings: torch.Tensor | None,
    ) -> torch.Tensor:
        """Patches, then the proprio token, then the diffusion time token: (B, P + 0..2, D)."""
        parts = [patches]
        if proprio is not None and proprio_projector is not None:
            state_shape, batch = tuple(proprio.shape), patches.shape[0]
            width = getattr(proprio_projector, "proprio_dim", state_shape[-1])
            if proprio.numel() != batch * width:
                raise ValueError(
                    f"proprio: found shape {state_shape}; accepted: ({batch}, {width}), one state per sample"
                )
            state = proprio.reshape(batch, width).to(_input_dtype(proprio_projector, patches.dtype))
            parts.append(proprio_projector(state).unsqueeze(1).to(patches.dtype))
        if time_embeddings is not None:
            parts.append(time_embeddings.to(patches.dtype))
        return torch.cat(parts, dim=1) if len(parts) > 1 else patches

    def _mask_action_embeddings(
        self,
        text: torch.Tensor,
        action_mask: torch.Tensor | None,
        noisy_actions: torch.Tensor | None = None,
        noisy_action_projector: nn.Module | None = None,
    ) -> torch.Tensor:
        """Zero the action tokens' embeddings, or put projected noisy actions (B, T, A) in their place."""
        if action_mask is None:
            return text
        mask = action_mask.unsqueeze(-1)
        if noisy_actions is None:
            return text * ~mask
        if noisy_action_projector is None:
            raise ValueError(
                "noisy_action_projector: found None with noisy_actions given; accepted: a NoisyActionProjector"
            )
        numbers = noisy_actions.reshape(text.shape[0], -1, 1).to(_input_dtype(noisy_action_projector, text.dtype))
        return text.masked_scatter(mask, noisy_action_projector(numbers).to(text.dtype))

    def _run_language_model(
        self, text: torch.Tensor, text_mask: torch.Tensor, prefix: torch.Tensor, output_hidden_states: bool
    ) -> BaseModelOutputWithPast:
        """Llama over [BOS | prefix | rest of the text], every token seeing every token that is not padding."""
        embeddings = torch.cat([text[:, :1], prefix.to(text.dtype), text[:, 1:]], dim=1)
        mask = torch.cat([text_mask[:, :1], text_mask.new_ones(prefix.shape[:2]), text_mask[:, 1:]], dim=1)
        return self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=self._attention_mask(mask, embeddings.dtype),
            output_hidden_states=output_hidden_states,
            use_cache=False,
        )

    def _attention_mask(self, kept_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The mask (B, 1, S, S) that lets every token see the kept ones, as the attention implementation reads it."""
        kept = kept_BS[:, None, None, :].expand(-1, 1, kept_BS.shape[1], -1)
        implementation = self.language_model.config._attn_implementation
        _check_attention(implementation)
        if implementation == "sdpa" and kept.device.type != "cpu":
            return kept
        # Eager attention adds the mask to the scores: booleans would add 1. On CPUs, torch's does so too, and would
        # make numbers of booleans anew in every layer.
        return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill_(~kept, torch.finfo(dtype).min)

    def _assemble_output(
        self, outputs: BaseModelOutputWithPast, prefix: torch.Tensor, labels: torch.Tensor | None, compute_logits: bool
    ) -> PrismaticCausalLMOutputWithPast:
        logits = self.language_model.lm_head(outputs.last_hidden_state) if compute_logits else None
        return PrismaticCausalLMOutputWithPast(
            loss=None if labels is None or logits is None else _next_token_loss(logits, labels, prefix.shape[1]),
            logits=logits,
            hidden_states=outputs.hidden_states,
            projector_features=prefix,
            last_hidden_state=outputs.last_hidden_state,
        )


def _check_attention(implementation: str | None) -> None:
    if implementation not in ATTENTION:
        raise ValueError(f"attn_implementation: {implementation!r} found; accepted: {', '.join(ATTENTION)}")


def _as_bool_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def _input_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    parameter = next(module.parameters(), None)
    return default if parameter is None else parameter.dtype


def _next_token_loss(logits: torch.Tensor, labels: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """Cross entropy of text labels (B, S_text); the prefix has no labels, so only the text's logits count.

    The logits that predict labels[:, 1:] end at the second-to-last position; labels[:, 0] (BOS) predicts nothing.
    """
    relevant = logits[:, num_prefix:-1].float().flatten(0, 1)
    return F.cross_entropy(relevant, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


class OpenVLAForActionPrediction(PrismaticForConditionalGeneration):
    """A Prismatic VLM that decodes a chunk of actions in one pass, by regression, diffusion or action tokens."""

    config_class = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.norm_stats = config.norm_stats or {}
        self.action_bins = ActionBins(config.action_vocab_size, config.n_action_bins)

    @property
    def platform(self) -> Platform:
        """Chunk length, action width and normalization, from the configuration."""
        return self.config.get_platform()

    @property
    def bin_centers(self) -> np.ndarray:
        """The normalized values that action tokens stand for."""
        return self.action_bins.bin_centers

    def _action_mask_from_labels(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None:
            return None
        return get_all_actions_mask(labels, self.platform.action_dim, self.action_bins.token_begin_idx)

    # === Action prediction ===

    @torch.no_grad()
    def predict_action(  # noqa: PLR0913 - upstream's interface
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        unnorm_key: str | None = None,
        proprio: torch.Tensor | np.ndarray | None = None,
        proprio_projector: nn.Module | None = None,
        action_head: Any = None,
        noisy_action_projector: nn.Module | None = None,
        use_film: bool = False,
        initial_noise: torch.Tensor | None = None,
        do_sample: bool = False,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Action chunks for a batch of prompts (right padded; lengths may differ) and images.

        input_ids, attention_mask: (B, S). pixel_values: (B, c*V, H, W). proprio: (B, proprio_dim), or (proprio_dim,)
        for one sample, normalized. An L1 head, a diffusion head (with its `noisy_action_projector`) or, without a head,
        the action tokens decide the actions. Token 29871 is appended to prompts that do not end in it. Diffusion
        starts from `initial_noise` (B, T, A) when given, else from torch's global generator.
        do_sample can only be False, decoding is greedy; the argument is there for upstream's callers.

        Returns un-normalized actions (B, T, A) (float64; units of the data set `unnorm_key`) and the hidden states of
        the action tokens (B, T*A, D). Raises ValueError for an unknown `unnorm_key` and for do_sample=True.
        """
        if do_sample:
            raise ValueError("do_sample: found True; accepted: False, actions are decoded greedily")
        statistics = self.get_action_stats(unnorm_key)
        inputs = self._append_action_tokens(input_ids, _as_bool_mask(attention_mask, input_ids))
        text = self.get_input_embeddings()(inputs.input_ids)
        # One by one, prompts have no padding; a batch must not differ from that, so padding never enters the mean.
        language = self._film_language(text, inputs.attention_mask, inputs.action_mask, use_film, exclude_padding=True)
        patches = self._project_images(pixel_values, language)
        state = None if proprio is None else torch.as_tensor(proprio, device=patches.device)
        prefix = self._prefix_tokens(patches, state, proprio_projector, None)
        if noisy_action_projector is not None and action_head is not None:
            normalized, hidden = self._sample_actions(
                inputs, text, prefix, action_head, noisy_action_projector, initial_noise
            )
        else:
            normalized, hidden = self._decode_actions(inputs, text, prefix, action_head)
        return self._unnormalize_actions(normalized, statistics), hidden

    def _append_action_tokens(self, input_ids: torch.Tensor, mask: torch.Tensor) -> _ActionInputs:
        """Put the empty token (if missing), placeholders for the actions and the stop token after each prompt."""
        count = self.platform.num_action_tokens
        rows = [row[keep].tolist() for row, keep in zip(input_ids.cpu(), mask.cpu(), strict=True)]
        prompts = [row if row and row[-1] == EMPTY_TOKEN_ID else [*row, EMPTY_TOKEN_ID] for row in rows]
        width = max(map(len, prompts)) + count + 1
        new_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        new_mask = torch.zeros((len(rows), width), dtype=torch.bool)
        action_mask = torch.zeros_like(new_mask)
        for i, prompt in enumerate(prompts):
            start = len(prompt)
            new_ids[i, :start] = torch.tensor(prompt)
            # An arbitrary id does here: the embeddings of these positions are zeroed or replaced.
            new_ids[i, start : start + count] = self.action_bins.token_begin_idx + 1
            new_ids[i, start + count] = STOP_INDEX
            new_mask[i, : start + count + 1] = True
            action_mask[i, start : start + count] = True
        device = input_ids.device
        return _ActionInputs(new_ids.to(device), new_mask.to(device), action_mask.to(device))

    def _action_hidden_states(self, inputs: _ActionInputs, text: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T*A, D) that predict the action tokens, given embeddings of the text (B, S, D)."""
        outputs = self._run_language_model(text, inputs.attention_mask, prefix, output_hidden_states=False)
        assert outputs.last_hidden_state is not None
        hidden = outputs.last_hidden_state[:, prefix.shape[1] : -1]
        return hidden[inputs.action_mask[:, 1:]].reshape(text.shape[0], -1, hidden.shape[-1])

    def _decode_actions(
        self,
        inputs: _ActionInputs,
        text: torch.Tensor,
        prefix: torch.Tensor,
        action_head: L1RegressionActionHead | None,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Normalized actions (B, T, A) by an L1 head, or by the likeliest action tokens without one."""
        hidden = self._action_hidden_states(inputs, self._mask_action_embeddings(text, inputs.action_mask), prefix)
        if action_head is not None:
            predicted = action_head.predict_action(hidden.to(_input_dtype(action_head, hidden.dtype)))
            return predicted.float().cpu().numpy(), hidden
        token_ids = self.language_model.lm_head(hidden).argmax(dim=-1).cpu().numpy()
        actions = self.action_bins.decode(token_ids)
        return actions.reshape(-1, self.platform.chunk, self.platform.action_dim), hidden

    def _sample_actions(
        self,
        inputs: _ActionInputs,
        text: torch.Tensor,
        prefix: torch.Tensor,
        action_head: DiffusionActionHead,
        noisy_action_projector: nn.Module,
        initial_noise: torch.Tensor | None = None,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Normalized actions (B, T, A) by DDIM from Gaussian noise; images and proprio are encoded once."""
        batch, platform = text.shape[0], self.platform
        dtype = _input_dtype(action_head, text.dtype)
        shape = (batch, platform.chunk, platform.action_dim)
        if initial_noise is None:
            actions = torch.randn(shape, device=text.device, dtype=dtype)
        else:
            actions = initial_noise.to(text.device, dtype)
        hidden = text.new_zeros(())
        for timestep in action_head.noise_scheduler.timesteps:
            steps = timestep.to(text.device).expand(batch)
            tokens = torch.cat([prefix, action_head.embed_timesteps(steps, prefix.dtype)], dim=1)
            noisy_text = self._mask_action_embeddings(text, inputs.action_mask, actions, noisy_action_projector)
            hidden = self._action_hidden_states(inputs, noisy_text, tokens)
            noise = action_head.predict_noise(hidden.to(dtype))
            actions = action_head.remove_noise(noise, timestep, actions)
        return actions.float().cpu().numpy(), hidden

    # === Statistics ===

    def _check_unnorm_key(self, unnorm_key: str | None) -> str:
        if unnorm_key is None and len(self.norm_stats) == 1:
            return next(iter(self.norm_stats))
        if unnorm_key not in self.norm_stats:
            raise ValueError(
                f"unnorm_key: found {unnorm_key!r}; accepted: {', '.join(sorted(self.norm_stats)) or 'none'}"
            )
        return unnorm_key

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, list[float]]:
        """Action statistics of a data set; the key may be left out when the checkpoint has just one."""
        return self.norm_stats[self._check_unnorm_key(unnorm_key)]["action"]

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Numbers in one action, by the statistics of a data set."""
        return len(self.get_action_stats(unnorm_key)["min"])

    def _unnormalize_actions(self, normalized: np.ndarray, statistics: Mapping[str, Sequence[float]]) -> np.ndarray:
        """(B, T, A) from [-1, 1] to the units of the data; numbers with mask False (the gripper) stay as they are."""
        low, high = (np.array(bound) for bound in self.platform.normalization.bounds(statistics))
        mask = scaled_numbers(statistics, len(low))
        return np.where(mask, 0.5 * (normalized + 1) * (high - low + 1e-8) + low, normalized)


@dataclass
class _ActionInputs:
    """Prompts with room for the actions: ids, attention mask and positions of the actions, each (B, S)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
