"""The mini pi0.5: configuration, tokenizer and random weights, before any training.

pi0.5's own classes and files at a size that trains on a CPU core: two views of 84 pixels give 36 tokens each, and
prefix and action expert have six blocks of width 96. Actions and states are padded to 8 numbers instead of 32: the
loss is then mostly of LIBERO's seven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.mini.make.make_tokenizer import read_instructions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from prismatic.models.pi.model import PiPolicy

IMAGE_SIZE, PATCH_SIZE = 84, 14
GEMMA: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "vision_use_head": False,
}
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # PaliGemma's, by its ids.
_SPACE = "\u2581"


def build_tokenizer(instructions: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with PaliGemma's special tokens and blanks.

    A word of LIBERO's instructions or a bin of a state is one token; other text becomes pieces, characters or bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = list(read_instructions() if instructions is None else instructions)
    numbers = " ".join(str(number) for number in range(-1, 256))
    texts += [f"Task: {text}, State: {numbers};\nAction: " for text in list(texts)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    words = Regex(rf"{_SPACE}?-?\w+|[^\w{_SPACE}]|{_SPACE}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["\n", _SPACE]
    reserved = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=20000, min_frequency=1, show_progress=False, special_tokens=reserved, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, eos, bos, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unknown
    )


def build_policy(seed: int, vocabulary: int) -> PiPolicy:
    """A randomly initialized mini pi0.5 (float32); one seed, one set of weights."""
    import torch

    from prismatic.models.pi.config import pi_config
    from prismatic.models.pi.model import PiPolicy

    gemma = {**GEMMA, "vocab_size": vocabulary}
    config = pi_config(
        "pi05",
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma,
            "vision_config": VISION,
            "projection_dim": GEMMA["hidden_size"],
            "image_token_index": vocabulary,
        },
        dit_config=gemma,
        chunk_size=10,
        max_action_dim=8,
        max_state_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = PiPolicy(config)
        # The forward pass multiplies them by the square root of their width.
        torch.nn.init.normal_(policy.language_model.embed_tokens.weight, std=1 / math.sqrt(GEMMA["hidden_size"]))
    return policy


def write_student(folder: Path, seed: int) -> None:
    """A randomly initialized student and its tokenizer on disk."""
    tokenizer = build_tokenizer()
    build_policy(seed, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
