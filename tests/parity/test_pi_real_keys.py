"""The full-size pi0 and pi0.5, built on the meta device: names, shapes and counts of the published classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prismatic.models.pi.config import pi_config, sizes_from_weights
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.weights import published_name, published_names


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_names_shapes_and_count(kind: str, golden_dir: Path) -> None:
    real = json.loads((golden_dir / "pi0" / f"{kind}_real_keys.json").read_text())
    with torch.device("meta"):
        policy = PiPolicy(pi_config(kind))
    shapes = {published_name(name): list(value.shape) for name, value in policy.state_dict().items()}
    alive = published_names(real["keys"])
    dead = real["keys"].keys() - set(alive.values())
    assert all("lm_head" in name for name in dead) and len(dead) == 2
    assert shapes == {published: real["keys"][name][0] for published, name in alive.items()}
    idle = sum(torch.Size(real["keys"][name][0]).numel() for name in dead)
    assert sum(value.numel() for value in policy.parameters()) == real["parameters"] - idle


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_sizes_are_read_off_the_weights(kind: str, golden_dir: Path) -> None:
    real = json.loads((golden_dir / "pi0" / f"{kind}_real_keys.json").read_text())
    shapes = {published: tuple(real["keys"][name][0]) for published, name in published_names(real["keys"]).items()}
    derived, default = pi_config(kind, **sizes_from_weights(shapes, golden_dir)), pi_config(kind)
    for part in ("vlm_config", "dit_config"):
        assert getattr(derived, part).to_dict().items() >= _sizes(getattr(default, part)).items()
    assert (derived.max_action_dim, derived.max_state_dim) == (32, 32)


def _sizes(config: object) -> dict[str, object]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "projection_dim",
    )
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
