"""The predicted budget: what is counted, on computations whose numbers are known, and at the real models' widths."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.budget import compare_with_published, predict, sharded_bytes
from benchmarks.full_size import Sizes, make_batch
from benchmarks.live_bytes import LiveBytes

FLAGS = SimpleNamespace(views=2, prompt_tokens=40, lora_rank=32)
ONE_BLOCK = Sizes(llm_blocks=2, vision_blocks=2, teacher_blocks=2)


def test_bytes_and_operations_of_a_linear_layer() -> None:
    tracker = LiveBytes()
    with FakeTensorMode(), tracker:
        weight = torch.empty(30, 20, requires_grad=True)
        inputs = torch.empty(10, 20)
        resident = tracker.live
        assert resident == 4 * (30 * 20 + 10 * 20)
        with tracker.phase("forward"):
            loss = (torch.nn.functional.linear(inputs, weight) ** 2).sum()
        # The product is kept for the gradient of its square, the square itself is gone, the sum is one number.
        assert tracker.live - resident == 4 * (10 * 30 + 1)
        assert tracker.phases["forward"].peak_bytes - resident == 4 * (2 * 10 * 30 + 1)
        with tracker.phase("backward"):
            loss.backward()
    assert tracker.phases["forward"].flops == 2 * 10 * 20 * 30
    # Gradient of the weight alone; the inputs need none.
    assert tracker.phases["backward"].flops == 2 * 10 * 20 * 30


def test_checkpointing_trades_operations_for_memory() -> None:
    rows = [predict(ONE_BLOCK, FLAGS, batch_size=1, gradient_checkpointing=used) for used in (True, False)]
    with_it, without = rows
    assert with_it["kept_for_backward_bytes"] < 0.7 * without["kept_for_backward_bytes"]
    assert with_it["flops"] > 1.2 * without["flops"]
    assert with_it["weights_bytes"] == without["weights_bytes"]
    assert with_it["weights_bytes"]["action_head"] == 4 * 151_117_831
    # Two moments, as large as what trains; the frozen weights have none.
    assert with_it["optimizer_bytes"] == 2 * with_it["gradient_bytes"]
    assert with_it["fits"] == {"40 GB": True, "80 GB": True}


def test_a_process_has_its_part_two_blocks_and_what_is_outside_of_blocks() -> None:
    module = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(10, 10) for _ in range(3))})
    module["head"] = torch.nn.Linear(10, 4)
    block, head = 110, 44
    # float32 weights, gradients and two moments divided by four; bf16 weights and gradients gathered.
    assert sharded_bytes(module, 4) == 4 * (3 * block + head) * 4 // 4 + 4 * head + 2 * 4 * block
    for part in module["blocks"]:
        part.to(torch.bfloat16).requires_grad_(False)
    frozen = 2 * 3 * block
    assert sharded_bytes(module, 4) == (frozen + 16 * head) // 4 + 8 * head + 2 * 2 * block


def test_sharding_a_full_fine_tuning_saves_memory() -> None:
    flags = SimpleNamespace(**vars(FLAGS), use_lora=False, shard_teacher=True)
    peaks = [
        predict(ONE_BLOCK, SimpleNamespace(**vars(flags), processes=n), batch_size=1, gradient_checkpointing=True)
        for n in (1, 2, 8)
    ]
    whole, two, eight = (row["peak_bytes"] for row in peaks)
    assert eight < two < whole and eight < 0.6 * whole


def test_the_batch_is_as_the_data_hand_it_over() -> None:
    batch = make_batch(3, views=2, prompt_tokens=40)
    assert batch["input_ids"].shape == (3, 40 + 56 + 1)
    assert ((batch["labels"] > 31743).sum(dim=1) == 56).all()
    assert batch["pixel_values"].shape == (3, 12, 224, 224)


@pytest.mark.parametrize(("peak", "off"), [(60.5, 0.0), (29.5, -50.0)])
def test_published_figures_are_compared_without_checkpointing(peak: float, off: float) -> None:
    row = {"recipe": "baseline", "batch_size": 8, "gradient_checkpointing": False, "peak_bytes": peak * 1e9}
    (found,) = compare_with_published([row, {**row, "gradient_checkpointing": True}, {**row, "batch_size": 4}])
    assert found["published_gb"] == 62 and found["off_by_percent"] == pytest.approx(off)
