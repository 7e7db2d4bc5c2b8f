"""The GPU's benchmark: its whole path, at small sizes on the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json

NARROW = {"device": "cpu", "narrow": True, "llm_blocks": 2, "vision_blocks": 1, "teacher_blocks": 2, "steps": 1}


def test_every_case_runs_and_is_set_beside_the_prediction(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(gpu.GpuConfig(**NARROW, batch_sizes="1", loader_samples=8, minutes=60, out=str(out))) == 0
    results = read_json(out)
    assert len(results["steps"]) == 6 and not results["left_out"] and not results["failed"]
    for row in results["steps"]:
        assert row["seconds"] > 0 and 0 < row["loss"] < 10
        plain = not (row["stored"] or row["compiled"])
        assert ("predicted_peak_bytes" in row) == plain == ("flop_utilization" in row)
    assert results["losses"]["relative_difference"] < 0.05
    assert results["mini_student"]["largest_difference"] == 0.0 and results["mini_student"]["largest"] > 0
    assert results["loader_samples_per_second"] > 0 and results["matmul_tflops"] > 0


def test_without_time_cases_are_listed_as_left_out(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(gpu.GpuConfig(**NARROW, batch_sizes="1,8", loader_samples=8, minutes=1e-9, out=str(out)))
    results = read_json(out)
    assert not results["steps"] and "rocket    batch 8 stored" in results["left_out"]
    assert len(results["left_out"]) == 12 + 6 and not results["failed"]


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(tmp_path: Path) -> None:
    """What was measured before is on disk by then."""
    out = tmp_path / "gpu.json"
    report = gpu.Report(gpu.GpuConfig(minutes=0.02, out=str(out)))
    assert report.part("rate", lambda: 3.0) == 3.0
    assert report.part("broken", lambda: {}["no compiler"]) is None
    assert read_json(out)["failed"] == {"broken": "KeyError: 'no compiler'"}
    assert report.part("endless", lambda: time.sleep(600)) is None
    assert report.part("after", lambda: 1) is None
    assert read_json(out)["left_out"] == ["endless", "after"] and read_json(out)["seconds"] < 60


def test_results_without_a_place_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for out in (tmp_path, "/dev/null/x.json"):
        with pytest.raises(UsageError, match=r"^--out: "):
            gpu.main(gpu.GpuConfig(**NARROW, out=str(out)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device: cuda found, but no GPU is here"):
        gpu.main(gpu.GpuConfig(out=str(tmp_path / "gpu.json")))
