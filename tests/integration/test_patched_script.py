"""A script with the alignment injected trains in two processes, saves, resumes, validates and refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("libcst")

from patches.__main__ import main
from patches.checkout import SCRIPT
from tests.helpers.programs import run_program

STEP = re.compile(r"rank (\d) step (\d+) gradient ([\d.]+) (.*)")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the alignment injected into the stand-in for upstream's script."""
    root = tmp_path_factory.mktemp("checkout")
    (root / SCRIPT).parent.mkdir()
    shutil.copy(Path(__file__).parents[1] / "helpers" / "openvla_oft_stand_in.py", root / SCRIPT)
    assert main(["apply", str(root)]) == 0
    return root


def launch(patched: Path, *flags: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the script where this project is not importable but for its copy in the checkout."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *start, SCRIPT, *flags]
    return run_program(command, cwd=patched, env=environment)


def steps(output: str) -> dict[tuple[int, int], tuple[float, dict[str, float]]]:
    """(rank, step) -> (sum of the gradients' norms, metrics)."""
    found = {}
    for rank, step, gradient, rest in STEP.findall(output):
        metrics = dict(part.split("=") for part in rest.split())
        found[int(rank), int(step)] = float(gradient), {name: float(value) for name, value in metrics.items()}
    return found


def test_trains_saves_and_resumes(patched: Path, teacher_folder: Path, tmp_path: Path) -> None:
    aligned = ["--vggt_path", str(teacher_folder), "--run_root_dir", str(tmp_path)]
    first = launch(patched, *aligned, "--grad_accumulation_steps", "2", "--use_val_set", "True")
    assert first.returncode == 0, first.stderr[-3000:]
    found = steps(first.stdout)
    assert set(found) == {(0, 1), (0, 2), (1, 1), (1, 2)}
    for step in (1, 2):
        (gradient, metrics), (other_gradient, other_metrics) = found[0, step], found[1, step]
        # Each rank has its own data, hence losses; gradients are averaged, those of the projectors too.
        assert metrics["align_loss"] != other_metrics["align_loss"]
        assert gradient == pytest.approx(other_gradient, rel=1e-5)
        assert metrics["total_loss"] == pytest.approx(metrics["loss_value"] + 0.5 * metrics["align_loss"], abs=1e-5)
        assert {"align_loss_pair_0", "align_loss_pair_2"} <= set(metrics)
    assert "validation align_loss" in first.stdout

    saved = [torch.load(tmp_path / f"run--{step}_chkpt/align_projectors--{step}_checkpoint.pt") for step in (1, 2)]
    assert "0.0.fc1.weight" in saved[0]
    assert not torch.equal(saved[0]["0.0.fc1.weight"], saved[1]["0.0.fc1.weight"])

    checkpoint = tmp_path / "run--2_chkpt"
    resume = ["--resume", "True", "--resume_step", "2", "--vla_path", str(checkpoint), "--max_steps", "1"]
    again = launch(patched, *aligned, *resume, processes=1)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (0, 3) in steps(again.stdout) and "anew" not in again.stdout
    third = torch.load(tmp_path / "run--3_chkpt" / "align_projectors--3_checkpoint.pt")
    # One step of AdamW at 1e-2 from the saved weights, where new ones would lie anywhere.
    assert (third["0.0.fc1.weight"] - saved[1]["0.0.fc1.weight"]).abs().max() < 0.011


def test_measures_means_first_and_follows_the_schedule(patched: Path, teacher_folder: Path, tmp_path: Path) -> None:
    aligned = ["--vggt_path", str(teacher_folder), "--run_root_dir", str(tmp_path), "--align_center", "dataset"]
    # A step has 4 samples; the first two are for the means.
    flags = ["--align_center_samples", "8", "--align_schedule", "2:1,4:0", "--max_steps", "5"]
    first = launch(patched, *aligned, *flags)
    assert first.returncode == 0, first.stderr[-3000:]
    found = steps(first.stdout)
    assert ["align_loss" in found[0, step][1] for step in (1, 2, 3)] == [False, False, True]
    for rank, step, factor in ((0, 3, 1.0), (1, 3, 1.0), (0, 4, 0.5)):
        metrics = found[rank, step][1]
        expected = metrics["loss_value"] + 0.5 * factor * metrics["align_loss"]
        assert metrics["total_loss"] == pytest.approx(expected, abs=1e-5)
    saved = torch.load(tmp_path / "run--5_chkpt" / "align_projectors--5_checkpoint.pt")
    resume = ["--resume", "True", "--resume_step", "5", "--vla_path", str(tmp_path / "run--5_chkpt")]
    again = launch(patched, *aligned, *resume, "--max_steps", "1")
    assert "align_loss" in steps(again.stdout)[0, 6][1], again.stderr[-3000:]
    after = torch.load(tmp_path / "run--6_chkpt" / "align_projectors--6_checkpoint.pt")
    assert torch.equal(after["center_means"], saved["center_means"])


def test_trains_without_alignment(patched: Path, tmp_path: Path) -> None:
    done = launch(patched, "--run_root_dir", str(tmp_path), "--max_steps", "1", processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(steps(done.stdout)[0, 1][1]) == {"loss_value"}
    assert not list(tmp_path.rglob("align_projectors*"))


def test_wrong_flags_are_refused_first(patched: Path) -> None:
    done = launch(patched, "--vggt_path", "/nowhere", processes=0)
    assert done.returncode == 2
    assert done.stderr == "error: --vggt_path: no such folder or file: /nowhere\n"
    assert "building" not in done.stdout
