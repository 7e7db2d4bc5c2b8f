"""LeRobot's own lerobot-train with the plug-in, on tiny sizes.

LeRobot 0.6 needs Python 3.12 and cannot be installed beside this repository: LEROBOT_PYTHON names a Python that has it,
its `pi` and `smolvla` requirements, and setuptools; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.programs import run_program

PYTHON = os.environ.get("LEROBOT_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no Python with LeRobot")
COMMON = """--dataset.repo_id=local/tiny --dataset.root={folder}/data --output_dir={out} --policy.device=cpu
    --policy.push_to_hub=false --policy.chunk_size=5 --policy.n_action_steps=5 --policy.tokenizer_max_length=20
    --steps=4 --save_freq=2 --batch_size=2 --num_workers=0 --log_freq=1 --wandb.enable=false --seed=0"""
PI = "--policy.image_resolution=[56,56] --policy.dtype=float32"
POLICIES = {
    "pi05": f"--policy.type=pi05 {PI}",
    "pi0": f"--policy.type=pi0 --policy.gradient_checkpointing=true {PI}",
    "smolvla": """--policy.type=smolvla --policy.vlm_model_name={folder}/smolvlm --policy.load_vlm_weights=false
        --policy.num_vlm_layers=4 --policy.resize_imgs_with_padding=[64,64] --policy.train_expert_only=false
        --policy.freeze_vision_encoder=false""",
}
ROCKET = "--rocket.teacher_path={teacher} --rocket.student_layers=1,2,-1 --rocket.teacher_layers=1,3,-1"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the program with arguments; {folder}, {out} and {teacher} are filled in."""
    folder = tmp_path_factory.mktemp("lerobot")
    sources = [shutil.copytree(repo_root / name, folder / name) for name in ("rocket_align", "plugins")]
    packages = [str(sources[0]), str(sources[1] / "lerobot_policy_rocket")]
    install = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    subprocess.run([*install, str(folder / "site"), *packages], check=True, capture_output=True, timeout=300)
    places = {"folder": folder, "teacher": repo_root / "experiments" / "mini" / "weights" / "teacher"}

    def start(arguments: str, out: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        words = arguments.format(out=out, **places).split()
        command = [PYTHON, str(repo_root / "tests" / "helpers" / "tiny_lerobot.py"), str(folder), *words]
        environment = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        done = run_program(command, cwd=folder, env=environment)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return start


def logged(done: subprocess.CompletedProcess[str], name: str) -> list[float]:
    return [float(value) for value in re.findall(rf" {name}:(\S+)", done.stderr)]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_alignment_is_added_to_the_stock_loss(policy: str, run: Run, tmp_path: Path) -> None:
    arguments = f"{COMMON} {POLICIES[policy]}"
    stock = run(arguments, tmp_path / "stock")
    aligned = run(f"{arguments} {ROCKET}", tmp_path / "aligned")
    distances = logged(aligned, "align_loss")
    assert len(distances) == 4 and all(0 < value < 2 for value in distances)
    # Rounded to three digits in the log; from the second step on, the weights differ.
    assert logged(aligned, "loss")[0] - 0.5 * distances[0] == pytest.approx(logged(stock, "loss")[0], abs=2e-3)


def test_checkpoints_are_stock_and_a_resumed_run_goes_on_aligning(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(f"{COMMON} {POLICIES['pi05']} {ROCKET}", out)
    first, last = (out / "checkpoints" / step / "pretrained_model" for step in ("000002", "000004"))
    run(f"--load {last}", out)
    record = json.loads((last / "rocket.json").read_text())
    assert record["student_layers"] == "1,2,-1" and record["coeff"] == 0.5
    shutil.rmtree(last.parent)
    resumed = run(f"--config_path={first}/train_config.json --resume=true", out)
    assert len(logged(resumed, "align_loss")) == 2
    before, after = (load_file(folder / "align_projectors.safetensors") for folder in (first, last))
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert before.keys() == after.keys() and 0 < change < 1e-3
    refused = run(f"--config_path={first}/train_config.json --resume=true {ROCKET}0", out, code=2)
    assert "--rocket.teacher_layers: found 1,3,-10; accepted in a resumed run: 1,3,-1" in refused.stderr


def test_adapters_leave_the_projectors_trainable(run: Run, tmp_path: Path) -> None:
    run(f"{COMMON} {POLICIES['pi05']}", tmp_path / "base")
    base = tmp_path / "base" / "checkpoints" / "last" / "pretrained_model"
    lora = r"--peft.method_type=LORA --peft.r=2 --peft.target_modules=.*language_model.*\.(q_proj|v_proj)"
    run(f"{COMMON} --policy.path={base} {lora} {ROCKET}", tmp_path / "lora")
    first, last = (tmp_path / "lora" / "checkpoints" / step / "pretrained_model" for step in ("000002", "000004"))
    names = (load_file(folder / "adapter_model.safetensors") for folder in (first, last))
    assert all("align" not in name for states in names for name in states)
    before, after = (load_file(folder / "align_projectors.safetensors") for folder in (first, last))
    assert any(not after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--policy.train_expert_only=true", "is frozen: aligning it trains nothing but the projector"),
        ("--rocket.teacher_layer=1", "did you mean --rocket.teacher_layers?"),
        ("--rocket.teacher_layers=1,2", "teacher_layers: found 2 layers; accepted: one per student layer"),
        ("--rocket.teacher_path=/nowhere", "/nowhere: no such file or folder"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(arguments: str, message: str, run: Run, tmp_path: Path) -> None:
    done = run(f"{COMMON} {POLICIES['smolvla']} {ROCKET} {arguments}", tmp_path / "out", code=2)
    assert [message in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
