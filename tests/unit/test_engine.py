"""Which engine a flag and a launcher ask for."""

from __future__ import annotations

import pytest

from prismatic.training.engine import resolve_shard
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


def test_what_is_not_known_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="fsdp_version 1 found; accepted: 2"):
        resolve_shard("auto")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UsageError, match="MEGATRON_LM found"):
        resolve_shard("auto")
