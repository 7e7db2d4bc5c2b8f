"""The README's example of aligning a stock model runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_example_aligns_a_stock_model(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    blocks = re.findall(r"^```python\n(.*?)^```$", (repo_root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "attach(" in block]
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["taps"].strategy == "layer" and names["aligned"].per_pair.shape == (2,)
    trained = [weight for weight in names["alignment"].parameters() if weight.grad is not None and weight.grad.any()]
    assert len(trained) == len(list(names["alignment"].parameters()))
    block_0 = names["model"].model.language_model.layers[0].mlp.down_proj.weight
    assert block_0.grad is not None and block_0.grad.any()
