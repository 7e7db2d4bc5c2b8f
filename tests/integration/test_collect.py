"""Demonstrations from the real simulator: solved, clean, the same bytes for any division of the work, readable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.mini.collect import CollectConfig, collect
from experiments.mini.expert import read_goal
from experiments.robot.libero.suites.tasks import get_task
from prismatic.util.errors import UsageError

TASK = 6  # libero_object: the butter.


def config(out: Path, **changes: object) -> CollectConfig:
    values = {"tasks": str(TASK), "episodes": 2, "seed": 3, "image_size": 32, "out": out}
    return CollectConfig(**{**values, **changes})


def shard(folder: Path) -> bytes:
    return next(folder.glob("*.tfrecord-00000-of-00001")).read_bytes()


def episodes(folder: Path) -> list[list[dict]]:
    import tensorflow_datasets as tfds

    from prismatic.vla.datasets.tfrecord import read_records

    features = tfds.builder_from_directory(folder).info.features
    records = read_records(next(folder.glob("*.tfrecord*")))
    return [list(features.deserialize_example_np(record.payload)["steps"]) for record in records]


def test_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together = collect(config(tmp_path / "a", workers=2))
    collect(config(tmp_path / "b", workers=1, episodes=1))
    extended = collect(config(tmp_path / "b", workers=1))
    assert shard(together) == shard(extended)
    assert not list((tmp_path / "b").rglob(".staging*"))

    summary = json.loads((together / "collection.json").read_text())
    assert summary["tasks"][str(TASK)]["episodes"] == 2
    capsys.readouterr()
    assert collect(config(tmp_path / "a", workers=1)) == together
    assert "is complete already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="holds another dataset; choose another --name or --out"):
        collect(config(tmp_path / "a", seed=4))

    for steps in episodes(together):
        actions = np.stack([step["action"] for step in steps])
        states = np.stack([step["observation"]["state"] for step in steps])
        assert 60 < len(steps) <= 260
        assert np.abs(actions[:, :6]).max() <= 1.0 and set(actions[:, 6]) == {-1.0, 1.0}
        # Open, closed around the object for at least 10 steps before lifting, open again at the end.
        closing = int(np.argmax(actions[:, 6] > 0))
        assert actions[0, 6] == -1.0 and actions[-1, 6] == -1.0 and (actions[closing : closing + 10, 6] > 0).all()
        lifted = states[closing:, 2].max() - states[closing, 2]
        assert lifted > 0.08
        assert steps[0]["language_instruction"].decode() == "pick up the butter and place it in the basket"
        assert steps[0]["observation"]["image"].shape == (32, 32, 3)
        assert not np.array_equal(steps[0]["observation"]["image"], steps[-1]["observation"]["image"])


def test_interrupted_collection_continues(tmp_path: Path) -> None:
    """A finished episode waiting in the staging folder is used as it is, not made again."""
    wanted = config(tmp_path, workers=1, episodes=1)
    wanted.staging.mkdir(parents=True)
    wanted.staged(TASK, 0).write_bytes(b"stands for an episode")
    report = {"task": TASK, "episode": 0, "steps": 77, "failures": ["lift"], "seconds": 1.0}
    wanted.staged(TASK, 0).with_suffix(".json").write_text(json.dumps(report))
    folder = collect(wanted)
    assert b"stands for an episode" in shard(folder)
    summary = json.loads((folder / "collection.json").read_text())["tasks"][str(TASK)]
    assert (summary["attempts"], summary["failures"], summary["mean_steps"]) == (2, ["lift"], 77.0)


def test_tasks_beyond_the_expert_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot solve libero_goal task 7 \\('turn on the stove'\\)"):
        read_goal(get_task("libero_goal", 7))
    with pytest.raises(UsageError, match="cannot solve libero_10 task"):
        collect(CollectConfig(suite="libero_10", tasks="0", out=tmp_path))
    assert not list(tmp_path.iterdir())
