"""Figure 6 at the paper's scale: the commands that its script prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import DeployConfig
from experiments.join import FinetuneConfig
from prismatic.util.cli import parse
from tests.helpers.programs import run_program
from tests.helpers.scripts import write_script

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "reproduce" / "figure6.sh"
ADAPTER = SCRIPT.parents[1] / "robot" / "robotwin" / "deploy_policy"
PAPER = ["--profile", "paper", "--vla_path", "pi0", "--data_root_dir", str(SCRIPT.parent)]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_program(["bash", str(SCRIPT), *flags])


def test_every_arm_trains_as_published_and_is_evaluated_easy_and_hard() -> None:
    done = run(*PAPER, "--tasks", "lift_pot,turn_switch", "--dry_run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    trained = [parse(FinetuneConfig, line.split()[2:]) for line in lines if "finetune.py" in line]
    weights = [(config.recipe, config.align_loss_coeff) for config in trained[:5] if config.recipe != "baseline"]
    assert weights == [("spatial_forcing", 0.5), ("rocket", 0.125), ("rocket", 0.5), ("spatial_forcing", 0.125)]
    served = [parse(DeployConfig, line.split()[2:]) for line in lines if "deploy.py" in line]
    assert len(served) == len(trained) and {config.num_images_in_input for config in served} == {3}
    for config in trained:
        assert (config.policy, config.platform, config.use_lora, config.ema_decay) == (
            "pi0",
            "aloha_agilex",
            True,
            0.99,
        )
        assert (config.batch_size, config.max_steps, config.num_images_in_input) == (16, 30_000, 3)
    assert {config.dataset_name for config in trained} == {"robotwin_lift_pot_clean", "robotwin_turn_switch_clean"}
    evaluated = [line.split()[2:] for line in lines if "eval.sh" in line]
    assert len(trained) == 10 and len(evaluated) == 20
    name = "lift_pot-baseline-seed0-unseen"
    assert evaluated[:2] == [
        ["lift_pot", config, "http://127.0.0.1:8777", "0", "0", "unseen", name]
        for config in ("demo_clean", "demo_randomized")
    ]


def test_a_trained_checkpoint_is_served_to_what_robotwin_lacks(tmp_path: Path) -> None:
    """With relative paths; this project's Python and RoboTwin's are scripts that tell their words."""
    name = "lift_pot-rocket-seed0"
    checkpoint = tmp_path / "out" / "runs" / f"{name}--30000_chkpt"
    finished = tmp_path / "RoboTwin" / "eval_result" / "lift_pot" / "ROCKET" / "demo_clean" / f"{name}-unseen" / "now"
    for file in (checkpoint / "run_config.json", finished / "_result.txt"):
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "RoboTwin" / "policy").mkdir()
    (tmp_path / "RoboTwin" / "policy" / "ROCKET").symlink_to(ADAPTER)
    told = tmp_path / "told"
    write_script(tmp_path / "python", f'echo "$PWD" "$@" >> {told}')
    serving = f'echo $$ "$@" >> {told}; echo "serving pi0 at http://127.0.0.1:4321 (POST /act)"; exec sleep 60'
    write_script(tmp_path / "ours", serving)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "ours")}
    flags = [
        *PAPER,
        "--robotwin",
        "RoboTwin",
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "lift_pot",
        "--arms",
        "rocket",
    ]
    done = run_program(["bash", str(SCRIPT), *flags], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (process, *served), (folder, *evaluated) = (line.split() for line in told.read_text().splitlines())
    assert (
        served == f"vla-scripts/deploy.py --pretrained_checkpoint {checkpoint} --num_images_in_input 3 --port 0".split()
    )
    assert folder == str(tmp_path / "RoboTwin") and evaluated[0] == "script/eval_policy.py"
    assert " ".join(evaluated).endswith("--instruction_type unseen --server http://127.0.0.1:4321")
    assert {"demo_randomized", f"{name}-unseen"} < set(evaluated)
    assert not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("flags", [[], ["--profile", "mini"]])
def test_the_mini_profile_is_its_own_script(flags: list[str], tmp_path: Path) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "figure6_mini.sh").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "figure6_mini.sh").chmod(0o755)
    done = run_program(["bash", script, *flags, "out"])
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--dry_run"], "'--dry_run' found"),
        (["--profile", "mini", "out", "--seeds", "1"], "'out --seeds 1' found"),
        (["--profile", "huge"], "--profile: 'huge' found"),
        (["--profile", "paper"], "--vla_path: not given"),
        ([*PAPER, "--arms", "rocket,rockt"], "--arms: rockt found"),
        ([*PAPER, "--robotwin", "nowhere"], "--robotwin: no policy/ROCKET/eval.sh in 'nowhere' found"),
        ([*PAPER, "--task"], "--task found"),
        ([*PAPER, "--seeds"], "--seeds: no value found"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: list[str], word: str) -> None:
    done = run(*flags)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {word}") and done.stderr.count("\n") == 1
