"""The mini student's tokenizer keeps Llama-2's ids where the code relies on them and splits nothing it need not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.mini.make.make_tokenizer import (
    ACTION_CHARACTERS,
    SPACE_ID,
    build_tokenizer,
    build_vocabulary,
    is_filler,
    read_instructions,
)
from prismatic.util.errors import UsageError

PROMPT = "In: What action should the robot take to {}?\nOut:"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_instruction_is_one_token_a_word(tokenizer) -> None:
    for instruction in read_instructions():
        prompt = PROMPT.format(instruction)
        words = re.findall(r"\w+|[^\w\s]|\n", prompt)
        assert len(tokenizer(prompt).input_ids) == 1 + len(words), prompt


def test_fixed_ids(tokenizer) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 32000
    assert len(tokenizer) == 32001
    assert tokenizer.convert_tokens_to_ids("\u2581") == SPACE_ID == 29871
    assert tokenizer.convert_tokens_to_ids("<0x0A>") == 13
    assert tokenizer.padding_side == "right"


def test_action_tokens_follow_the_prompt_one_each(tokenizer) -> None:
    prompt = PROMPT.format("open the top drawer of the cabinet")
    actions = "".join(ACTION_CHARACTERS[i] for i in (0, 255, 128, 127, 3, 3, 200))
    ids = tokenizer(f"{prompt} {actions}</s>").input_ids
    start = len(tokenizer(prompt).input_ids)
    assert ids[:start] == tokenizer(prompt).input_ids
    assert ids[start:] == [SPACE_ID, 31744, 31999, 31872, 31871, 31747, 31747, 31944, 2]
    assert tokenizer.decode(ids[start + 1 : -1]) == actions


def test_decodes_what_it_encoded_also_unknown_words(tokenizer) -> None:
    for text in ("Grab the ZEBRA (quickly), 100% sure!", "caf\u00e9", PROMPT.format("x" * 40)):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_text_never_reaches_fillers(tokenizer) -> None:
    ids = tokenizer("take <u300> and <u29870>").input_ids
    assert not any(is_filler(token) for token in tokenizer.convert_ids_to_tokens(ids))


def test_saved_files_load_as_the_same_tokenizer(tokenizer, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = LlamaTokenizer.from_pretrained(tmp_path)
    prompt = PROMPT.format("put the bowl on the plate") + " " + ACTION_CHARACTERS[7]
    assert loaded(prompt).input_ids == tokenizer(prompt).input_ids
    assert (tmp_path / "tokenizer.json").stat().st_size < 1_500_000


def test_refuses_what_the_byte_layout_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="printable ASCII"):
        build_vocabulary(["move it to the stove\u2019s front"])
    with pytest.raises(UsageError, match="no file"):
        read_instructions(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="no instruction"):
        read_instructions(tmp_path / "empty.txt")
