"""Five training steps with nothing but what rocket-align asks for; started by test_rocket_align_alone.py."""

from __future__ import annotations

import importlib.util
import json
import sys

import torch
from torch import Tensor, nn

from rocket_align import AlignConfig, AlignedModel, MultiLayerAlignment, VGGTTeacher, attach


class Policy(nn.Module):
    """Image patches and a word through a small transformer, to an action."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 28, stride=28)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True) for _ in range(3))
        self.head = nn.Linear(32, 7)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(dim=1))


def main(teacher_folder: str) -> None:
    """Train, print what the test looks at."""
    torch.manual_seed(0)
    images = torch.rand(2, 1, 3, 84, 84)
    model = Policy()
    teacher = VGGTTeacher.from_pretrained(teacher_folder, layers="0,-1")
    taps = attach(model, layers=(0, 2), image_tokens=range(9), example=(images[:, 0],))
    config = AlignConfig(student_layers=(1, 3), teacher_layers=(0, 1), shift=False)
    module = AlignedModel(model, MultiLayerAlignment(config, 32, teacher.embed_dim), taps)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        actions, aligned = module(images[:, 0], teacher=teacher(images))
        (actions.square().mean() + config.coeff * aligned.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(aligned.loss.item())
    others = ("transformers", "timm", "peft", "prismatic", "experiments", "scipy", "PIL", "huggingface_hub")
    present = [name for name in others if importlib.util.find_spec(name)]
    print(json.dumps({"losses": losses, "strategy": taps.strategy, "present": present, "python": sys.version_info[:2]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
