"""pi0.5 in LIBERO-Plus and LIBERO-PRO: its checkpoint, its statistics and its name go the same way as in LIBERO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.robot.libero.run_libero_eval import eval_libero
from experiments.robot.libero.suites import plus
from tests.helpers.episode_results import small_run

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "mini" / "weights" / "pi05"
pytest.importorskip("libero", reason="LIBERO is not installed")
pytestmark = pytest.mark.sim


@pytest.mark.parametrize(
    ("suite", "flags"),
    [
        ("libero_plus_object", {"perturbations": "language,noise", "task_subset": 2}),
        ("libero_object_swap", {"task_ids": "1"}),
    ],
)
def test_a_short_run_has_its_own_tasks_and_liberos_statistics(
    suite: str, flags: dict[str, object], tmp_path: Path
) -> None:
    if "plus" in suite:
        pytest.importorskip("liberoplus", reason=f"LIBERO-Plus is not installed: {plus.INSTALL_HINT}")
    given = {"use_proprio": False, "num_trials_per_task": 1, "env_img_res": 128, "render": "fast", "max_steps": 8}
    given |= {"task_suite_name": suite, "task_ids": "", "run_name": "", "unnorm_key": "libero_object_no_noops"}
    config = small_run(tmp_path, pretrained_checkpoint=str(FOLDER), **given | flags)
    total = eval_libero(config)["total"]
    assert total["errors"] == 0 and total["failures"] == (2 if "plus" in suite else 1)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"EVAL-{suite}-pi05-")
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert {line["identity"]["unnorm_key"] for line in lines} == {"libero_object_no_noops"}
    assert {line["suite"] for line in lines} == {suite}
