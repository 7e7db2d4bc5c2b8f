"""float32 matrix products of training on CPUs with AVX-512: by oneDNN instead of MKL.

MKL, which torch multiplies float32 matrices with, keeps to AVX2 on processors of other makers than Intel; there oneDNN
is 2.2 times as fast. `rocket_align.matmul` does the same for the teacher, and may not be imported here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The capability is lower in an environment that asks for it (ATEN_CPU_CAPABILITY).
_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def is_plain_float32(*tensors: Tensor | None) -> bool:
    """Tell whether these are float32, no subclasses of tensors (sharded, quantized, fake), and autocast is off."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 for tensor in given)
    return plain and not torch.is_autocast_enabled(given[0].device.type)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) times the transpose of weight (O, I), plus bias (O,), without gradients, for plain float32 tensors."""
    if not _ONEDNN or x.device.type != "cpu" or x.numel() == 0:
        return F.linear(x, weight, bias)
    # Weights with gaps in memory would fall to a reference loop, a thousand times as slow.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
