"""The mini teacher while it is trained: a VGGT aggregator with one linear readout per layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.mini.make.teacher_readout import Prediction, Readout, Scale
from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.checkpoint import AGGREGATOR_PREFIX, find_weights, load_strictly, read_weights
from rocket_align.teacher.vggt.config import VGGTConfig

if TYPE_CHECKING:
    from experiments.mini.make.train_teacher import TrainTeacherConfig

READOUT_NAME = "readout.safetensors"
NUM_VIEWS = 2
# Nearly zero, as upstream starts them, is a slow start for a short training.
_TOKEN_STD = 0.02


def teacher_config(cfg: TrainTeacherConfig) -> VGGTConfig:
    """VGGT's configuration at the sizes asked for; LayerScale starts at 1, since the model is not deep."""
    return VGGTConfig(
        image_size=cfg.image_size,
        embed_dim=cfg.embed_dim,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_ratio,
        num_register_tokens=cfg.num_register_tokens,
        layer_scale_init=1.0,
        vit_depth=cfg.vit_depth,
        vit_num_heads=cfg.num_heads,
        vit_mlp_ratio=cfg.mlp_ratio,
        vit_num_register_tokens=0,
    )


class TeacherModel(nn.Module):
    """Aggregator, readouts and the scale of what they predict.

    Args:
        config: of the aggregator.
        cells: side of the square of depth cells per patch.
    """

    def __init__(self, config: VGGTConfig, cells: int) -> None:
        super().__init__()
        self.aggregator = VGGTAggregator(config)
        nn.init.normal_(self.aggregator.camera_token, std=_TOKEN_STD)
        nn.init.normal_(self.aggregator.register_token, std=_TOKEN_STD)
        self.readouts = nn.ModuleList(
            Readout(2 * config.embed_dim, config.num_special_tokens, cells) for _ in range(config.depth)
        )
        self.scale = Scale(NUM_VIEWS, config.grid_size * cells)

    def forward(self, images_BV3HW: Tensor) -> list[Prediction]:
        """Images in [0, 1] -> each layer's prediction."""
        features = self.aggregator(images_BV3HW, keep_special=True)
        return [readout(tokens) for readout, tokens in zip(self.readouts, features, strict=True)]


def load_model(folder: str | Path) -> TeacherModel:
    """The trained aggregator with its readouts, frozen, from the folder that `train_teacher` writes.

    Raises:
        ValueError: a file is missing or does not fit (rocket_align's messages).
    """
    weights_path, config = find_weights(folder)
    readout_path = Path(folder) / READOUT_NAME
    if not readout_path.is_file():
        raise ValueError(f"{readout_path}: no such file; accepted: a folder of experiments.mini.make.train_teacher")
    readouts = load_file(readout_path)
    cells = readouts["scale.depth_mean"].shape[1] // config.grid_size
    model = TeacherModel(config, cells)
    aggregator = read_weights(weights_path, config.depth)
    named = {"aggregator." + name.removeprefix(AGGREGATOR_PREFIX): value for name, value in aggregator.items()}
    load_strictly(model, {**named, **readouts}, weights_path)
    return model.requires_grad_(False).eval()
