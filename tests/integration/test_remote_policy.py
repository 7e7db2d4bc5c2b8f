"""Policy servers as evaluation targets: the real server in a process of its own, episodes in the real simulator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.results.run_folder import load_episodes
from experiments.robot.libero.rollouts import episode as episode_module
from experiments.robot.libero.run_libero_eval import EXIT_ERRORS, main
from experiments.robot.libero.suites.tasks import get_task, load_init_states
from experiments.robot.serving.access import TOKEN_VARIABLE
from prismatic.util.errors import UsageError
from tests.helpers.episode_results import small_run

pytest.importorskip("libero", reason="LIBERO is not installed")
pytestmark = pytest.mark.sim

TOKEN = "not-to-be-guessed"
# Cameras have the policy's own size, which a server could take as prepared.
small = partial(small_run, max_steps=20, env_img_res=56)


@pytest.fixture(scope="module")
def server(repo_root: Path, l1_checkpoint: Path) -> Iterator[str]:
    """host:port of vla-scripts/deploy.py with that checkpoint."""
    flags = ["--pretrained_checkpoint", l1_checkpoint, "--unnorm_key", "other_tiny", "--port", "0", "--device", "cpu"]
    command = [sys.executable, repo_root / "vla-scripts" / "deploy.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, TOKEN_VARIABLE: TOKEN})
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://" in line, "the server did not start"
    yield line.split("http://")[1].split()[0]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every action that an environment of this process executes."""
    actions: list[np.ndarray] = []
    convert = episode_module.to_env_action

    def record(action_A: np.ndarray) -> np.ndarray:
        actions.append(np.array(action_A))
        return convert(action_A)

    monkeypatch.setattr(episode_module, "to_env_action", record)
    return actions


def test_a_remote_policy_acts_as_the_local_one(
    l1_checkpoint: Path, server: str, executed: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP and over WebSocket; the server's default statistics are others than those asked for."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    local = {"pretrained_checkpoint": str(l1_checkpoint), "unnorm_key": "libero_tiny", "device": "cpu"}
    assert main(small(tmp_path / "local", **local)) == 0
    expected = np.stack(executed)
    assert expected.shape == (40, 7)
    for scheme in ("http", "ws"):
        executed.clear()
        config = small(tmp_path / scheme, policy=f"{scheme}://{server}", unnorm_key="libero_tiny")
        assert main(config) == 0
        np.testing.assert_allclose(np.stack(executed), expected, atol=1e-6)
        assert main(config) == 0 and len(executed) == 40  # It is the same run, with nothing left to do.
    lines = {
        name: (tmp_path / name / "run" / "episodes.jsonl").read_text().splitlines() for name in ("local", "http", "ws")
    }
    records = {name: [json.loads(line) for line in of_run] for name, of_run in lines.items()}
    assert [len(of_run) for of_run in records.values()] == [2, 2, 2]
    own, remote = records["local"][0]["identity"], records["http"][0]["identity"]
    assert own["checkpoint_hash"] == remote["checkpoint_hash"] == records["ws"][0]["identity"]["checkpoint_hash"] != ""
    assert remote["unnorm_key"] == "libero_tiny" and remote["numerics"] == own["numerics"]
    assert remote["policy"]["remote"] == "http" and remote["policy"]["metadata"]["image_size"] == [56, 56]
    assert records["http"][0]["environment"]["checkpoint"] == f"http://{server}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "http://127.0.0.1:1"}, "--policy: no policy server answers at http://127.0.0.1:1"),
        ({"policy": "ws://127.0.0.1:1"}, "--policy: no policy server answers at ws://127.0.0.1:1"),
        ({"policy": "ftp://somewhere"}, "--policy: 'ftp://somewhere' found; accepted: http://HOST:PORT"),
        ({"policy": "http://x:y"}, "--policy: 'http://x:y' found; accepted: http://HOST:PORT"),
        ({"policy": "nonsense"}, "--policy: found 'nonsense'; accepted: http://HOST:PORT, ws://HOST:PORT, MODULE"),
        ({"policy": "no_such_module:make"}, "--policy: no_such_module:make: No module named 'no_such_module'"),
        (
            {"policy": "tests.helpers.eval_helpers:nothing"},
            "--policy: module tests.helpers.eval_helpers has no 'nothing'",
        ),
        ({"policy": "tests.helpers.eval_helpers:LineEnvs"}, r"made a LineEnvs, which has no method act\(queries\)"),
        ({"policy": "a:b", "pretrained_checkpoint": "c"}, "--policy: found a:b beside --pretrained_checkpoint c"),
        ({"policy": "http://a:1", "delta_actions": "6,-1"}, "--delta_actions: found 6,-1 beside --policy http://a:1"),
        ({"policy": "a:b", "num_trials_per_task": 51}, "--num_trials_per_task: found 51; accepted: at most 50"),
        ({"policy": "a:b", "task_suite_name": "libero_spatal"}, "--task_suite_name: unknown value 'libero_spatal'"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        main(small(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_servers_limits_are_known_before_the_run(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http", "ws"):
        with pytest.raises(UsageError, match=f"a token is needed.*the token is read from {TOKEN_VARIABLE}"):
            main(small(tmp_path, policy=f"{scheme}://{server}"))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with pytest.raises(UsageError, match="--num_open_loop_steps: found 9; accepted: 1 to 8, the chunk length"):
        main(small(tmp_path, policy=f"http://{server}", num_open_loop_steps=9))
    with pytest.raises(UsageError, match="--unnorm_key: no statistics of 'nope' in the checkpoint; accepted: libero_t"):
        main(small(tmp_path, policy=f"http://{server}", unnorm_key="nope"))


def test_bad_answers_are_errors_of_their_episodes(tmp_path: Path) -> None:
    """A policy that misbehaves in each episode in another way: the run goes on. A state that does not fit ends it."""
    task = get_task("libero_object", 2)
    good = load_init_states(task)[0].tolist()
    demos = {f"demo_{number}": {"initial_state": good} for number in range(6)}
    states, misfit = tmp_path / "states.json", tmp_path / "misfit.json"
    states.write_text(json.dumps({task.instruction.replace(" ", "_"): demos}))
    demos["demo_5"] = {"initial_state": [0.0, 1.0]}
    misfit.write_text(json.dumps({task.instruction.replace(" ", "_"): demos}))
    policy = {"policy": "tests.helpers.eval_helpers:Misbehaving", "policy_timeout": 1.0}
    config = small(tmp_path, **policy, initial_states_path=str(states), num_trials_per_task=6, max_steps=8)
    assert main(config) == EXIT_ERRORS
    results = load_episodes(tmp_path / "run")
    assert [result.status for result in results] == ["error"] * 4 + ["failure"] * 2
    expected = [
        "policy answered values that are not finite numbers",
        r"policy answered shape \(8, 6\); the protocol needs \(at least 8, 7\)",
        "policy: TimeoutError: the policy did not answer within 1 s",
        "policy: RuntimeError: out of memory",
    ]
    for result, reason in zip(results, expected):
        assert result.error is not None and re.match(reason, result.error) and "\n" not in result.error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["total"]["errors"], summary["total"]["failures"]) == (4, 2)
    config.initial_states_path, config.run_name = str(misfit), "misfit"
    with pytest.raises(UsageError, match=r"--initial_states_path: .* expects shape \(110,\), got \(2,\)"):
        main(config)
