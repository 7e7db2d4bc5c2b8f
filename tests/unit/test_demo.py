"""The demo: its flags, its commands, and a report whose numbers are those of the result files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.reproduce import demo, demo_report
from experiments.robot.libero.run_libero_eval import GenerateConfig
from prismatic.util import cli
from prismatic.util.errors import UsageError
from tests.helpers.script_loader import load_finetune_script


def _config(out: Path) -> demo.DemoConfig:
    return demo.DemoConfig(out=out, tasks="7,9", trials=4, max_steps=20)


def _write_results(out: Path, run: str, successes: tuple[int, int], errors: int = 0) -> None:
    tasks = {
        str(task): {"task": f"task {task}", "successes": won, "failures": 4 - won - errors, "errors": errors}
        for task, won in zip((7, 9), successes, strict=True)
    }
    folder = out / "eval" / run
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"suites": {"libero_object": {"tasks": tasks}}}))


@pytest.mark.parametrize(
    ("argv", "flag"),
    [(["--tasks", "seven"], "--tasks"), (["--seeds", ""], "--seeds"), (["--episodes", "0"], "--episodes")],
)
def test_wrong_flags_are_refused(argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.run(demo.DemoConfig, demo.main, argv)
    assert leaving.value.code == 2
    assert flag in capsys.readouterr().err


def test_methods_differ_in_the_recipe_alone(tmp_path: Path) -> None:
    config = _config(tmp_path)
    words = [set(demo.train_job(config, method, 0).arguments) for method in demo.METHODS]
    assert words[0] ^ words[1] == {"baseline", "rocket", "baseline-seed0", "rocket-seed0"}


def test_every_command_parses(tmp_path: Path) -> None:
    config = _config(tmp_path)
    from experiments.mini.collect import CollectConfig

    cli.parse(CollectConfig, demo.collect_job(config).arguments[2:])
    cli.parse(load_finetune_script().FinetuneConfig, demo.train_job(config, "rocket", 1).arguments[1:])
    for run in (demo.UNTOUCHED, "rocket-seed0"):
        cli.parse(GenerateConfig, demo.evaluate_job(config, run).arguments[1:])
    video = cli.parse(GenerateConfig, demo.video_job(config, "rocket-seed0").arguments[1:])
    assert (video.num_trials_per_task, video.save_videos, video.run_name) == (1, "all", "video-rocket-seed0")


def test_the_report_adds_up_result_files(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _write_results(tmp_path, "untouched", (0, 1))
    for seed, successes in ((0, (3, 4)), (1, (2, 4))):
        _write_results(tmp_path, f"rocket-seed{seed}", successes)
        _write_results(tmp_path, f"baseline-seed{seed}", (1, 1), errors=1)
        for method in demo.METHODS:
            log = tmp_path / "runs" / f"{method}-seed{seed}" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            rows = [{"step": step, "loss": 1.0, "action_loss": 1 / step, "align_loss": 0.5} for step in (1, 10, 20)]
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = io.StringIO()
    report = demo_report.write_report(config, (0, 1), minutes=3.0, console=Console(file=shown, width=200))
    text = report.read_text()
    assert "| ROCKET | 81% | 57 to 93% | 13/16 | 0, 1 |" in text
    assert "| task 9 | 1/4 | 2/6 | 8/8 |" in text
    assert "13/16" in shown.getvalue()
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path)
    with pytest.raises(UsageError, match=r"student: no model\.safetensors"):
        demo.main(_config(tmp_path / "out"))


def test_the_time_of_a_seed_comes_from_the_commands_that_ran() -> None:
    seconds = {"collect": 130.0, "train-baseline-seed0": 195.0, "train-rocket-seed0": 212.0}
    seconds |= {"evaluate-baseline-seed0": 85.0, "evaluate-rocket-seed0": 83.0, "evaluate-untouched": 144.0}
    assert demo.seconds_of_a_seed(seconds) == 212.0 + 85.0
    assert demo.seconds_of_a_seed({}) == 0.0
