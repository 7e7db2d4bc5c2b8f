"""Stock vision-language models of transformers, tiny and with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, TEXT_WIDTH, DEPTH = 100, 32, 4
_TEXT = {
    "model_type": "gemma",
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 101,
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
    "vision_use_head": False,
}
TOKENS = 9  # of one image


def paligemma() -> Any:
    """PaliGemma: the image's tokens, then text."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": TEXT_WIDTH}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(**sizes, image_token_index=IMAGE))


def paligemma_batch() -> dict[str, torch.Tensor]:
    """Two samples of one image and three words."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[IMAGE] * TOKENS + [5, 6, 7], [IMAGE] * TOKENS + [8, 9, 10]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": ids,
        "pixel_values": torch.randn(2, 3, 42, 42, generator=generator),
    }


def pi0() -> Any:
    """transformers' PI0."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    torch.manual_seed(0)
    vlm = {"model_type": "paligemma", "text_config": _TEXT, "vision_config": _VISION, "projection_dim": TEXT_WIDTH}
    expert = {**_TEXT, "hidden_size": 16, "intermediate_size": 32}
    sizes = {"chunk_size": 5, "max_state_dim": 6, "max_action_dim": 6}
    return PI0ForConditionalGeneration(
        PI0Config(vlm_config={**vlm, "image_token_index": IMAGE}, dit_config=expert, **sizes)
    )


def pi0_batch(cameras: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch whose missing cameras (False in (B, V)) have no tokens; padded right."""
    generator = torch.Generator().manual_seed(1)
    batch, views = cameras.shape
    ids = torch.zeros(batch, views * TOKENS + 3, dtype=torch.long)
    attended = torch.zeros_like(ids)
    for row, count in enumerate((cameras.sum(dim=1) * TOKENS).tolist()):
        ids[row, : count + 3] = torch.tensor([IMAGE] * count + [5, 6, 7])
        attended[row, : count + 3] = 1
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "pixel_values": torch.randn(batch, views, 3, 42, 42, generator=generator),
        "pixel_attention_mask": cameras,
        "state": torch.randn(batch, 6, generator=generator),
        "actions": torch.randn(batch, 5, 6, generator=generator),
        "noise": torch.randn(batch, 5, 6, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
    }
