"""Prompts of pi0 and pi0.5 and their tokens, by PaliGemma's tokenizer from a folder.

Not obvious: without a state in the prompt, pi0.5 has pi0's form of prompt (openpi's `discrete_state_input=False`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismatic.util.errors import UsageError, one_line
from prismatic.util.files import DAMAGED

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_EDGES = np.linspace(-1, 1, 257)[:-1]


def prompt_text(instruction: str, state: Sequence[float] | np.ndarray | None = None) -> str:
    """The words before the actions.

    Args:
        instruction: underscores and line breaks in it become blanks.
        state: for pi0.5, normalized to [-1, 1] and not padded: each number becomes that of its bin of 256, or -1 below.
    """
    cleaned = instruction.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return f"{cleaned}\n"
    bins = np.digitize(np.asarray(state), _EDGES) - 1
    return f"Task: {cleaned}, State: {' '.join(map(str, bins))};\nAction: "


def load_tokenizer(folder: Path) -> Any:
    """PaliGemma's tokenizer (transformers' class) from a folder that holds its files.

    Raises UsageError: the folder has none, or damaged files.
    """
    from transformers import AutoTokenizer, GemmaTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"{folder}: no tokenizer found; accepted: a folder with {' or '.join(TOKENIZER_FILES)} "
            "(those of google/paligemma-3b-pt-224)"
        )
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else GemmaTokenizer
    try:
        return kind.from_pretrained(folder)
    except Exception as error:
        # For a damaged file the tokenizers library raises Exception itself; sentencepiece may be missing.
        if type(error) is not Exception and not isinstance(error, (*DAMAGED, ImportError)):
            raise
        raise UsageError(
            f"{folder}: its tokenizer cannot be read ({one_line(error, 80)}); accepted: tokenizer.json, "
            "or tokenizer.model where sentencepiece is installed"
        ) from error


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, length], right padded with 0, and their bool mask; longer texts are cut.

    A text begins with the tokenizer's <bos> once, whether or not its file says so.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens = [*start, *tokenizer.encode(text, add_special_tokens=False)][:length]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return ids, mask
