"""The page about fine-tuning runs: its numbers are those of the logs and result files."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urljoin
from urllib.request import urlopen

import pytest

from experiments.report.html import setting_rows
from experiments.reproduce import training_page
from experiments.reproduce.training_page import Run
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import episode_results, write_episodes


def _run(root: Path, name: str, *, pairs: int, final: float, **config: Any) -> Path:
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    rows: list[dict[str, float]] = []
    for step in (1, 10, 20):
        row = {"step": step, "loss": 1.0, "action_loss": final * 20 / step, "seconds": 60.0}
        if pairs:
            row |= {"align_loss": 0.5, **{f"align_loss_pair_{pair}": 0.1 * pair for pair in range(pairs)}}
        rows.append(row)
    rows.append({"step": 20, "val/loss": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = folder.with_name(f"{name}--20_chkpt")
    checkpoint.mkdir()
    (checkpoint / "run_config.json").write_text(json.dumps({"seed": 3, **config}))
    return folder


def _evaluation(root: Path, run: str, step: int, successes: int) -> None:
    folder = root / "eval" / f"{run}-{step}"
    results = episode_results("s" * successes + "f" * (4 - successes), suite="libero_object")
    write_episodes(folder, results, {"suite": "libero_object"}, {"checkpoint": f"x/{run}--{step}_chkpt"})
    (folder / "videos").mkdir()
    for result in results:
        (folder / "videos" / f"libero_object--task00--init{result.init_state:02d}--{result.status}.mp4").touch()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    alignment = {"student_layers": [2, 5], "teacher_layers": [1, 4], "widths": [20, 100], "projector": "matryoshka"}
    found = [
        _run(tmp_path, "rocket", pairs=2, final=0.125, recipe="rocket", alignment=alignment),
        _run(tmp_path, "baseline", pairs=0, final=0.25, recipe="baseline"),
    ]
    _evaluation(tmp_path, "rocket", 10, 1)
    _evaluation(tmp_path, "rocket", 20, 3)
    return found


def test_runs_are_read_with_their_evaluations(runs: list[Path], tmp_path: Path) -> None:
    rocket, baseline = training_page.load_runs(runs, tmp_path / "eval")
    assert [(one.step, one.rate.successes) for one in rocket.evaluations] == [(10, 1), (20, 3)]
    assert rocket.success is not None and rocket.success.rate.value == 0.75
    assert baseline.success is None and baseline.curve("align_loss") is None
    assert dict(rocket.details)["training time"] == "3.0 min"
    assert dict(rocket.details)["action loss"] == "0.1250"


def test_the_page_shows_losses_pairs_widths_and_rollouts(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page" / "training.html"
    out.parent.mkdir()
    assert training_page.main([*map(str, runs), "--eval", str(tmp_path / "eval"), "--out", str(out)]) == 0
    page = out.read_text()
    assert "75.0%" in page and "not evaluated" in page
    assert "2 : 1" in page and "5 : 4" in page and "<b>100</b>" in page and "--value:20.00" in page
    assert page.count("<video") == 4
    assert page.index("--failure.mp4") < page.index("--success.mp4")
    assert "../eval/rocket-20/videos/" in page and "../eval/rocket-10/" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_watched_page_follows_the_run_and_is_served(runs: list[Path], tmp_path: Path) -> None:
    """A real watcher beside a log that grows: the page says when to load it again, until the last step is there."""
    log, eval_dir = runs[0] / "metrics.jsonl", tmp_path / "eval"
    pace = {"samples_per_second": 2.5, "memory_gb": 12.0}
    row = {"step": 30, "loss": 1.0, "action_loss": 0.1, "seconds": 60.0, "seconds_left": 7200.0, **pace}
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "experiments.reproduce.training_page", str(runs[0]), "--eval", str(eval_dir)]
    watcher = subprocess.Popen([*command, "--watch", "1", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout is not None
        address = watcher.stdout.readline().removeprefix("page: ").strip()
        page = urlopen(address, timeout=120).read().decode()
        assert '<meta http-equiv="refresh" content="1.0">' in page
        assert all(text in page for text in ("2.0 h", "2.5", "12 GB"))
        video = re.search(r'src="([^"]+--failure[.]mp4)', page)
        assert video is not None and urlopen(urljoin(address, video[1]), timeout=120).status == 200
        with log.open("a") as file:
            file.write(json.dumps(row | {"step": 40, "seconds_left": 0.0}) + "\n")
        assert watcher.wait(300) == 0
    finally:
        watcher.kill()
    page = (runs[0] / "training.html").read_text()
    assert 'http-equiv="refresh"' not in page and "time left" not in page


def test_a_port_that_is_taken_is_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert training_page.main([str(runs[0]), "--watch", "5", "--port", port]) == 2
    assert f"--port: {port} cannot be served" in capsys.readouterr().err
    assert training_page.main([str(runs[0]), "--port", "0"]) == 2
    assert "--port: 0 without --watch" in capsys.readouterr().err
    for wrong in ("0", "often"):
        assert training_page.main([str(runs[0]), "--watch", wrong]) == 2
        assert f"--watch: '{wrong}' found; accepted: 1 to 3600 seconds" in capsys.readouterr().err


def test_a_folder_without_a_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training_page.main([str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("alignment", ["rocket", {"widths": [20, {}]}, {"student_layers": 2}])
def test_a_record_of_another_form_is_refused(alignment: object, tmp_path: Path) -> None:
    run = Run("a", tmp_path, 0, (), {"alignment": alignment})
    with pytest.raises(UsageError, match=r"alignment: .* in its record; accepted: lists of layers and widths"):
        training_page.alignment(run)


def test_settings_that_differ_come_first() -> None:
    rows = setting_rows([{"a": 1, "b": {"c": "x"}}, {"a": 1, "b": {"c": "y"}, "d": True}])
    assert [(row.name, row.cells, row.differs) for row in rows] == [
        ("b.c", ("x", "y"), True),
        ("d", ("-", "true"), True),
        ("a", ("1", "1"), False),
    ]
