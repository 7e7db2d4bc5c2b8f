"""How a finished checkpoint takes its place: the only one of a run is replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismatic.training.checkpoint import _move_into_place

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
