"""The paper's tables as commands: what is run, what is gathered, and that a report quotes nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from analyze import COMMANDS
from experiments.analysis.config import SelectConfig
from experiments.join import FinetuneConfig, StoreConfig
from experiments.reproduce import __main__ as command
from experiments.reproduce import records, report
from experiments.reproduce import studies as arms
from experiments.reproduce.jobs import ROOT, Job
from experiments.reproduce.profiles import MINI, PAPER, POLICIES, PROFILES
from experiments.reproduce.published import PUBLISHED
from experiments.reproduce.stages import StudyPaths, analysis_job, arm_jobs, preparation_jobs, train_job
from experiments.reproduce.studies import STUDIES
from experiments.robot.libero.results.summary import paired_test
from experiments.robot.libero.run_libero_eval import GenerateConfig
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import episode_result, write_episodes
from tests.helpers.programs import run_program

SCRIPTS = ROOT / "experiments" / "reproduce"


def _paths(tmp_path: Path, profile: Any = MINI) -> StudyPaths:
    return StudyPaths(profile, tmp_path, tmp_path / "data")


def _all_arms(profile: Any) -> dict[str, arms.Arm]:
    return {arm.name: arm for study in STUDIES.values() for arm in study.arms(profile)}


def _flags(words: tuple[str, ...]) -> set[str]:
    return {word[2:] for word in words if word.startswith("--")}


def test_every_table_and_figure_has_its_script() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.sh")} - {"run"}
    # Figure 6 is in RoboTwin, whose rollouts are its own.
    assert {name for name in scripts if not name.startswith("figure6")} == set(STUDIES)
    for path in SCRIPTS.glob("*.sh"):
        assert path.stat().st_mode & stat.S_IXUSR, path
        assert path.stem in path.read_text()


def test_a_script_prints_its_commands(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    arguments = ["bash", str(SCRIPTS / "table8.sh"), "--dry_run", "--seeds", "3", "--out", str(tmp_path)]
    shown = run_program(arguments, env=environment, cwd=tmp_path).stdout
    lines = shown.splitlines()
    assert "experiments.mini.collect" in lines[0]
    assert sum("finetune.py" in line for line in lines) == 7
    assert sum("run_libero_eval.py" in line for line in lines) == 7
    assert "--recipe naive --use_matryoshka True" in shown
    assert not any(tmp_path.iterdir())


def test_pi05_has_models_and_folders_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dry_run", "--seeds", "0", "--arms", "rocket", "--out", str(tmp_path)]
    assert command.main(["run", "table2", "table3", *asked]) == 0
    shown = capsys.readouterr().out.splitlines()
    trained = [line for line in shown if "finetune.py" in line]
    names = ("--vla_path ", "--run_root_dir ")
    models, folders = ([line.split(name)[1].split()[0] for line in trained] for name in names)
    assert models == ["experiments/mini/weights/student", "experiments/mini/weights/pi05"]
    assert folders == [str(tmp_path / "runs"), str(tmp_path / "pi05" / "runs")]
    collected = [line.split("--out ")[1].split()[0] for line in shown if "experiments.mini.collect" in line]
    assert collected == [str(tmp_path / "data"), str(tmp_path / "pi05" / "data")]


def test_the_paper_profile_of_pi05_is_the_published_recipe() -> None:
    """Pairs, steps and samples a step; the learning rate falls along a cosine."""
    from rocket_align.flags import AlignFlags

    profile = POLICIES["pi05"]["paper"]
    flags = AlignFlags(vggt_path="teacher", recipe="rocket")
    align = flags.align_config(18, 24, indexing="openpi-torch")
    assert align.student_layers == (*range(2, 11), 18) and align.teacher_layers == (*range(2, 19, 2), 23)
    assert align.coeff == 0.5
    assert (4 * profile.train["batch_size"], profile.train["max_steps"]) == (64, 30_000)  # type: ignore[operator]
    assert (profile.train["learning_rate"], profile.train["use_proprio"]) == (2.5e-5, False)


@pytest.mark.parametrize("options", [["-S"], []], ids=["without packages", "not there"])
def test_a_script_without_an_environment_names_make_install(options: list[str], tmp_path: Path) -> None:
    bare = tmp_path / "python"
    if options:
        bare.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(options)} "$@"\n')
        bare.chmod(0o755)
    command, environment = ["bash", str(SCRIPTS / "table8.sh")], {**os.environ, "PYTHON": str(bare)}
    done = run_program(command, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "make install" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["run", "table99"], "study: 'table99' found"),
        (["run", "table8", "--profile", "huge"], "--profile: unknown value 'huge'; accepted: mini, paper"),
        (["run", "table8", "--profile", "paper"], "--data_root_dir: missing"),
        (["run", "table8", "--seeds", "one"], "--seeds: 'one' found"),
        (["run", "table8", "--arms", "rockt"], "--arms: rockt found; accepted: baseline, "),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("profile", [*PROFILES.values(), *POLICIES["pi05"].values()], ids=lambda profile: profile.name)
def test_commands_use_flags_that_the_scripts_have(profile: Any, tmp_path: Path) -> None:
    """Fine-tuning and evaluation flags exist, and every arm's alignment can be formed for the profile's depths."""
    configs = {
        "vla-scripts/finetune.py": FinetuneConfig,
        "experiments/robot/libero/run_libero_eval.py": GenerateConfig,
        "vla-scripts/select_layers.py": SelectConfig,
        "vla-scripts/build_feature_store.py": StoreConfig,
    }
    paths = _paths(tmp_path, profile)
    jobs = [job for study in STUDIES.values() for arm in study.arms(profile) for job in arm_jobs(paths, study, arm, 0)]
    for job in jobs:
        known = {field.name for field in dataclasses.fields(configs[job.arguments[0]])}
        assert _flags(job.arguments) <= known, job.name


@pytest.mark.parametrize("study", [study for study in STUDIES.values() if study.analyses], ids=lambda study: study.name)
def test_analyses_are_commands_with_flags_that_exist(study: Any, tmp_path: Path) -> None:
    for analysis in study.analyses:
        words = analysis_job(_paths(tmp_path), analysis, 0).arguments
        assert _flags(words) <= {field.name for field in dataclasses.fields(COMMANDS[words[1]])}


def test_arms_mean_what_they_say() -> None:
    """For the depths of the shipped models, and of those of the paper."""
    from rocket_align.flags import AlignFlags
    from rocket_align.teacher.vggt.config import find_weights

    student = json.loads((ROOT / MINI.vla_path / "config.json").read_text())["text_config"]["num_hidden_layers"]
    depths = {"mini": (student, find_weights(str(ROOT / MINI.teacher_path))[1].depth), "paper": (32, 24)}
    known = {field.name for field in dataclasses.fields(AlignFlags)}
    for profile in PROFILES.values():
        for arm in _all_arms(profile).values():
            flags: dict[str, Any] = {name: value for name, value in arm.flags.items() if name in known}
            align = AlignFlags(vggt_path="teacher", **flags).align_config(*depths[profile.name])
            assert bool(align.num_pairs) == (arm.flags["recipe"] != "baseline")
    assert [arm.selection["count"] for arm in arms.pair_arms(PAPER)] == [4, 8, 16, 24]


def test_averages_of_the_published_tables() -> None:
    """Copying errors show: averages are those of the suites, but for one that the paper prints otherwise."""
    for name in ("table2", "table3", "table8"):
        for label, (*suites, average) in PUBLISHED[name].rows.items():
            if (name, label) != ("table8", "baseline"):  # printed 96.4; its suites average 97.0
                assert average == pytest.approx(sum(suites) / 4, abs=0.11), (name, label)


def test_studies_share_the_commands_of_an_arm(tmp_path: Path) -> None:
    studies = command.choose_studies(["table8", "table9"])
    chains = command.make_chains(studies, _paths(tmp_path), frozenset({"rocket"}))
    assert len(chains) == len(MINI.seeds)
    names = [job.name for job in chains[0].jobs]
    assert sum(name.startswith("train-") for name in names) == 1
    assert [name for name in names if "step100" in name] == ["evaluate-rocket-seed0-step100-libero_object"]
    assert sum(name.startswith("evaluate-") for name in names) == len(MINI.curve_steps)


def test_seeds_share_what_is_made_once(tmp_path: Path) -> None:
    """Layers and stored features come before all trainings, once; the training names the file or folder they fill."""
    studies, paths = command.choose_studies(["table4", "store"]), _paths(tmp_path)
    prepared = [job for chain in command.make_preparations(studies, paths, frozenset()) for job in chain.jobs]
    assert [job.name for job in prepared] == [
        *(f"select-rocket-pairs{count}" for count in MINI.pairs),
        "store-rocket-stored",
    ]
    train = arm_jobs(paths, studies[1], arms.ROCKET_STORED, 1)[1].arguments
    assert train[train.index("--feature_store") + 1] == str(prepared[-1].result)
    only = command.make_preparations(studies, paths, frozenset({"rocket"}))
    assert only == ()


def test_a_store_is_done_when_every_data_set_of_the_mixture_is(tmp_path: Path) -> None:
    paths = _paths(tmp_path, PAPER)
    (job,) = preparation_jobs(paths, arms.ROCKET_STORED)
    for suite in ("spatial", "object", "goal", "10"):
        assert not job.done
        folder = job.result / f"libero_{suite}_no_noops"
        folder.mkdir(parents=True)
        (folder / "index.json").write_text("{}")
    assert job.done


def test_training_is_done_with_a_checkpoint_that_is_not_merged(tmp_path: Path) -> None:
    """The paper's profile writes adapters alone: a folder without the model's config.json."""
    paths = _paths(tmp_path, PAPER)
    job = train_job(paths, arms.ROCKET, 42)
    assert job.arguments[job.arguments.index("--merge_lora_during_training") + 1] == "False" and not job.done
    adapter = paths.checkpoint(arms.ROCKET, 42, PAPER.final_step) / "lora_adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter.parent / "run_config.json").write_text("{}")
    assert job.done


def _record(arm: str, seed: int, successes: list[int], *, losses: tuple[float, ...] = (1.0, 0.5)) -> dict[str, Any]:
    episodes = [[7, number, "success" if number in successes else "failure", 100, 1.0] for number in range(10)]
    steps = list(range(10, 10 * len(losses) + 1, 10))
    return {
        "arm": arm,
        "label": arm,
        "seed": seed,
        "profile": "mini",
        "code": {"commit": "abc"},
        "versions": {"cores": "2", "torch": "2"},
        "training": {"step": steps, "action_loss": list(losses), "seconds": [9.0] + [5.0] * (len(steps) - 1)},
        "evaluations": [{"step": 100, "suite": "libero_object", "episodes": episodes}],
    }


def _write(folder: Path, *found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in found:
        (folder / f"{record['arm']}-seed{record['seed']}.json").write_text(json.dumps(record))


def test_outcomes_add_up_seeds_and_pair_episodes() -> None:
    found = [_record("baseline", 0, [0, 1, 2]), _record("baseline", 1, [0]), _record("rocket", 0, list(range(8)))]
    baseline = records.outcome(found, "baseline", 100, ("libero_object",))
    rocket = records.outcome(found, "rocket", 100, ("libero_object",))
    assert baseline and rocket
    assert (baseline.successes, len(baseline.episodes)) == (4, 20)
    assert baseline.by_seed == {0: 0.3, 1: 0.1}
    # Student's t with one degree of freedom: 12.706 * 0.1414 / sqrt(2), cut at 0 and 1.
    assert baseline.seed_interval == (0.0, 1.0) and rocket.seed_interval is None
    test = paired_test(baseline.episodes, rocket.episodes)
    assert test and (test.only_a, test.only_b) == (0, 5)
    assert test.p_value == pytest.approx(2 * 0.5**5)
    # With errors in one seed, the mean over seeds (50, 100 and 80%) is not the rate of all episodes.
    uneven = [_record("naive", 0, [0, 1, 2, 3, 4]), _record("naive", 1, [0, 1]), _record("naive", 2, list(range(8)))]
    uneven[1]["evaluations"][0]["episodes"][2:] = [[7, number, "error", 0, 1.0] for number in range(2, 10)]
    naive = records.outcome(uneven, "naive", 100, ("libero_object",))
    assert naive and naive.seed_interval and naive.rate == pytest.approx(15 / 22)
    low, high = naive.seed_interval
    assert high == 1.0 and low == pytest.approx((0.5 + 1.0 + 0.8) / 3 - 4.302653 * 0.2516611 / 3**0.5)
    assert records.outcome(found, "rocket", 50, ("libero_object",)) is None


def test_a_curve_is_of_the_same_seeds_at_every_step() -> None:
    early, late, alone = (_record("rocket", seed, list(range(4 * seed))) for seed in (0, 1, 2))
    for record in (early, late):
        record["evaluations"].append({**record["evaluations"][0], "step": 50})
    assert records.late_rates([early, late, alone], "rocket", (10, 80, 100), ("libero_object",)) == {}
    assert records.late_rates([early, late, alone], "rocket", (25, 50, 70), ("libero_object",)) == {}
    assert records.late_rates([early, late, alone], "rocket", (25, 100), ("libero_object",)) == {0: 0.0, 1: 0.4, 2: 0.8}
    found = records.curve([early, late, alone], "rocket", (25, 50, 100), ("libero_object",))
    assert found[0] is None
    assert [list(one.by_seed) for one in found[1:] if one] == [[0, 1], [0, 1]]


def test_a_policy_on_part_of_the_data_is_compared_with_that_of_the_same_part() -> None:
    found = [_record(name, seed, [0]) for name in ("baseline-data10", "rocket-data10") for seed in (0, 1)]
    found += [_record("baseline", seed, list(range(10))) for seed in (0, 1)]
    for code, text in (
        ("abc", "+0.0 (0.0 to 0.0), p 1, 2 seeds"),
        ("other", "+0.0 (0.0 to 0.0), p 1, 2 seeds (mixed)"),
    ):
        found[2]["code"] = {"commit": code}
        table = report.success_table(STUDIES["table6"], report.Results(MINI, found))
        differences = {row[0]: row[7] for row in table.rows}
        assert differences["no alignment, 10% of the data"] == "" and differences["ROCKET, 10% of the data"] == text


def test_errors_are_not_failures() -> None:
    record = _record("rocket", 0, [0])
    record["evaluations"][0]["episodes"][5][2] = "error"
    found = records.outcome([record], "rocket", 100, ("libero_object",))
    assert found and (len(found.episodes), found.errors) == (9, 1)


def test_the_end_of_training_and_the_time_of_a_step() -> None:
    record = _record("rocket", 0, [0], losses=(9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 2.0, 1.0))
    assert records.final_values([record], "rocket", "action_loss") == [1.5]
    assert records.final_values([record], "rocket", "align_loss") == []
    assert records.seconds_per_step([record], "rocket") == 0.5


def test_the_report_quotes_results_and_names_what_is_missing(tmp_path: Path) -> None:
    _write(tmp_path / "mini", _record("baseline", 0, [0, 1, 2]), _record("rocket", 0, list(range(8))))
    text = report.write_report("mini", tmp_path / "out", results=tmp_path).read_text()
    assert "| ROCKET | 98.5 | 80.0% | 49 to 94% | 8/10 | 80 |  |  |" in text
    assert "| independent projectors | 80 | not run |" in text
    table3 = text.partition("## Table 3")[2].partition("## Table 4")[0]
    assert "Not run: no alignment, spatial forcing, ROCKET." in table3 and "| no alignment | 93 | not run |" in table3
    assert (tmp_path / "out" / "table8.png").stat().st_size > 5_000
    assert (tmp_path / "out" / "training.png").is_file()


def test_a_report_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result files"):
        report.write_report("mini", tmp_path, results=tmp_path)


def test_a_record_holds_what_the_run_left(tmp_path: Path) -> None:
    paths, arm = _paths(tmp_path), arms.ROCKET
    checkpoint = paths.checkpoint(arm, 0, MINI.final_step)
    checkpoint.mkdir(parents=True)
    alignment = {"student_layers": [1, 2], "teacher_layers": [0, 3], "widths": [25, 51]}
    flags = {"recipe": "rocket", "alignment": alignment, "batch_size": 16}
    (checkpoint / "run_config.json").write_text(json.dumps({**flags, "data_root_dir": str(tmp_path / "data")}))
    log = paths.out / "runs" / "rocket-seed0" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "loss": 1.0, "seconds": 2.0}\n{"step": 10, "loss": 0.5, "seconds": 4.0}\n')
    folder = paths.out / "eval" / "rocket-seed0-step100-libero_object"
    episode = episode_result(7, 3, suite="libero_object", steps=90, wall_time=2.345)
    write_episodes(folder, [episode], {"suite": "libero_object"})
    (folder / "summary.json").write_text('{"missing": 0}')
    stopped = paths.out / "eval" / "rocket-seed0-step50-libero_object"
    shutil.copytree(folder, stopped)
    (stopped / "summary.json").write_text('{"missing": 3}')
    path = records.write_record(paths, arm, 0, [Job("train", ("a", str(tmp_path / "x")), log)], results=tmp_path / "r")
    record = json.loads(path.read_text())
    assert record["training"] == {"loss": [1.0, 0.5], "seconds": [2.0, 4.0], "step": [1.0, 10.0]}
    assert record["alignment"] == alignment
    assert record["evaluations"][0]["episodes"] == [[7, 3, "success", 90, 2.35]]
    assert [evaluation["step"] for evaluation in record["evaluations"]] == [100]
    assert record["commands"] == {"train": ["a", "x"]} and record["configuration"]["data_root_dir"] == "data"
    assert str(tmp_path) not in path.read_text()
    # Asked for again, a finished training would be told to resume: the record keeps what its log says was run.
    paths.logs.mkdir()
    (paths.logs / "train.log").write_text("$ /usr/bin/python a --resume False\nstep 1\n")
    records.write_record(paths, arm, 0, [Job("train", ("a", "--resume", "True"), log)], results=tmp_path / "r")
    assert json.loads(path.read_text())["commands"] == {"train": ["a", "--resume", "False"]}


def test_tasks_of_a_suite_of_several_are_told_apart(tmp_path: Path) -> None:
    solved = episode_result(0, 0, suite="libero_plus_goal", kind="noise")
    failed = episode_result(0, 0, "failure", suite="libero_plus_10", kind="noise")
    folder = tmp_path / "rocket-seed0-step100-libero_plus"
    found = records.evaluation_record(write_episodes(folder, [solved, failed], {"suite": "libero_plus"}))
    assert set(found["kinds"]) == {"libero_plus_goal:0", "libero_plus_10:0"}
    record = {**_record("rocket", 0, []), "evaluations": [found]}
    result = records.outcome([record], "rocket", 100, ("libero_plus",))
    assert result is not None and (result.successes, len(result.episodes)) == (1, 2)


def test_kinds_of_perturbation_have_rows_of_their_own() -> None:
    found = []
    for arm, successes in (("baseline", {0, 1}), ("rocket", {0})):
        record = _record(arm, 0, [])
        episodes = [[task, 0, "success" if task in successes else "failure", 9, 1.0] for task in range(4)]
        kinds = {"0": "camera", "1": "robot", "2": "robot", "3": "camera"}
        plus = {"step": 100, "suite": MINI.plus_suite, "episodes": episodes, "kinds": kinds}
        found.append({**record, "evaluations": [plus]})
    table = report.kind_table(STUDIES["figure5"], report.Results(MINI, found))
    assert table is not None
    assert table.rows == (("camera", "1/2", "1/2"), ("robot", "1/2", "0/2"))


def test_analyses_are_averaged_over_seeds() -> None:
    def one(seed: int, value: float) -> dict[str, Any]:
        subject = {"label": f"rocket-seed{seed}, step 100", "step": 100, "matched_mean": value}
        return {"result": {"subjects": [subject]}}

    table = report.analysis_table("cka", [one(0, 0.2), one(1, 0.4)])
    assert table.rows == (("rocket, step 100", "0.300 (sd 0.141)"),)


def test_the_report_shows_where_hands_close(tmp_path: Path) -> None:
    """Averages over seeds, a policy that never closed left out; and the picture of it beside success."""
    folder = tmp_path / "mini"
    _write(folder, _record("rocket", 0, [0, 1]), _record("rocket", 1, []))
    (folder / "analyses").mkdir()
    for seed, miss in ((0, 0.01), (1, 0.05)):
        measured = {"miss": miss, "near_share": 0.5, "task_ignored": 0.25}
        open_hand = {"miss": None, "near_share": None, "task_ignored": None}
        subjects = [
            {"label": f"rocket-seed{seed}, step 100", "step": 100, **measured},
            {"label": f"naive-seed{seed}, step 100", "step": 100, **open_hand},
        ]
        record = {"study": "reach", "analysis": "reach", "seed": seed, "result": {"subjects": subjects}}
        (folder / "analyses" / f"reach-reach-seed{seed}.json").write_text(json.dumps(record))
    text = report.write_report("mini", tmp_path / "out", results=tmp_path).read_text()
    assert "| rocket, step 100 | 3.000 (sd 2.828) | 0.500 (sd 0.000) | 0.250 (sd 0.000) |" in text
    assert "| naive, step 100 |  |  |  |" in text
    assert "![where the hand closes first, during training](reach.png)" in text
    assert (tmp_path / "out" / "reach.png").stat().st_size > 5_000
