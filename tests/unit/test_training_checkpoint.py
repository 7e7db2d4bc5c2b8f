"""What a checkpoint holds, and how a finished one takes its place: the only one of a run is replaced as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prismatic.checkpoint.layout import STATE_FILE, load_training_state
from prismatic.checkpoint.load import prepare_for_training, wrap_film
from prismatic.checkpoint.write import _move_into_place, _save_model
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.lora import add_lora
from prismatic.training.config import TrainConfig
from prismatic.training.run import changed_flags
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import LIBERO
from tests.helpers.student_helpers import tiny_config, tiny_student

FILES = ("action_head--latest_checkpoint.pt", "lora_adapter/adapter_model.safetensors", "training_state/state.pt")


def write(folder: Path, content: str) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in FILES}


def test_the_logs_of_the_run_stay(tmp_path: Path) -> None:
    run, new = write(tmp_path / "run", "old"), write(tmp_path / ".run.7.tmp", "new")
    (run / "metrics.jsonl").write_text("1\n")
    with (run / "events.out").open("w") as events:  # TensorBoard keeps its file open.
        _move_into_place(new, run)
        events.write("more")
    assert contents(run) == {"new"}
    assert (run / "metrics.jsonl").read_text() == "1\n" and (run / "events.out").read_text() == "more"
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize("step", range(4))
def test_a_crash_leaves_one_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run, new = write(tmp_path / "run", "old"), write(tmp_path / ".run.7.tmp", "new")
    for number in range(2):
        (run / f"log{number}").touch()
    replace, left = Path.replace, [step]

    def crash(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        _move_into_place(new, run)
    assert contents(run) == {"old" if step < 2 else "new"}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_a_film_run_saves_a_plain_model(lora: bool, tmp_path: Path) -> None:
    vla: Any = tiny_student()
    if lora:
        vla = add_lora(vla, rank=2)
        for name, parameter in vla.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    wrap_film(vla)
    _save_model(tmp_path, vla, vla.state_dict(), merge=True)
    loaded, info = OpenVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    film = (vla.merge_and_unload() if lora else vla).vision_backbone.vision_backbone
    for featurizer, blocks in zip(loaded.vision_backbone.featurizers, film.featurizers):
        torch.testing.assert_close(featurizer.blocks[0].attn.qkv.weight, blocks.blocks[0].block.attn.qkv.weight)


def test_a_damaged_training_state_is_refused(tmp_path: Path) -> None:
    assert load_training_state(tmp_path) is None
    file = tmp_path / STATE_FILE
    file.parent.mkdir()
    torch.save({"step": 3, "moments": torch.zeros(1000)}, file)
    assert (load_training_state(tmp_path) or {})["step"] == 3
    file.write_bytes(file.read_bytes()[:2000])
    for lazily in (True, False):
        with pytest.raises(UsageError, match=r"state\.pt: not readable"):
            load_training_state(tmp_path, lazily=lazily)


def test_a_damaged_or_foreign_adapter_is_refused(tmp_path: Path) -> None:
    add_lora(tiny_student(), rank=2).save_pretrained(str(tmp_path))
    config = TrainConfig(num_images_in_input=2)
    prepare_for_training(tiny_student(), config, LIBERO, tmp_path)
    wider = {**tiny_config().text_config.to_dict(), "intermediate_size": 32}
    file = tmp_path / "adapter_model.safetensors"
    for student, content in ((tiny_student(text_config=wider), file.read_bytes()), (tiny_student(), b"cut")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"--resume: {tmp_path}: "):
            prepare_for_training(student, config, LIBERO, tmp_path)


def test_a_resume_tells_which_flags_differ() -> None:
    flags = {"seed": 42, "data_root_dir": Path("data"), "recipe": None, "max_steps": 9, "code": {"commit": "b"}}
    assert changed_flags({}, flags) == []
    record = json.loads(json.dumps({**flags, "code": {"commit": "a"}, "max_steps": 5}, default=str))
    assert changed_flags(record, flags) == []
    assert changed_flags(record, {**flags, "seed": 7, "recipe": "rocket", "new": 1}) == [
        "--seed 7 (was 42)",
        "--recipe rocket (was None)",
    ]
