"""The mini student's tokenizer: Llama-2's layout of ids, learned from LIBERO's instructions.

Same ids where the code relies on them, so that a mini checkpoint runs through the code of the real one unchanged:
0-2 `<unk> <s> </s>`, 3-258 the bytes, 259... the merged pieces, 29871 the lone space marker, single characters after
it, and the last 256 of the 32,000 ids single characters that never merge (the action bins). `<PAD>` is 32000.
The merges come from `instructions.txt` (the language field of LIBERO's task files, rewordings included), so every word
of those instructions is one token and a prompt stays short. All other ids are fillers that no text produces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prismatic.util.cli import run
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

INSTRUCTIONS = Path(__file__).with_name("instructions.txt")
VOCAB_SIZE = 32000
NUM_ACTION_BINS = 256
MAX_LENGTH = 2048
SPACE_ID = 29871
SPACE = "\u2581"
# Llama-2's own last ids are CJK characters as well; any block that English text does not use would serve.
ACTION_CHARACTERS = [chr(0x5000 + i) for i in range(NUM_ACTION_BINS)]
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
PAD_TOKEN = "<PAD>"
# "In" follows the sequence's implied space, "Out" follows a line break and so has none.
PROMPT = "In: What action should the robot take to {instruction}?"
PROMPT_TAIL = ("Out", ":")


def read_instructions(path: Path = INSTRUCTIONS) -> list[str]:
    """The training text, one instruction a line. Raises UsageError when the file is absent or has none."""
    if not path.is_file():
        raise UsageError(f"instructions: no file {path}; give a text file with one instruction a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"instructions: {path} has no instruction; give a text file with one instruction a line")
    return lines


def _words(instructions: Sequence[str]) -> list[str]:
    """Words and punctuation marks of the prompts, each word with the space marker before it, as BPE sees them."""
    words = list(PROMPT_TAIL)
    for instruction in instructions:
        prompt = PROMPT.format(instruction=instruction)
        for mark_or_word in re.findall(r" ?\w+|[^\w\s]", " " + prompt):
            words.append(mark_or_word.replace(" ", SPACE))
    return words


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """BPE merges, in order, that make every word one piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Far more merges than the text holds: training stops when each word is whole.
    trainer = trainers.BpeTrainer(vocab_size=20000, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def is_filler(token: str) -> bool:
    """Tell whether `token` only holds a place in the table of ids."""
    return re.fullmatch(r"<u\d+>", token) is not None


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """token -> id for all 32,000 ids."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    for i in range(len(vocab), SPACE_ID):
        vocab[f"<u{i}>"] = i
    vocab[SPACE] = SPACE_ID
    for code in range(ord("!"), ord("~") + 1):
        vocab[chr(code)] = len(vocab)
    for i in range(len(vocab), VOCAB_SIZE - NUM_ACTION_BINS):
        vocab[f"<u{i}>"] = i
    for character in ACTION_CHARACTERS:
        vocab[character] = len(vocab)
    return vocab


def build_vocabulary(instructions: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order), the same for the same instructions; raises UsageError for what is not ASCII."""
    odd = next((line for line in instructions if not (line.isascii() and line.isprintable())), None)
    if odd is not None:
        raise UsageError(f"instructions: {odd!r} has characters outside printable ASCII; use plain ASCII instructions")
    merges = _learn_merges(_words(instructions))
    return _vocabulary(merges), merges


def build_tokenizer(instructions: Sequence[str] | None = None) -> LlamaTokenizer:
    """The tokenizer, learned from `instructions` (default: `instructions.txt`); pads on the right, as training does."""
    from transformers import LlamaTokenizer

    vocab, merges = build_vocabulary(read_instructions() if instructions is None else instructions)
    options = {"add_bos_token": True, "padding_side": "right", "model_max_length": MAX_LENGTH}
    return LlamaTokenizer(vocab=vocab, merges=merges, pad_token=PAD_TOKEN, **options)


@dataclass
class MakeTokenizerConfig:
    """Write the mini student's tokenizer into a folder."""

    out: Path  # Folder to write tokenizer.json and tokenizer_config.json to
    instructions: Path = INSTRUCTIONS  # Text file, one instruction a line; LIBERO's by default


def main(cfg: MakeTokenizerConfig) -> None:
    tokenizer = build_tokenizer(read_instructions(cfg.instructions))
    tokenizer.save_pretrained(cfg.out)
    prompt = PROMPT.format(instruction="pick up the alphabet soup and place it in the basket") + "\nOut:"
    print(f"{cfg.out}: {len(tokenizer)} ids; a LIBERO prompt takes {len(tokenizer(prompt).input_ids)} tokens")


if __name__ == "__main__":
    run(MakeTokenizerConfig, main)
