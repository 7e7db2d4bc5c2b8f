"""One rank of test_taps_distributed.py: gradients of one aligned step, averaged by DDP or FSDP2, to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import rocket_align
from rocket_align import AlignConfig, AlignedModel, MultiLayerAlignment, TeacherFeatures
from tests.helpers.tiny_vlms import IMAGE, TEXT_WIDTH, paligemma, paligemma_batch


def build() -> AlignedModel:
    """The model with the last block's output aligned, which its own loss reaches through the norm alone."""
    model = paligemma().train()
    taps = rocket_align.attach(model, ["block.0", "final_norm"], IMAGE, example=paligemma_batch())
    config = AlignConfig(student_layers=(0, 1), teacher_layers=(0, 1), shift=False)
    return AlignedModel(model, MultiLayerAlignment(config, TEXT_WIDTH, teacher_dim=8), taps)


def step(module: nn.Module, rank: int) -> None:
    """Backward of the total loss on this rank's sample."""
    batch = {name: value[rank : rank + 1] for name, value in paligemma_batch().items()}
    generator = torch.Generator().manual_seed(rank)
    layers = tuple(torch.randn(1, 1, 16, 16, generator=generator) for _ in range(2))
    output, aligned = module(**batch, teacher=TeacherFeatures(layers, (4, 4), (56, 56)))
    (output.loss + 0.5 * aligned.loss).backward()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    named = {name.removeprefix("module."): weight.grad for name, weight in module.named_parameters()}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}
    return {name: grad.contiguous() for name, grad in whole.items() if grad is not None}


def main(kind: str, folder: str) -> None:
    """Wrap, step, write."""
    dist.init_process_group("gloo")
    module: nn.Module = build()
    if kind == "ddp":
        module = nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in module.model.model.language_model.layers:
            fully_shard(block)
        fully_shard(module)
    for _ in range(2):  # The second step fails where the first left a weight without its gradient.
        module.zero_grad()
        step(module, dist.get_rank())
    save_file(gradients(module), Path(folder) / f"{kind}{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
