"""A small script with the structure that `patches` relies on in OpenVLA-OFT's vla-scripts/finetune.py.

It trains a tiny policy on random batches on the CPU. Names of functions, parameters and variables are upstream's, since
the injection looks for them; everything else is written for the tests. It is copied into a folder and run there.
"""

import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import draccus
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import AdamW

VIEWS, GRID, WIDTH, SIDE = 2, 3, 16, 42


@dataclass
class FinetuneConfig:
    vla_path: str = "tiny"  # Checkpoint to go on from, when resuming
    run_root_dir: Path = Path("runs")  # Where checkpoints go
    max_steps: int = 2
    grad_accumulation_steps: int = 1
    save_freq: int = 1
    use_val_set: bool = False
    resume: bool = False
    resume_step: Optional[int] = None  # noqa: UP045 - as the script that this stands in for spells it


@dataclass
class PolicyOutput:
    """A dataclass, in which DDP finds the tensors."""

    hidden_states: tuple


class Backbone(nn.Module):
    """Patches to tokens; twice three channels a view, as a fused backbone has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(6, WIDTH, SIDE // GRID, SIDE // GRID)

    def get_num_patches(self) -> int:
        return GRID * GRID

    def get_num_images_in_input(self) -> int:
        return VIEWS

    def forward(self, pixels):
        tokens = [self.embed(view).flatten(2).transpose(1, 2) for view in pixels.split(6, dim=1)]
        return torch.cat(tokens, dim=1)


class TinyPolicy(nn.Module):
    """Four layers; returns all five hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.llm_dim = WIDTH
        self.config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=4))
        self.vision_backbone = Backbone()
        self.embed_tokens = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in range(4))

    def forward(self, input_ids, pixel_values):
        text = self.embed_tokens(input_ids)
        states = [torch.cat([text[:, :1], self.vision_backbone(pixel_values), text[:, 1:]], dim=1)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return PolicyOutput(tuple(states))


def wrap_ddp(module, device_id, find_unused=False):
    return DDP(module, find_unused_parameters=find_unused)


def say(line):
    """Print in one write, so that the lines of two processes do not mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def random_batch(generator):
    pixels = torch.randn(2, 6 * VIEWS, SIDE, SIDE, generator=generator)
    ids = torch.randint(0, 32, (2, 5), generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "actions": torch.rand(2, 7, generator=generator)}


def run_forward_pass(vla, action_head, batch, num_patches) -> tuple:
    output = vla(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    predicted = action_head(output.hidden_states[-1][:, num_patches:].mean(dim=1))
    loss = nn.functional.l1_loss(predicted, batch["actions"])
    metrics = {"loss_value": loss.item()}

    # What the caller needs
    return loss, metrics


def save_training_checkpoint(
    cfg,
    run_dir,
    log_step,
    vla,
    action_head,
) -> None:
    """Write the parts of a step."""
    checkpoint_dir = Path(f"{run_dir}--{log_step}_chkpt")
    suffix = f"{log_step}_checkpoint.pt"
    if dist.get_rank() == 0:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        torch.save(vla.state_dict(), checkpoint_dir / f"vla--{suffix}")
        if action_head is not None:
            torch.save(action_head.state_dict(), checkpoint_dir / f"action_head--{suffix}")
    dist.barrier()


def run_validation(vla, action_head, val_batches, num_patches):
    """Mean metrics, as text."""
    with torch.no_grad():
        found = [run_forward_pass(vla, action_head, batch, num_patches)[1] for batch in val_batches]
    for name in found[0]:
        say(f"validation {name} {sum(metrics[name] for metrics in found) / len(found):.6f}")


@draccus.wrap()
def finetune(cfg: FinetuneConfig) -> None:
    """Train and print."""
    say("building")
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    generator = torch.Generator().manual_seed(dist.get_rank())
    image_processor = SimpleNamespace(means=[(0.5,) * 3, (0.5,) * 3], stds=[(0.5,) * 3, (0.5,) * 3])
    processor = SimpleNamespace(image_processor=image_processor)  # noqa: F841 - the injected lines use it
    vla = TinyPolicy()
    vla = wrap_ddp(vla, 0, find_unused=True)
    action_head = wrap_ddp(nn.Linear(WIDTH, 7), 0)
    NUM_PATCHES = vla.module.vision_backbone.get_num_patches() * vla.module.vision_backbone.get_num_images_in_input()

    # Everything that learns
    trainable_params = [param for param in vla.parameters() if param.requires_grad]
    trainable_params += list(action_head.parameters())
    optimizer = AdamW(trainable_params, lr=1e-2)
    recent_metrics = {"loss_value": deque(maxlen=cfg.grad_accumulation_steps)}

    for batch_idx in range(cfg.max_steps * cfg.grad_accumulation_steps):
        batch = random_batch(generator)
        loss, metrics = run_forward_pass(vla, action_head, batch, num_patches=NUM_PATCHES)
        (loss / cfg.grad_accumulation_steps).backward()
        for name, value in metrics.items():
            if name in recent_metrics:
                recent_metrics[name].append(value)
        if (batch_idx + 1) % cfg.grad_accumulation_steps:
            continue
        norms = [param.grad.norm().item() for param in trainable_params if param.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        step = (batch_idx + 1) // cfg.grad_accumulation_steps + (cfg.resume_step or 0)
        shown = " ".join(f"{name}={sum(values) / len(values):.6f}" for name, values in recent_metrics.items() if values)
        say(f"rank {os.environ['RANK']} step {step} gradient {sum(norms):.6f} {shown}")
        if step % cfg.save_freq == 0:
            save_training_checkpoint(
                cfg=cfg,
                run_dir=cfg.run_root_dir / "run",
                log_step=step,
                vla=vla,
                action_head=action_head,
            )
        if cfg.use_val_set:
            run_validation(vla, action_head, [random_batch(generator)], NUM_PATCHES)
    dist.destroy_process_group()


if __name__ == "__main__":
    finetune()
