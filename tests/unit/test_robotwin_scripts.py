"""The adapters' shell scripts: what they start, where and with which words, as the harnesses' own adapters do.

Everything that they start is a script that tells its folder and its words. Documentation's commands are here, too.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from deploy import DeployConfig
from experiments.join import FinetuneConfig
from prismatic.util.cli import parse
from tests.helpers.programs import run_program
from tests.helpers.scripts import write_script

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "experiments" / "robot" / "robotwin"
SERVER = "http://127.0.0.1:8777"
CHECKPOINTS = pytest.mark.parametrize("policy", ["runs/chkpt", "owner/name", SERVER])


def tell(path: Path, then: str = "") -> None:
    """A script that writes its folder and its words to TOLD/NAME, one a line."""
    write_script(path, f'printf "%s\\n" "$PWD" "$CUDA_VISIBLE_DEVICES" "$@" > "$TOLD/{path.name}"\n{then}')


def run(tmp_path: Path, *words: str) -> None:
    (tmp_path / "runs" / "chkpt").mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TOLD": str(tmp_path)}
    done = run_program(["bash", *words], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def told(tmp_path: Path, name: str) -> list[str]:
    return (tmp_path / name).read_text().splitlines()


def resolved(tmp_path: Path, policy: str) -> str:
    """A folder's whole path; other names as they are."""
    return str(tmp_path / policy) if policy == "runs/chkpt" else policy


@CHECKPOINTS
def test_deploy_policys_evaluation(policy: str, tmp_path: Path) -> None:
    (tmp_path / "RoboTwin" / "policy").mkdir(parents=True)
    (tmp_path / "RoboTwin" / "policy" / "ROCKET").symlink_to(ADAPTERS / "deploy_policy")
    tell(tmp_path / "bin" / "python")
    run(tmp_path, "RoboTwin/policy/ROCKET/eval.sh", "lift_pot", "demo_clean", policy, "3", "1")
    folder, gpu, script, *words = told(tmp_path, "python")
    assert (folder, gpu, script) == (str(tmp_path / "RoboTwin"), "1", "script/eval_policy.py")
    assert words[:3] == ["--config", "policy/ROCKET/deploy_policy.yml", "--overrides"]
    overrides = dict(zip(words[3::2], words[4::2], strict=True))
    assert overrides == {
        "--task_name": "lift_pot",
        "--task_config": "demo_clean",
        "--ckpt_setting": policy.rsplit("/", 1)[1],
        "--seed": "3",
        "--policy_name": "ROCKET",
        "--instruction_type": "unseen",
        "--server" if policy == SERVER else "--checkpoint_path": resolved(tmp_path, policy),
    }


@CHECKPOINTS
def test_xpolicylabs_evaluation(policy: str, tmp_path: Path) -> None:
    lab = tmp_path / "RoboTwin" / "XPolicyLab"
    (lab / "policy").mkdir(parents=True)
    adapter = lab / "policy" / "ROCKET"
    adapter.symlink_to(ADAPTERS / "xpolicylab")
    write_script(lab / "utils" / "get_free_port.sh", "echo 4321")
    tell(lab / "utils" / "wait_for_policy_server.sh", 'until [ -s "$TOLD/python" ]; do sleep 0.1; done')
    tell(lab / "utils" / "setup_env_client.sh")
    tell(tmp_path / "env" / "bin" / "python")
    (tmp_path / "env" / "bin" / "activate").write_text(f'PATH="{tmp_path}/env/bin:$PATH"\n')
    task = ["RoboTwin", "lift_pot", policy, "aloha_agilex", "joint", "3"]
    run(tmp_path, str(adapter / "eval.sh"), *task, "1", "2", "env", "conda")

    folder, gpu, *words = told(tmp_path, "python")
    assert (folder, gpu) == (str(tmp_path / "RoboTwin"), "1")
    assert words[:4] == [
        str(lab / "setup_policy_server.py"),
        "--config_path",
        str(adapter / "deploy.yml"),
        "--overrides",
    ]
    overrides = f"""port=4321 host=localhost bench_name=RoboTwin task_name=lift_pot env_cfg_type=aloha_agilex
        action_type=joint seed=3 policy_name=ROCKET ckpt_name={resolved(tmp_path, policy)}""".split()
    assert set(words[4:]) == {*overrides, *([f"server={SERVER}"] if policy == SERVER else [])}

    host, port, process, *_ = told(tmp_path, "wait_for_policy_server.sh")[2:]
    assert (host, port) == ("localhost", "4321") and process.isdecimal()
    info = f"ckpt_name={policy.rsplit('/', 1)[1]},action_type=joint"
    client = [str(lab / "utils"), str(adapter / "deploy.yml"), "conda", "4321", *task[:2], task[3], "ROCKET", info]
    assert told(tmp_path, "setup_env_client.sh")[2:] == [*client, str(tmp_path / "RoboTwin"), "3", "2", "localhost"]


def test_documented_servers_have_the_flags_of_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "robotwin.md").read_text().replace("\\\n", " ")
    commands = {
        name: [shlex.split(line)[2:] for line in re.findall(rf"^python vla-scripts/{name}.py .*", page, re.MULTILINE)]
        for name in ("finetune", "deploy")
    }
    trained = [parse(FinetuneConfig, words) for words in commands["finetune"]]
    served = [parse(DeployConfig, words) for words in commands["deploy"]]
    assert [(c.num_images_in_input, c.use_proprio, c.use_film, c.image_aug) for c in trained] == [
        (c.num_images_in_input, c.use_proprio, c.use_film, c.center_crop) for c in served
    ]
