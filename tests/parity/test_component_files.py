"""The component files that the reference's training saved: found by one rule, loaded with and without DDP's prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prismatic.checkpoint.layout import component_file
from prismatic.checkpoint.load import load_component, read_state_dict
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import NoisyActionProjector, ProprioProjector
from prismatic.util.errors import UsageError
from rocket_align import AlignConfig, MultiLayerAlignment
from tests.helpers.student_helpers import WIDTH

LAYERS = (1, 2, 3)
COMPONENTS: dict[str, Callable[[], nn.Module]] = {
    "action_head": lambda: L1RegressionActionHead(WIDTH, WIDTH, 7),
    "proprio_projector": lambda: ProprioProjector(WIDTH, 8),
    "noisy_action_projector": lambda: NoisyActionProjector(WIDTH),
    "align_projectors": lambda: MultiLayerAlignment(
        AlignConfig(student_layers=LAYERS, teacher_layers=LAYERS), WIDTH, WIDTH
    ),
}


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("tag", ["7", "latest"])
def test_every_component_loads(name: str, prefix: str, tag: str, golden_dir: Path, tmp_path: Path) -> None:
    recorded = component_file(golden_dir / "finetuned_ckpt_files", name)
    if recorded is None:
        pytest.skip(f"finetuned_ckpt_files has no {name}")
    state = {key.removeprefix("module."): value for key, value in read_state_dict(recorded).items()}
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / f"{name}--{tag}_checkpoint.pt")
    found = component_file(tmp_path, name)
    assert found is not None
    module = COMPONENTS[name]()
    load_component(module, found)
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)


def test_the_rule_for_several_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run--500_chkpt"
    folder.mkdir()
    assert component_file(folder, "action_head") is None
    for step in ("100", "500", "latest"):
        (folder / f"action_head--{step}_checkpoint.pt").write_bytes(b"")
    assert component_file(folder, "action_head") == folder / "action_head--500_checkpoint.pt"
    (folder / "action_head--500_checkpoint.pt").unlink()
    assert component_file(folder, "action_head") == folder / "action_head--latest_checkpoint.pt"
    (folder / "action_head--latest_checkpoint.pt").rename(folder / "action_head--200_checkpoint.pt")
    with pytest.raises(UsageError, match=r"--vla_path: .* several files for action_head, keep one of them: .*100.*200"):
        component_file(folder, "action_head")
