"""Taps collect the stream that a forward pass really has, once, on models that call their layers and on those that do
not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rocket_align
from rocket_align.taps import Taps


class Block(nn.Module):
    """A pre-norm block of two linear parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + self.mlp(self.input_layernorm(hidden_states)), None


class Student(nn.Module):
    """A language model over image and text tokens, whose training calls its blocks or, as LeRobot's, their parts."""

    def __init__(self, calls_blocks: bool = True, checkpointed: bool = False, passes: int = 1) -> None:
        super().__init__()
        self.image_proj = nn.Linear(6, 16)
        self.language_model = nn.Module()
        self.language_model.embed = nn.Embedding(20, 16)
        self.language_model.layers = nn.ModuleList(Block(16) for _ in range(4))
        self.language_model.norm = nn.LayerNorm(16)
        self.calls_blocks, self.checkpointed, self.passes = calls_blocks, checkpointed, passes

    def block(self, block: Any, hidden: Tensor) -> Tensor:
        if self.calls_blocks:
            return block(hidden)[0]
        return hidden + block.mlp(block.input_layernorm(hidden))

    def forward(self, images: Tensor, input_ids: Tensor) -> Tensor:
        hidden = torch.cat((self.image_proj(images), self.language_model.embed(input_ids)), dim=1)
        for _ in range(self.passes):
            for block in self.language_model.layers:
                if self.checkpointed:
                    hidden = checkpoint(self.block, block, hidden, use_reentrant=False)
                else:
                    hidden = self.block(block, hidden)
        return self.language_model.norm(hidden)


def student(**options: Any) -> Student:
    torch.manual_seed(0)
    return Student(**options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 6, generator=generator), torch.randint(0, 20, (2, 3), generator=generator)


def states(model: Student, images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """The stream at every place, by hand."""
    hidden = torch.cat((model.image_proj(images), model.language_model.embed(input_ids)), dim=1)
    places = {"embeddings": hidden}
    for index, block in enumerate(model.language_model.layers):
        hidden = hidden + block.mlp(block.input_layernorm(hidden))
        places[f"block.{index}"] = hidden
    return {**places, "final_norm": model.language_model.norm(hidden)}


EVERY = ("embeddings", "block.0", "block.1", "block.2", "block.3", "final_norm")


@pytest.mark.parametrize(("calls_blocks", "strategy"), [(True, "layer"), (False, "norm")])
@pytest.mark.parametrize("with_example", [True, False])
def test_auto_takes_the_strategy_that_fires_and_says_which(
    calls_blocks: bool, strategy: str, with_example: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = student(calls_blocks=calls_blocks).eval()
    caplog.set_level("INFO")
    taps = rocket_align.attach(model, EVERY, range(5), example=batch() if with_example else None)
    assert (taps.strategy == "auto") is not with_example
    model(*batch())
    rows = taps.take()
    assert taps.strategy == strategy and f"strategy {strategy}" in caplog.text
    expected = states(model, *batch())
    torch.testing.assert_close(rows, torch.stack([expected[name][:, :5] for name in EVERY]))
    assert not model.training


@pytest.mark.parametrize("calls_blocks", [True, False])
def test_recomputed_blocks_are_not_collected_and_gradients_are_equal(calls_blocks: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = student(calls_blocks=calls_blocks, checkpointed=checkpointed)
        taps = rocket_align.attach(model, ("block.0", "block.2", "final_norm"), range(5))
        for _ in range(2):
            loss = model(*batch()).square().mean() + taps_loss(model, taps)
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        with pytest.raises(ValueError, match="no forward pass of Student since the last take"):
            taps.take()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def taps_loss(model: Student, taps: Taps) -> Tensor:
    return taps.take().pow(3).sum()


@pytest.mark.parametrize("calls_blocks", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_compiled_models_are_tapped_on_every_call(calls_blocks: bool, checkpointed: bool) -> None:
    values = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = student(calls_blocks=calls_blocks, checkpointed=checkpointed)
        taps = rocket_align.attach(model, ("block.0", "block.2"), range(5), example=batch())
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            model.zero_grad()
            (run(*batch()).square().mean() + taps_loss(model, taps)).backward()
        values.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)


def test_text_rows_are_not_kept() -> None:
    model = student()
    taps = rocket_align.attach(model, "1,3", slice(0, 5))
    model(*batch())
    kept = [tensor for tensors in taps._rows.values() for tensor in tensors]
    assert {tensor.untyped_storage().nbytes() for tensor in kept} == {2 * 5 * 16 * 4}
    assert taps.take().shape == (2, 2, 5, 16)


@pytest.mark.parametrize(
    ("image_tokens", "columns"),
    [(range(1, 4), [1, 2, 3]), (slice(2, None), [2, 3, 4, 5, 6, 7]), ([4, 0], [4, 0]), (torch.tensor([7]), [7])],
)
def test_positions_in_any_form(image_tokens: Any, columns: list[int]) -> None:
    model = student()
    taps = rocket_align.attach(model, ["block.1"], image_tokens)
    model(*batch())
    torch.testing.assert_close(taps.take()[0], states(model, *batch())["block.1"][:, columns])


def test_image_tokens_are_looked_up_in_each_sample() -> None:
    class Mixed(Student):
        def forward(self, images: Tensor, input_ids: Tensor) -> Tensor:  # 9 stands for an image token
            hidden = self.language_model.embed(input_ids)
            for block in self.language_model.layers:
                hidden = block(hidden)[0]
            return hidden

    torch.manual_seed(0)
    model, ids = Mixed(), torch.tensor([[1, 9, 9, 2, 9], [9, 3, 9, 4, 5]])
    for image_tokens in (9, lambda images, input_ids: input_ids == 9):
        taps = rocket_align.attach(model, ["block.3"], image_tokens)
        output = model(batch()[0], input_ids=ids) if isinstance(image_tokens, int) else model(batch()[0], ids)
        rows = taps.take()[0]
        torch.testing.assert_close(rows[0], output[0, [1, 2, 4]])
        torch.testing.assert_close(rows[1, :2], output[1, [0, 2]])
        assert taps.mask is not None and taps.mask.tolist() == [[True] * 3, [True, True, False]]
        model(batch()[0], input_ids=ids[:, 1:3]) if isinstance(image_tokens, int) else model(batch()[0], ids[:, 1:3])
        assert taps.take().shape[2] == 2
        taps.detach()


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: student(calls_blocks=False), {"strategy": "layer"}, r"fired in one forward pass \(layer 0, 0\) times"),
        (lambda: student(passes=2), {}, r"\(layer 2, 2; norm 2, 2; returned 0, 0\) times; accepted: each once"),
        (student, {"image_tokens": range(9)}, "found position 8; accepted: 0 to 7 in this sequence"),
        (student, {"image_tokens": 5}, "no image token in any sample"),
        (lambda: student().requires_grad_(False), {}, r"the stream at block.1 of language_model.layers is frozen"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_pass_that_does_not_fit_is_refused_in_one_line(
    build: Callable[[], Student], arguments: dict[str, Any], message: str, at_once: bool
) -> None:
    model = build()
    images, ids = batch()
    ids = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids % 4), dim=1) if "5" in str(arguments) else ids
    call = {"images": images[:, :0] if len(ids[0]) == 8 else images, "input_ids": ids}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=message) as error:
        taps = rocket_align.attach(
            model, ("block.1", "block.2"), **({"image_tokens": range(5)} | arguments), example=call if at_once else None
        )
        model(**call)  # A pass itself never fails.
        taps.take()
    assert "\n" not in str(error.value)
    if at_once:
        left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        assert left == hooks


def test_a_frozen_stream_is_seen_through_trainable_parts_that_do_not_feed_it() -> None:
    """SmolVLA's default: the vision-language model is frozen, the state's token in the same sequence trains."""

    model = student().requires_grad_(False)  # no block mixes tokens, so images see no text
    model.language_model.embed.requires_grad_(True)
    taps = rocket_align.attach(model, ["block.1"], range(5))
    model(*batch())
    with pytest.raises(ValueError, match="frozen"):
        taps.take()
    model.image_proj.requires_grad_(True)
    model(*batch())
    assert taps.take().requires_grad
    with torch.no_grad():
        model.requires_grad_(False)(*batch())
        assert not taps.take().requires_grad


def test_detached_and_copied_models_collect_nothing() -> None:
    model = student()
    taps = rocket_align.attach(model, [1, 2], range(5))
    output = model(*batch())
    average = copy.deepcopy(model)  # while rows with a graph are held
    torch.testing.assert_close(average(*batch()), output)
    assert taps.take().shape == (2, 2, 5, 16)
    assert all(not taps._rows for _ in [average(*batch())])
    taps.detach()
    model(*batch())
    with pytest.raises(ValueError, match="no forward pass"):
        taps.take()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_ended_in_an_exception_does_not_count() -> None:
    model = student()
    taps = rocket_align.attach(model, [0, 3], range(5))
    with pytest.raises(RuntimeError):
        model(batch()[0], torch.zeros(3, 3, dtype=torch.long))
    model.language_model.norm.register_forward_pre_hook(fail_once())
    with pytest.raises(ArithmeticError):
        model(*batch())
    model(*batch())
    assert taps.take().shape == (2, 2, 5, 16)


def fail_once() -> Callable[..., None]:
    pending = [True]

    def hook(*_: Any) -> None:
        if pending and pending.pop():
            raise ArithmeticError

    return hook


@pytest.mark.parametrize("calls_blocks", [True, False])
def test_a_forward_that_is_called_past_the_hooks_is_collected(calls_blocks: bool) -> None:
    model = student(calls_blocks=calls_blocks, checkpointed=True)
    expected = states(model, *batch())["block.3"][:, :5]
    taps = rocket_align.attach(model, [0, 3], range(5))
    for _ in range(2):
        model.forward(*batch())
    rows = taps.take()
    torch.testing.assert_close(rows[1], expected)
    rows.sum().backward()
    with pytest.raises(ValueError, match="no forward pass"):
        taps.take()


def test_where_several_stacks_fit_one_is_asked_for() -> None:
    model = nn.Module()
    model.first = nn.ModuleList(Block(4) for _ in range(2))
    model.second = nn.ModuleList(Block(4) for _ in range(3))
    with pytest.raises(ValueError, match=r'found first, second for blocks; accepted: one, given as modules={"blocks"'):
        rocket_align.attach(model, [0])
    assert rocket_align.attach(model, [-1], modules={"blocks": "second"}).names == ("block.2",)
    with pytest.raises(ValueError, match="no third for blocks in Module"):
        rocket_align.attach(model, [0], modules={"blocks": "third"})
    with pytest.raises(ValueError, match="taps of 2 streams"):
        rocket_align.attach(model, ["block.0", "vision.0"])
