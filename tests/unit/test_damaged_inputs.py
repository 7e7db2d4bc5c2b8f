"""Damaged files, and places that take no results, are refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from safetensors.numpy import save_file

from experiments.mini.make.teacher_data import read_shard
from experiments.reproduce import training_page
from experiments.robot.libero.results import page
from experiments.robot.libero.results.run_folder import read_episode_lines, read_run_config
from experiments.robot.openvla_utils import normalize_proprio
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.pi.prompts import load_tokenizer
from prismatic.training.metrics import MetricLog, read_log
from prismatic.util.cli import exit_code, whole_number
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_no_file
from prismatic.vla.datasets.lerobot.metadata import read_metadata
from prismatic.vla.datasets.statistics import normalize
from prismatic.vla.platforms import LIBERO, check_bounds
from rocket_align.teacher.store.layout import INDEX_NAME, StoreError, StoreLayout, read_layout, write_index
from tests.helpers.full_disk import no_file_above
from tests.helpers.lerobot_files import write_columns

NAMES = ("images", "depths")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.write_bytes(b""), "is no readable file of frames"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "is no readable file of frames"),
        (lambda file: file.write_bytes(b"\0" * 400), "is no readable file of frames"),
        (lambda file: np.savez(file, images=np.zeros((2, 3))), "holds no depths"),
        (lambda file: np.savez(file, images=np.zeros((2, 3)), depths=np.zeros(3)), r"holds \[2, 3\] frames"),
        (lambda file: np.savez(file, images=np.zeros((0, 3)), depths=np.zeros(0)), r"holds \[0, 0\] frames"),
        (lambda file: np.savez(file, images=np.zeros((2, 3)), depths=np.zeros((0, 3))), r"holds \[2, 0\] frames"),
        (lambda file: np.savez(file, images=np.zeros((2, 3)), depths=np.zeros(())), r"holds \[2, 0\] frames"),
        (lambda file: np.savez(file, images=np.zeros(()), depths=np.zeros(())), r"holds \[0, 0\] frames"),
    ],
)
def test_damaged_frames_are_one_line(change: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "libero_object-0.npz"
    np.savez(file, images=np.zeros((2, 3)), depths=np.zeros(2))
    assert read_shard(file, NAMES).keys() == set(NAMES)
    change(file)
    with pytest.raises(UsageError, match=said):
        read_shard(file, NAMES)


def test_a_damaged_line_of_a_log_costs_no_other(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    damaged = [b"\xff{", b"7", b'{"loss": 3}', b'{"step": "x"}', b"[" * 100_000, b'{"step": 3, "loss": "x"}', b'{"step']
    log.write_bytes(
        b"\n".join([json.dumps(rows[0]).encode(), *damaged[:5], json.dumps(rows[1]).encode(), *damaged[5:]])
    )
    assert read_log(log) == [*rows, {"step": 3}]


def test_resuming_keeps_the_lines_of_a_log_as_they_are(tmp_path: Path) -> None:
    kept = b'{"step": 1, "loss": 0.50, "note": "x", "v": null}\n{"remark": "warm"}\n\xff{\n{"step": 2, "loss": NaN}\n'
    log = tmp_path / "metrics.jsonl"
    for end in (b"", b'{"step": 2, "lo', b'{"step": 3, "loss": 1}\n{"step"', b'{"step": 4}'):
        log.write_bytes(kept + end)
        MetricLog(tmp_path, Accelerator(cpu=True), last_step=2).close()
        assert log.read_bytes() == kept
    log.write_bytes(kept[:-1])  # Whole, but for the end of its line.
    MetricLog(tmp_path, Accelerator(cpu=True), last_step=2).close()
    assert log.read_bytes() == kept


@pytest.mark.parametrize("name", ["meta/episodes.jsonl", "meta/tasks.jsonl"])
@pytest.mark.parametrize(
    "damage", [b"\xff", b"[" * 100_000, b"7", b"{}", b"<html>", b'{"episode_index": "x", "task_index": "x"}']
)
def test_a_damaged_line_of_lerobot_s_is_one_line(name: str, damage: bytes, tmp_path: Path) -> None:
    write_columns(tmp_path / "data", {"action": np.zeros((4, 7), np.float32)}, (4,))
    file = tmp_path / "data" / name
    file.write_bytes(damage + b"\n" + file.read_bytes())
    with pytest.raises(UsageError, match="meta"):
        read_metadata(tmp_path / "data")


@pytest.mark.parametrize("change", [{"views": [True]}, {"channels": "x"}, {"layers": 3}, {"grid_hw": [3, True]}])
def test_a_damaged_layout_of_a_feature_store_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    layout = StoreLayout("vggt", "ab", 3, (0, 1), 32, 8, "int8", ("primary",), 42, (42, 42), (3, 3), (3, 3))
    write_index(tmp_path / INDEX_NAME, {"layout": asdict(layout)})
    assert read_layout(tmp_path) == layout
    write_index(tmp_path / INDEX_NAME, {"layout": asdict(layout) | change})
    with pytest.raises(StoreError, match="its layout is damaged"):
        read_layout(tmp_path)


@pytest.mark.parametrize("shape", [7, "7", [None], None])
def test_a_column_of_an_unknown_width_is_one_line(shape: object, tmp_path: Path) -> None:
    folder = write_columns(tmp_path / "data", {"action": np.zeros((4, 7), np.float32)}, (4,))
    assert read_metadata(folder).width("action") == 7
    content = json.loads((folder / "meta" / "info.json").read_text())
    content["features"]["action"]["shape"] = shape
    (folder / "meta" / "info.json").write_text(json.dumps(content))
    if shape == "7":
        assert read_metadata(folder).width("action") == 7
        return
    with pytest.raises(UsageError, match=r"the shape of 'action' is .*; accepted: whole numbers"):
        read_metadata(folder).width("action")


@pytest.mark.parametrize("content", [{"identity": 7}, {"environment": [1]}])
def test_a_run_s_configuration_of_another_form_is_one_line(content: Any, tmp_path: Path) -> None:
    assert read_run_config(tmp_path) == {}
    with pytest.raises(UsageError, match="no such file"):
        read_run_config(tmp_path, needed=True)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"config.json: (identity|environment) is .*; accepted: an object"):
        read_run_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": "x"}, "a mask of shape"),
        ({"mask": [True]}, "a mask of shape"),
        ({"mask": [[True], True]}, "inhomogeneous"),
        ({"mask": [1.0] * 6 + [0.5]}, r"the mask \[1.0, .*, 0.5\] found; accepted: 7 of true and false"),
        ({"q01": [float("nan")] * 7}, "not finite"),
    ],
)
def test_statistics_that_cannot_scale_are_one_line(change: Any, said: str, tmp_path: Path) -> None:
    bounds = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    check_bounds(LIBERO, {"action": bounds}, ("action",), tmp_path)
    with pytest.raises(UsageError, match=said):
        check_bounds(LIBERO, {"action": {**bounds, **change}}, ("action",), tmp_path)


@pytest.mark.parametrize(
    ("change", "scaled"),
    [
        ({}, 7),
        ({"mask": None}, 7),
        ({"mask": [1.0] * 6 + [0.0]}, 6),
        ({"mask": [True] * 6 + [False], "q99": [3.0] * 6 + [float("inf")]}, 6),
    ],
)
def test_statistics_that_can_scale_do(change: Any, scaled: int, tmp_path: Path) -> None:
    bounds: dict[str, Any] = {"q01": [1.0] * 7, "q99": [3.0] * 7, "min": [0.0] * 7, "max": [4.0] * 7, **change}
    check_bounds(LIBERO, {"action": bounds}, ("action",), tmp_path)
    values = np.full(7, 2.5, np.float32)
    expected = [0.5] * scaled + [2.5] * (7 - scaled)
    np.testing.assert_allclose(normalize(values, bounds, LIBERO.normalization), expected)
    np.testing.assert_allclose(normalize_proprio(values, bounds), np.clip(expected, -1, 1))
    model: Any = SimpleNamespace(platform=LIBERO)
    actions = OpenVLAForActionPrediction._unnormalize_actions(model, np.array(expected), bounds)
    np.testing.assert_allclose(actions, values)


def test_a_damaged_tokenizer_of_pi_is_one_line(repo_root: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repo_root / "experiments/mini/weights/student" / name, tmp_path)
    load_tokenizer(tmp_path)
    for content in ("", '{"model": {"vocab": {"a": {}}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UsageError, match="its tokenizer cannot be read"):
            load_tokenizer(tmp_path)


def test_a_place_that_takes_no_file_is_refused_and_never_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path, "/proc/nowhere/x.html", tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match=r"^--out: "):
            refuse_no_file("--out", place)
    refuse_no_file("--out", tmp_path / "new" / "x.html")
    assert exit_code(lambda: atomic_write("/proc/nowhere/x", ""))() == 2
    said = "no such folder, and none can be made there; accepted: another path"
    assert capsys.readouterr().err == f"error: /proc/nowhere: {said}\n"


def test_a_removed_working_folder_is_no_matter_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for place, folder in (("out/x", "out"), ("x", ".")):
        assert exit_code(lambda place=place: atomic_write(place, ""))() == 2
        said = "no such folder, and none can be made there; accepted: another path"
        assert capsys.readouterr().err == f"error: {folder}: {said}\n"


def test_a_full_disk_is_one_line_of_any_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was there before stays, and nothing half."""
    file = tmp_path / "results.json"
    file.write_text("before")
    big = {"x": np.zeros(100_000)}
    for write in (lambda: atomic_write(file, "x" * 100_000), lambda: save_file(big, file)):
        with no_file_above(10_000):
            assert exit_code(lambda write=write: write())() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: nothing more can be written (") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("change", [{"suite": ["libero_goal"]}, {"task": 7}, {"error": {}}, {"level": "x"}])
def test_an_episode_s_texts_are_texts(change: dict[str, object], tmp_path: Path) -> None:
    episode = {"suite": "libero_goal", "task_id": 0, "task": "do it", "init_state": 0, "seed": 7, "status": "success"}
    episode |= {"success": True, "steps": 90, "error": None, "wall_time": 1.5, **change}
    (tmp_path / "episodes.jsonl").write_text(json.dumps(episode) + "\n")
    with pytest.raises(UsageError, match="line 1 is not an episode"):
        list(read_episode_lines(tmp_path / "episodes.jsonl"))


def test_numbers_of_commands_with_words_have_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [whole_number(0)("0"), whole_number(0, 9)("9")] == [0, 9]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for words, said in (
        (["--port", "70000", "--watch", "1"], "argument --port: '70000' found; accepted: 0 to 65535"),
        (["--port", "x", "--watch", "1"], "argument --port: 'x' found; accepted: 0 to 65535"),
        (["--eval", str(tmp_path / "none")], f"--eval: no such folder: {tmp_path / 'none'}"),
        (["--watch", "1", "--eval", str(tmp_path / "metrics.jsonl")], f"--eval: {tmp_path / 'metrics.jsonl'} is not a"),
    ):
        assert training_page.main([str(tmp_path), *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_evaluations_of_a_watched_run_may_come_later(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert training_page.main([str(tmp_path), "--watch", "1", "--eval", str(tmp_path / "none")]) == 0
    assert (tmp_path / "training.html").exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize("main", [training_page.main, page.main])
def test_a_run_that_is_a_file_is_not_blamed_on_a_flag(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run"
    file.write_text("")
    assert main([str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: RUN: {file} is not a folder; accepted: ")
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out: {tmp_path} is a folder; accepted: a file\n"
