"""Matrix products by oneDNN are torch's own up to rounding, values and gradients, wherever they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rocket_align import matmul


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A projector's prefix is a slice of its weights: dense rows for fc1, rows with gaps for fc2.
@pytest.mark.parametrize("prefix", ["rows", "columns"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_torchs_values_and_gradients(prefix: str, bias: bool) -> None:
    results = []
    for function in (matmul.linear, F.linear):
        x, weight, offset = (
            tensor.requires_grad_() for tensor in (randn(2, 7, 12), randn(20, 24, seed=1), randn(20, seed=2))
        )
        used = weight[:9, :12] if prefix == "columns" else weight.view(40, 12)[:9]
        y = function(x, used, offset[:9] if bias else None)
        (y * randn(2, 7, 9, seed=3)).sum().backward()
        results.append([y.detach(), x.grad, weight.grad, offset.grad if bias else torch.zeros(1)])
    for fast, plain in zip(*results, strict=True):
        assert fast is not None
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 300])
def test_attention_of_short_and_long_sequences_has_torchs_values(tokens: int) -> None:
    # As the teacher has them: heads of one projection, so that none of the three is contiguous.
    qkv = randn(2, tokens, 3 * 4 * 8).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        mixed = matmul.attention(*qkv.unbind())
    torch.testing.assert_close(mixed, F.scaled_dot_product_attention(*qkv.unbind()), rtol=1e-5, atol=1e-6)


def test_autocast_and_other_types_stay_with_torch() -> None:
    x, weight = randn(3, 8), randn(5, 8, seed=1)
    assert not matmul.multiplies(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
    assert matmul.linear(x[:0], weight).shape == (0, 5)
