"""Every kind of file that commit f37abbc wrote opens, acts, resumes and reports as it did there."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.results.__main__ import main as results_main
from experiments.robot.libero.run_libero_eval import GenerateConfig, eval_libero
from experiments.robot.openvla_utils import OpenVLAPolicy
from experiments.robot.policy import PolicyFlags, Query
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.checkpoint.merge import merge_checkpoint
from prismatic.training.metrics import read_log
from rocket_align.layers import read_layer_file
from tests.helpers.eval_helpers import LineEnvs

# The adapter run is aligned to the stored features of the same archive.
ARCHIVE = Path(__file__).parents[1] / "golden" / "earlier" / "f37abbc.zip"
LAYERS = {"recipe": "rocket", "vla_layers_align": "1,2", "vggt_layers_align": "0,3"}
RUNS: dict[str, dict[str, Any]] = {
    "adapter": {**LAYERS, "merge_lora_during_training": False},
    "merged": {"recipe": "baseline", "use_film": True},
}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    folder = tmp_path / "earlier"
    zipfile.ZipFile(ARCHIVE).extractall(folder)
    for name in RUNS:
        shutil.copy(folder / "base" / "tokenizer.json", folder / f"{name}--2_chkpt")
    return folder


def expected(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())[name]


def policy_flags(folder: Path, name: str) -> PolicyFlags:
    checkpoint, base = str(folder / f"{name}--2_chkpt"), str(folder / "base")
    return PolicyFlags(checkpoint, base_checkpoint=base, use_film=name == "merged", center_crop=False, device="cpu")


def act(checkpoint: Path | str, flags: PolicyFlags) -> np.ndarray:
    opened = open_checkpoint(str(checkpoint), flags.base_checkpoint)
    policy = OpenVLAPolicy.from_checkpoint(opened, flags, "libero_spatial_no_noops")
    image = np.arange(28 * 28 * 3, dtype=np.uint32).reshape(28, 28, 3).astype(np.uint8)
    query = Query(image, image[::-1].copy(), np.linspace(-0.3, 0.3, 8), "open the drawer", prepared=True)
    return policy.act([query])[0]


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_act_as_they_did(name: str, earlier: Path) -> None:
    flags = policy_flags(earlier, name)
    opened = open_checkpoint(flags.pretrained_checkpoint, flags.base_checkpoint)
    assert opened.fingerprint() == expected(earlier, name)["fingerprint"]
    np.testing.assert_allclose(act(opened.path, flags), expected(earlier, name)["actions"], atol=1e-4)


def test_an_adapter_merges_into_a_checkpoint_that_acts_as_it_did(earlier: Path, tmp_path: Path) -> None:
    flags = policy_flags(earlier, "adapter")
    base, checkpoint, out = earlier / "base", earlier / "adapter--2_chkpt", tmp_path / "out"
    merge_checkpoint(base, checkpoint, out, max_shard_bytes=10**9, dtype=None, overwrite=False)
    # Its base weights are bfloat16, so are the merged ones.
    np.testing.assert_allclose(act(out, flags), expected(earlier, "adapter")["actions"], atol=1e-2)


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on_where_it_stopped(name: str, earlier: Path, finetune: Callable[..., Path]) -> None:
    flags = {**RUNS[name], **({"feature_store": str(earlier / "store")} if name == "adapter" else {})}
    finetune(
        vla_path=str(earlier / f"{name}--2_chkpt"), base_checkpoint=str(earlier / "base"), resume=True,
        run_root_dir=earlier, run_id_override=None, lora_rank=1, max_steps=3, mixed_precision="auto", **flags,
    )  # fmt: skip
    (row,) = read_log(earlier / name / "metrics.jsonl")
    # Other decoders of JPEG move a loss by less than this; a part that began anew moves it by more.
    for metric, value in expected(earlier, name)["metrics"].items():
        assert row[metric] == pytest.approx(value, rel=0.02), metric
    assert (earlier / f"{name}--3_chkpt" / "training_state" / "state.pt").is_file()


def test_a_layer_file_is_read(earlier: Path) -> None:
    layers = read_layer_file(str(earlier / "align_layers.json"))
    assert (layers.student_layers, layers.teacher_layers) == ((2, 4), (1, 3))


def test_an_evaluation_reports_and_goes_on(earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results_main(["report", str(earlier / "eval")]) == 0
    assert "libero_object" in capsys.readouterr().out
    assert results_main(["compare", str(earlier / "eval"), str(earlier / "eval")]) == 0
    # Packages may be newer here; that alone would be another run.
    flags = policy_flags(earlier, "merged")
    config = GenerateConfig(
        **{**vars(flags), "base_checkpoint": ""}, task_suite_name="libero_object", task_ids="0,1",
        num_trials_per_task=2, num_workers=1, max_steps=40, local_log_dir=str(earlier), run_name="eval",
    )  # fmt: skip
    config.unnorm_key = "libero_spatial_no_noops"
    _name_installed_packages(earlier / "eval" / "config.json", tmp_path, config)
    episodes = earlier / "eval" / "episodes.jsonl"
    kept = episodes.read_text().splitlines(keepends=True)[:-1]
    episodes.write_text("".join(kept))
    summary = eval_libero(config, make_env=LineEnvs())
    assert summary["total"]["failures"] == 4 and summary["episodes_missing"] == 0
    assert episodes.read_text().startswith("".join(kept)) and len(episodes.read_text().splitlines()) == 4


def _name_installed_packages(record: Path, tmp_path: Path, config: GenerateConfig) -> None:
    from experiments.robot.libero.rollouts.plan import make_plan, run_identity

    here = run_identity(config, make_plan(config), ("cpu", "float32"))
    content = json.loads(record.read_text())
    for name in ("renderer", "mujoco", "robosuite", "libero"):
        content["identity"][name] = here[name]
    record.write_text(json.dumps(content))
