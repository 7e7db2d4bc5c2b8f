"""Which engine a flag and a launcher ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismatic.training.launch import resolve_shard
from prismatic.util.errors import UsageError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)


def test_the_flag_decides_without_a_launcher() -> None:
    assert resolve_shard("auto") == "none"
    assert resolve_shard("fsdp") == "fsdp"


def test_the_launcher_decides_where_the_flag_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert resolve_shard("auto") == resolve_shard("fsdp") == "fsdp"
    with pytest.raises(UsageError, match="--shard: none found, but fsdp in accelerate's configuration"):
        resolve_shard("none")


def test_the_stage_comes_from_accelerate_or_a_file_of_deepspeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert resolve_shard("auto") == "zero2"
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    assert resolve_shard("auto") == resolve_shard("zero3") == "zero3"
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(UsageError, match="zero_stage 1 found; accepted: 2 or 3"):
        resolve_shard("auto")


def test_what_is_not_known_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="fsdp_version 1 found; accepted: 2"):
        resolve_shard("auto")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UsageError, match="MEGATRON_LM found"):
        resolve_shard("auto")
