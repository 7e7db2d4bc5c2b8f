"""The shipped mini pi0.5: the files of a checkpoint, its tokenizer, and a policy that acts in the simulator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.mini.make.make_tokenizer import read_instructions
from experiments.mini.make.pi05_student import build_tokenizer
from prismatic.models.pi.prompts import load_tokenizer, prompt_text, tokenize

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "mini" / "weights" / "pi05"


def test_is_a_pi05_in_less_than_ten_megabytes() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "dataset_statistics.json", "README.md"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["chunk_size"]) == ("pi05", 10)
    assert list(json.loads((FOLDER / "dataset_statistics.json").read_text())) == ["libero_object_no_noops"]


def test_words_and_state_bins_are_single_tokens_and_prompts_can_be_read_back() -> None:
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    prompt = prompt_text("pick up the milk and place it in the basket", np.linspace(-1.1, 1.1, 8))
    assert "255" in prompt and "-1" in prompt
    ids, mask = tokenize(tokenizer, [prompt], 48)
    assert tokenizer.decode(ids[mask].tolist()) == "<bos>" + prompt
    # <bos>, Task and colon, ten words, comma, State and colon, eight numbers, three marks, Action, colon, blank.
    assert int(mask.sum()) == 29
    odd, mask = tokenize(tokenizer, ["caf\u00e9 & 12.5\n"], 48)
    assert tokenizer.decode(odd[mask].tolist()) == "<bos>caf\u00e9 & 12.5\n"
    unknown = tokenizer.unk_token_id
    assert all(unknown not in tokenizer.encode(text, add_special_tokens=False) for text in read_instructions())


@pytest.mark.sim
def test_acts_in_an_episode_of_the_simulator(tmp_path: Path) -> None:
    from experiments.robot.libero.run_libero_eval import eval_libero
    from tests.helpers.episode_results import small_run

    given = {"use_proprio": False, "num_trials_per_task": 1, "env_img_res": 128, "render": "fast"}
    config = small_run(tmp_path, pretrained_checkpoint=str(FOLDER), task_ids="1", max_steps=20, **given)
    total = eval_libero(config)["total"]
    assert total["errors"] == 0 and total["successes"] + total["failures"] == 1
