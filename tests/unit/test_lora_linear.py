"""A linear layer and its adapter as one function: PEFT's values and gradients, in every way it may compute them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from prismatic.models.lora_linear import FusedLoraLinear, fuse_lora_layers


def adapted(in_dim: int, out_dim: int, *, bias: bool = True, dropout: float = 0.0) -> FusedLoraLinear:
    """One layer with an adapter of rank 4 of which both halves matter."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=2, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(in_dim, out_dim, bias=bias)), config)
    fuse_lora_layers(model)
    layer = model.base_model.model[0]
    assert type(layer) is FusedLoraLinear
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def values_and_gradients(layer: FusedLoraLinear, forward: object, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(layer, x)  # type: ignore[operator]
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert len(grads) == 2 and x.grad is not None
    return [y.detach(), x.grad, *grads]


# Few tokens: the adapter's own products. Many: the sum of weights, whose gradient is whole for narrow layers.
@pytest.mark.parametrize(
    ("shape", "out_dim"), [((2, 3, 12), 8), ((5, 40, 12), 8), ((4, 100, 40), 32), ((2, 0, 12), 8), ((200, 12), 8)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_pefts(shape: tuple[int, ...], out_dim: int, bias: bool) -> None:
    layer = adapted(shape[-1], out_dim, bias=bias)
    x = torch.randn(shape)
    for fused, plain in zip(
        values_and_gradients(layer, FusedLoraLinear.forward, x),
        values_and_gradients(layer, LoraLinear.forward, x),
        strict=True,
    ):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_dropout_other_types_and_disabled_adapters_stay_with_peft() -> None:
    layer = adapted(12, 8, dropout=0.5)
    x = torch.randn(200, 12)
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    assert torch.equal(dropped, LoraLinear.forward(layer, x))
    layer.eval()
    assert not torch.equal(layer(x), dropped)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), LoraLinear.forward(layer, x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_state_dict_has_pefts_names() -> None:
    layer = adapted(12, 8)
    assert set(layer.state_dict()) == {
        "base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"
    }  # fmt: skip
