"""Figure 6 at the paper's scale: the commands that its script prints."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.join import FinetuneConfig
from prismatic.util.cli import parse

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "reproduce" / "figure6.sh"
PAPER = ["--profile", "paper", "--vla_path", "pi0", "--data_root_dir", str(SCRIPT.parent)]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *flags], capture_output=True, text=True, check=False)


def test_every_arm_trains_as_published_and_is_evaluated_easy_and_hard() -> None:
    done = run(*PAPER, "--tasks", "lift_pot,turn_switch", "--dry_run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    trained = [parse(FinetuneConfig, line.split()[2:]) for line in lines if "finetune.py" in line]
    weights = [(config.recipe, config.align_loss_coeff) for config in trained[:5] if config.recipe != "baseline"]
    assert weights == [("spatial_forcing", 0.5), ("rocket", 0.125), ("rocket", 0.5), ("spatial_forcing", 0.125)]
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
    assert [(words[0], words[1], words[-1]) for words in evaluated[:2]] == [
        ("lift_pot", "demo_clean", "unseen"),
        ("lift_pot", "demo_randomized", "unseen"),
    ]


@pytest.mark.parametrize("flags", [[], ["--profile", "mini"]])
def test_the_mini_profile_is_its_own_script(flags: list[str], tmp_path: Path) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "figure6_mini.sh").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "figure6_mini.sh").chmod(0o755)
    done = subprocess.run(["bash", script, *flags, "out", "more"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "out more\n"), done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--profile", "huge"], "--profile: 'huge' found"),
        (["--profile", "paper"], "--vla_path: not given"),
        ([*PAPER, "--arms", "rockt"], "--arms: rockt found"),
        ([*PAPER, "--task"], "--task found"),
        ([*PAPER, "--seeds"], "--seeds: no value found"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: list[str], word: str) -> None:
    done = run(*flags)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {word}") and done.stderr.count("\n") == 1
