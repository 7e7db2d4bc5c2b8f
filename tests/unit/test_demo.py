"""The demo: its commands, and a report whose numbers are those of the result files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.analysis.config import ReadoutConfig
from experiments.analysis.readout_pictures import DepthPictures
from experiments.join import FinetuneConfig
from experiments.reproduce import demo, demo_tokens
from experiments.reproduce.demo_tokens import TokenResults, statement
from experiments.reproduce.records import Outcome
from experiments.reproduce.stages import arm_jobs, collect_job, train_job
from experiments.reproduce.studies import ROCKET
from experiments.robot.libero.run_libero_eval import GenerateConfig
from prismatic.util import cli
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import episode_results, write_episodes


def _config(out: Path) -> demo.DemoConfig:
    return demo.DemoConfig(out=out, tasks="7,9", trials=4, max_steps=20)


def _write_results(out: Path, run: str, successes: tuple[int, int], errors: int = 0) -> None:
    outcomes = ["s" * solved + "f" * (4 - solved - errors) + "e" * errors for solved in successes]
    both = [episode_results(letters, task, suite="libero_object") for task, letters in zip((7, 9), outcomes)]
    write_episodes(out / "eval" / run, itertools.chain(*both), {"suite": "libero_object"})


def _tokens(depths: tuple[float, float] = (0.03, 0.21), errors: tuple[float, float] = (0.13, 0.129)) -> TokenResults:
    states = [[[9.0], [depth - 0.01], [depth + 0.01]] for depth in depths]
    records = tuple(
        {"readout": {"depth": depth, "pose": [[0.0], [0.4], [0.6]]}, "validation": {"val/action_loss": error}}
        for depth, error in zip(states, errors)
    )
    maps = np.random.default_rng(0).normal(size=(3, 2, 12, 12))
    images = np.zeros((2, 24, 24, 3), dtype=np.uint8)
    return TokenResults(records, DepthPictures(images, maps[0], tuple(maps[1:]), demo_tokens.LABELS))


def _outcome(successes: int) -> Outcome:
    return Outcome("arm", "arm", {(0, "suite", 7, state): state < successes for state in range(40)}, 0)


def test_the_statement_follows_the_numbers() -> None:
    said = statement(_tokens(), _outcome(39), _outcome(38))
    assert said == (
        "Alignment changed the depth in the policy's tokens (R2 above the place 0.03 without, 0.21 with). "
        "No difference is shown in the error of its actions (0.130 without, 0.129 with) or the episodes that it solves "
        "(39/40 without, 38/40 with)."
    )
    said = statement(_tokens((0.1, 0.11), (0.13, 0.12)), _outcome(20), _outcome(39))
    changed, same = said.split("No difference is shown in ")
    assert "actions (0.130 without, 0.120 with) and the episodes that it solves (20/40" in changed
    assert same == "the depth in the policy's tokens (R2 above the place 0.10 without, 0.11 with)."
    for same in ((0.1, 0.11), (-0.4, -0.1)):
        assert statement(_tokens(same), _outcome(39), _outcome(39)).startswith("No difference is shown in the depth")
    assert "episodes" not in statement(_tokens(), None, _outcome(39))


def test_the_video_starts_where_most_tasks_were_solved(tmp_path: Path) -> None:
    paths = _config(tmp_path).paths()
    _write_results(tmp_path, "rocket-seed0", (2, 1))
    assert demo.solved_state(paths, 0) == 0
    lines = (tmp_path / "eval" / "rocket-seed0" / "episodes.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["init_state"] > 0]
    (tmp_path / "eval" / "rocket-seed0" / "episodes.jsonl").write_text("\n".join(kept) + "\n")
    assert demo.solved_state(paths, 0) == 1
    assert "--first_init_state 1" in " ".join(demo.video_job(paths, 0, 1).arguments)


def test_methods_differ_in_the_recipe_alone(tmp_path: Path) -> None:
    paths = _config(tmp_path).paths()
    words = [set(train_job(paths, arm, 0).arguments) for arm in demo.DEMO.arms(paths.profile)]
    assert words[0] ^ words[1] == {"baseline", "rocket", "baseline-seed0", "rocket-seed0"}


def test_every_command_parses(tmp_path: Path) -> None:
    paths = _config(tmp_path).paths()
    from experiments.mini.collect import CollectConfig

    collect = cli.parse(CollectConfig, collect_job(paths).arguments[2:])
    assert (collect.tasks, collect.episodes, collect.out) == ("7,9", 25, tmp_path / "data")
    train, evaluate = arm_jobs(paths, demo.DEMO, ROCKET, 1)
    config = cli.parse(FinetuneConfig, train.arguments[1:])
    assert (config.max_steps, config.seed, config.batch_size) == (20, 1, 32)
    tokens = _config(tmp_path).tokens_paths()
    moved = [cli.parse(FinetuneConfig, train_job(tokens, arm, 0).arguments[1:]) for arm in demo_tokens.ARMS]
    assert [(config.max_steps, config.recipe, config.data_root_dir) for config in moved] == [
        (600, recipe, tmp_path / "data-moved") for recipe in ("baseline", "rocket")
    ]
    collect = cli.parse(CollectConfig, demo_tokens.data_job(tokens).arguments[2:])
    assert (collect.scene, collect.episodes, collect.tasks) == ("moved", 60, "7")
    readout = cli.parse(ReadoutConfig, demo_tokens.readout_job(tokens).arguments[2:])
    assert [Path(folder).name for folder in readout.checkpoints] == [
        f"moved-{name}-seed0--600_chkpt" for name in ("baseline", "rocket")
    ]
    for job in (evaluate, demo.untouched_job(paths)):
        assert cli.parse(GenerateConfig, job.arguments[1:]).num_trials_per_task == 4
    video = cli.parse(GenerateConfig, demo.video_job(paths, 0).arguments[1:])
    assert (video.num_trials_per_task, video.save_videos, video.run_name) == (1, "all", "video-rocket-seed0")


def test_folders_keep_their_names(tmp_path: Path) -> None:
    paths = _config(tmp_path).paths()
    train, evaluate = arm_jobs(paths, demo.DEMO, ROCKET, 1)
    assert train.result == tmp_path / "runs" / "rocket-seed1--20_chkpt" / "run_config.json"
    assert evaluate.result == tmp_path / "eval" / "rocket-seed1" / "summary.json"
    assert demo.untouched_job(paths).result == tmp_path / "eval" / "untouched" / "summary.json"


def test_the_report_adds_up_result_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _config(tmp_path).paths()
    _write_results(tmp_path, "untouched", (0, 1))
    for seed, successes in ((0, (3, 4)), (1, (2, 4))):
        _write_results(tmp_path, f"rocket-seed{seed}", successes)
        _write_results(tmp_path, f"baseline-seed{seed}", (1, 1), errors=1)
        for method in ("baseline", "rocket"):
            log = tmp_path / "runs" / f"{method}-seed{seed}" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            rows = [{"step": step, "loss": 1.0, "action_loss": 1 / step, "align_loss": 0.5} for step in (1, 10, 20)]
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, table, places = demo.write_report(paths, _tokens(), (0, 1), minutes=3.0)
    text = places["report"].read_text()
    assert "| ROCKET | 81% | 57 to 93% | 13/16 | 0, 1 |" in text
    assert text.splitlines()[2] == said and "13/16 with" in said
    assert 0 < text.index(demo.CAUTION) < text.index("| depth in the tokens (R2 above the place) | 0.030 | 0.210 |")
    page = places["page to look at"].read_text()
    assert 0 < page.index('src="report.png"') < page.index(demo.CAUTION) < page.index("baseline-seed0</h3>")
    assert "| task 9 | 1/4 | 2/6 | 8/8 |" in text
    assert ("before fine-tuning", "12%", "2 to 47%", "1/8", "-") in table.rows
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(UsageError, match=r"student: no model\.safetensors"):
        demo.main(_config(tmp_path / "out"))


def test_the_time_of_a_seed_comes_from_the_commands_that_ran() -> None:
    seconds = {"collect": 130.0, "train-baseline-seed0": 195.0, "train-rocket-seed0": 212.0}
    seconds |= {
        "train-moved-rocket-seed0": 500.0,
        "evaluate-baseline-seed0": 85.0,
        "evaluate-rocket-seed0": 83.0,
        "evaluate-untouched": 144.0,
    }
    assert demo.seconds_of_a_seed(seconds) == 212.0 + 85.0
    assert demo.seconds_of_a_seed({}) == 0.0
