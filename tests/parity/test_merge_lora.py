"""Merging an adapter on disk against the reference merge, and against inference with the adapter unmerged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora_weights_and_save as script
from experiments.robot.openvla_utils import get_vla
from experiments.robot.policy import PolicyFlags
from prismatic.checkpoint import merge as merging
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.util.errors import UsageError
from tests.helpers.student_helpers import forward_inputs, load_heads
from tests.helpers.training import writable_copy


@pytest.fixture
def checkpoint(golden_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint as a LoRA run without merging leaves it; its base model lies beside it, write-protected."""
    folder = writable_copy(golden_dir / "finetuned_ckpt_files", tmp_path / "run--7_chkpt")
    writable_copy(golden_dir / "lora_adapter", folder / "lora_adapter")
    shutil.copytree(golden_dir / "openvla_tiny", tmp_path / "openvla_tiny")
    return folder


@pytest.fixture
def merge(checkpoint: Path) -> Callable[..., None]:
    """Run the script's main on the checkpoint."""

    def run(**flags: Any) -> None:
        given = {"base_checkpoint": str(checkpoint.parent / "openvla_tiny"), **flags}
        assert script.main(script.ConvertConfig(lora_finetuned_checkpoint_dir=str(checkpoint), **given)) == 0

    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    names = json.loads(index.read_text())["weight_map"]
    return {key: load_file(folder / file)[key] for key, file in names.items()}


def load(folder: Path, **changes: Any) -> Any:
    return get_vla(PolicyFlags(str(folder), device="cpu", **changes))


def test_float32_equals_the_reference_merge(merge: Callable[..., None], checkpoint: Path, golden_dir: Path) -> None:
    merge(dtype="float32")
    weights = weights_of(checkpoint)
    golden = load_file(golden_dir / "lora_merged.safetensors")
    compared = {key: golden[key] for key in golden if key in weights}
    assert len(compared) == 5
    torch.testing.assert_close({key: weights[key] for key in compared}, compared, atol=1e-6, rtol=1e-5)
    batch = load_file(golden_dir / "forward_l1_discrete.safetensors")
    with torch.no_grad():
        output = load(checkpoint)(**forward_inputs(batch, load_heads(golden_dir)), output_hidden_states=True)
    padding = ~batch["attention_mask"].bool()
    kept = torch.ones(output.hidden_states[-1].shape[:2], dtype=torch.bool)
    kept[:, -padding.shape[1] :] = ~padding
    torch.testing.assert_close(output.hidden_states[-1][kept], golden["hidden_states.last"][kept], atol=1e-4, rtol=1e-3)


def test_rows_at_a_time_give_the_same(
    merge: Callable[..., None], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(output_dir=str(tmp_path / "whole"))
    monkeypatch.setattr(merging, "_ELEMENTS_AT_ONCE", 1000)
    merge(output_dir=str(tmp_path / "rows"))
    whole, rows = weights_of(tmp_path / "whole"), weights_of(tmp_path / "rows")
    # Matrix products of other shapes may round the last bit of float32 differently, hence bfloat16's now and then.
    torch.testing.assert_close(rows, whole, rtol=2**-7, atol=1e-6)


def test_the_base_models_type_is_kept_and_rounded_once(merge: Callable[..., None], checkpoint: Path) -> None:
    adapted = load(checkpoint, base_checkpoint=str(checkpoint.parent / "openvla_tiny")).state_dict()
    merge()
    weights = weights_of(checkpoint)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    base = load_file(checkpoint.parent / "openvla_tiny" / "model.safetensors")
    assert weights.keys() == base.keys()
    assert sum(not torch.equal(weights[key], base[key]) for key in base) == 71
    # float32 sums; half a unit in the last of bfloat16's 8 bits
    torch.testing.assert_close(load(checkpoint).state_dict(), adapted, rtol=2.0**-8, atol=1e-6)


def test_the_merged_folder_is_a_whole_checkpoint(
    merge: Callable[..., None], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = checkpoint.parent / "openvla_tiny"
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in base.iterdir()}
    merge()
    assert "merged 71 weights" in capsys.readouterr().out
    opened = open_checkpoint(str(checkpoint))
    assert opened.adapter_path is None and opened.processor_path == checkpoint
    assert "action_head" in opened.components
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in base.iterdir()} == before
    assert not list(checkpoint.glob(".*"))


def test_shards(merge: Callable[..., None], checkpoint: Path) -> None:
    merge(output_dir=str(checkpoint.parent / "whole"))
    merge(output_dir=str(checkpoint.parent / "shards"), max_shard_size="3MB")
    whole, shards = checkpoint.parent / "whole", checkpoint.parent / "shards"
    files = sorted(file.name for file in shards.glob("*.safetensors"))
    assert len(files) == 3 and files[0] == "model-00001-of-00003.safetensors"
    # The two 4 MB tables of words are over the limit and alone in their files.
    assert sum((shards / file).stat().st_size > 3_100_000 for file in files) == 2
    assert (shards / "action_head--7_checkpoint.pt").is_file()  # another folder is complete, too
    torch.testing.assert_close(weights_of(shards), weights_of(whole), rtol=0, atol=0)
    assert load(shards).state_dict().keys() == load(whole).state_dict().keys()


def test_merging_again_needs_to_be_said(merge: Callable[..., None], checkpoint: Path) -> None:
    merge(max_shard_size="3MB")
    with pytest.raises(UsageError, match=r"holds merged weights; accepted: --overwrite True"):
        merge()
    first = weights_of(checkpoint)
    merge(overwrite=True)
    assert [file.name for file in checkpoint.glob("model*")] == ["model.safetensors"]
    torch.testing.assert_close(weights_of(checkpoint), first, rtol=0, atol=0)  # never merged twice


def test_a_carried_base_weight_is_compared(
    merge: Callable[..., None], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older PEFT wrote the frozen head into the adapter's file: it tells whether the base model is the right one."""
    file = checkpoint / "lora_adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    head = load_file(checkpoint.parent / "openvla_tiny" / "model.safetensors")["language_model.lm_head.weight"]
    for factor, warned in ((1.0, False), (2.0, True)):
        carried = {"base_model.model.language_model.lm_head.base_layer.weight": head.float() * factor}
        save_file({**weights, **carried}, file)
        merge(overwrite=True)
        assert ("warning: language_model.lm_head.weight" in capsys.readouterr().err) == warned


def test_vision_adapters_of_a_film_run_are_merged(merge: Callable[..., None], checkpoint: Path) -> None:
    merge(output_dir=str(checkpoint.parent / "plain"))
    file = checkpoint / "lora_adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    renamed = {}
    for key, value in weights.items():
        inside = key.replace("model.vision_backbone.", "model.vision_backbone.vision_backbone.")
        if inside != key:
            inside = inside.replace(".attn.", ".block.attn.").replace(".mlp.", ".block.mlp.")
            inside = inside.replace("attn_pool.block.mlp", "attn_pool.mlp")
        renamed[inside] = value
    assert sum(".block." in key for key in renamed) > 10
    save_file(renamed, file)
    merge(output_dir=str(checkpoint.parent / "film"))
    plain, film = weights_of(checkpoint.parent / "plain"), weights_of(checkpoint.parent / "film")
    torch.testing.assert_close(film, plain, rtol=0, atol=0)
    # The same names in an adapter that is loaded unmerged.
    load(checkpoint, base_checkpoint=str(checkpoint.parent / "openvla_tiny"))


def test_the_runs_platform_is_kept(merge: Callable[..., None], checkpoint: Path) -> None:
    (checkpoint / "run_config.json").write_text(json.dumps({"platform": "aloha"}))
    merge()
    assert open_checkpoint(str(checkpoint)).config["platform"]["chunk"] == 25


def _edit_adapter_config(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "lora_adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _edit_adapter(checkpoint: Path, name: str, value: torch.Tensor | None) -> None:
    file = checkpoint / "lora_adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(name, None)
    save_file(weights if value is None else {**weights, name: value}, file)


Q_PROJ = "base_model.model.language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "lora_adapter"), {}, "has no folder lora_adapter"),
        (lambda folder: None, {"base_checkpoint": "/no/such"}, "--base_checkpoint: no such folder"),
        (lambda folder: None, {"max_shard_size": "0GB"}, "--max_shard_size: '0GB' found"),
        (lambda folder: _edit_adapter_config(folder, use_dora=True), {}, "use_dora is True; accepted: False"),
        (lambda folder: _edit_adapter_config(folder, peft_type="LOHA"), {}, "peft_type is 'LOHA'; accepted: 'LORA'"),
        (lambda folder: _edit_adapter(folder, f"{Q_PROJ}.lora_B.weight", None), {}, "q_proj.lora_A.weight has no lora"),
        (
            lambda folder: _edit_adapter(folder, f"{Q_PROJ}.lora_A.weight", torch.zeros(8, 65)),
            {},
            r"q_proj.weight is \(64, 64\) in .*trained for \(64, 65\)",
        ),
        (lambda folder: _edit_adapter(folder, "base_model.model.other", torch.zeros(1)), {}, "model.other found"),
        (
            lambda folder: (folder / "lora_adapter" / "adapter_model.safetensors").write_bytes(b"version https://"),
            {},
            "damaged or cut short",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    merge: Callable[..., None], checkpoint: Path, spoil: Callable[[Path], None], flags: dict[str, str], message: str
) -> None:
    spoil(checkpoint)
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(UsageError, match=message):
        merge(**flags)
    assert sorted(checkpoint.rglob("*")) == before


def test_the_base_models_folder_is_no_output(merge: Callable[..., None], checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="is the base model, which is never changed"):
        merge(output_dir=str(checkpoint.parent / "openvla_tiny"), overwrite=True)
