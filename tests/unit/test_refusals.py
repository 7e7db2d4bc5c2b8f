"""Paths and files that a fuzzing of the commands showed to end in a traceback."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

from experiments.robot.libero.results.run_folder import read_episode_lines
from experiments.robot.serving.client import PolicyClient, WebSocketPolicyClient
from experiments.robot.serving.observation import PolicySpec
from experiments.robot.serving.server import PolicyServer, ServerSettings
from prismatic.checkpoint.load import load_processor, read_state_dict
from prismatic.util.cli import exit_code, parse
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json, refuse_no_folder
from prismatic.vla.platforms import LIBERO
from rocket_align.teacher.registry import describe_teacher
from rocket_align.teacher.store.layout import INDEX_NAME, StoreError, StoreLayout, read_layout, write_index
from rocket_align.teacher.vggt.config import VGGTConfig

logging.set_verbosity_error()
STORE = StoreLayout("vggt", "ab", 3, (0, 1), 32, 8, "int8", ("primary",), 42, (42, 42), (3, 3), (3, 3))


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda folder: (folder / ("n" * 300)).write_text(""), "File name too long"),
        (lambda folder: (folder / "file" / "below").read_text(), "Not a directory"),
        (lambda folder: (folder / "loop" / "x").read_text(), "Too many levels of symbolic links"),
        (lambda folder: (folder / "loop").resolve(strict=True), "loop"),
        (lambda folder: (folder / "file").mkdir(), "File exists"),
        (lambda folder: Path("~nobody_of_this_name/x").expanduser(), "home"),
    ],
)
def test_a_path_that_the_system_refuses_is_one_line(
    use: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    main = exit_code(lambda: use(tmp_path) and None)
    assert main() == 2
    written = capsys.readouterr().err
    assert said in written and written.startswith("error: ") and written.count("\n") == 1


def test_a_missing_file_that_nothing_looked_for_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exit_code(lambda: (tmp_path / "missing").read_text() and None)()


def test_what_cannot_be_written_into_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("file", "file/below", "loop", "loop/x"):
        with pytest.raises(UsageError, match=r"^--out: .* is not a folder; accepted: a folder"):
            refuse_no_folder("--out", tmp_path / path)
    with pytest.raises(UsageError, match=r"^--out: /proc is not writable"):
        refuse_no_folder("--out", "/proc/nowhere")
    for path in ("", "new", "new/below"):
        refuse_no_folder("--out", tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_files_nested_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not valid JSON"):
        read_json(file)
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(UsageError, match="line 1 is not an episode"):
        list(read_episode_lines(file))


@pytest.mark.parametrize("change", [{"steps": "90"}, {"wall_time": None}, {"seconds": {"policy": {}}}, {"seconds": 3}])
def test_an_episode_s_numbers_are_numbers(change: dict[str, object], tmp_path: Path) -> None:
    episode = {"suite": "libero_goal", "task_id": 0, "task": "do it", "init_state": 0, "seed": 7, "status": "success"}
    episode |= {"success": True, "steps": 90, "error": None, "wall_time": 1.5}
    file = tmp_path / "episodes.jsonl"
    file.write_text(json.dumps(episode) + "\n")
    assert len(list(read_episode_lines(file))) == 1
    file.write_text(json.dumps({**episode, **change}) + "\n")
    with pytest.raises(UsageError, match="line 1 is not an episode"):
        list(read_episode_lines(file))


@pytest.mark.parametrize(
    ("name", "change"),
    [("tokenizer.json", {"model": None}), ("preprocessor_config.json", {"input_sizes": [[3, 224, 224]]})],
)
def test_a_value_of_another_type_names_the_folder(
    name: str, change: dict[str, object], repo_root: Path, tmp_path: Path
) -> None:
    for file in (repo_root / "experiments" / "mini" / "weights" / "student").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), **change}))
    with pytest.raises(UsageError, match=rf"^--vla_path: {tmp_path}: damaged"):
        load_processor(tmp_path)


@pytest.mark.parametrize("text", ["&a [*a]", "note: &x\n  y: *x", "[" * 100_000])
def test_a_configuration_file_without_an_end_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"^--config_path: .*flags.yaml is not valid"):
        parse(ServerSettings, ["--config_path", str(tmp_path / "flags.yaml")])


@pytest.mark.parametrize(
    "change", [{"depth": {}}, {"depth": True}, {"embed_dim": 10**30}, {"mlp_ratio": "x"}, {"dense_layers": 3}]
)
def test_a_teacher_s_sizes_are_numbers(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vggt", **change}))
    with pytest.raises(ValueError, match=next(iter(change)) if "dense_layers" not in change else "another type"):
        VGGTConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize("change", ["x", {"channels": 10**30}, {"layers": [None]}, {"grid_hw": {}}, {"unknown": 1}])
def test_a_store_s_sizes_are_whole_numbers(change: object, tmp_path: Path) -> None:
    layout = {**vars(STORE), **change} if isinstance(change, dict) else change
    write_index(tmp_path / INDEX_NAME, {"layout": layout})
    with pytest.raises(StoreError, match="its layout is damaged") as refusal:
        read_layout(tmp_path)
    assert "\n" not in str(refusal.value)
    write_index(tmp_path / INDEX_NAME, {"layout": vars(STORE)})
    assert read_layout(tmp_path) == STORE


def test_every_cut_of_a_file_of_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "head.pt"
    torch.save({"weight": torch.zeros(300)}, file)
    content = file.read_bytes()
    for length in range(0, len(content), 97):
        file.write_bytes(content[:length])
        with pytest.raises(UsageError, match="not a readable file of tensors"):
            read_state_dict(file)


def test_a_file_without_tensors_is_no_teacher(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text('{"vla_layers_align": [1]}')
    with pytest.raises(ValueError, match=r"layers.json: no file of tensors; accepted: .safetensors"):
        describe_teacher(file)


class Zeros:
    """A policy that answers zeros."""

    def act(self, queries: list[object], unnorm_key: str | None = None) -> np.ndarray:
        return np.zeros((len(queries), 8, 7))


@pytest.mark.parametrize("kind", ["http", "ws"])
def test_a_closed_client_holds_no_connection(kind: str) -> None:
    image = np.zeros((12, 16, 3), dtype=np.uint8)
    seen = {"full_image": image, "wrist_image": image, "state": np.zeros(8), "instruction": "go"}
    spec = PolicySpec("policy", LIBERO, 2, (12, 16), use_proprio=True, unnorm_keys=("a",), unnorm_key="a")
    with PolicyServer(Zeros(), spec, ServerSettings(port=0)) as server:
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            url = f"ws://127.0.0.1:{server.port}"
            with PolicyClient(port=server.port) if kind == "http" else WebSocketPolicyClient(url) as client:
                assert client.infer(seen).shape == (8, 7)
            assert client.infer(seen).shape == (8, 7)
            client.close()
        assert len(client._opened) == 0
        assert threading.active_count() <= threads + 2 and len(os.listdir("/proc/self/fd")) <= files + 4
