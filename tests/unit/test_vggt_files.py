"""Where VGGT's weights and sizes come from: folders, released configurations, hub ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rocket_align.teacher.vggt.config import VGGTConfig, find_weights


def test_a_released_configuration_is_understood(tmp_path: Path) -> None:
    released = {"img_size": 518, "patch_size": 14, "embed_dim": 1024, "enable_track": True}
    (tmp_path / "config.json").write_text(json.dumps(released))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_weights(tmp_path) == (tmp_path / "model.safetensors", VGGTConfig())


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^nobody/no-such-vggt: no such file or folder here, and not .*hub") as caught:
        find_weights("nobody/no-such-vggt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing", "/no/such/folder", "./no/such", "a/b/c"])
def test_what_is_no_hub_id_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder; accepted"):
        find_weights(path)
