"""The mini teacher while it is trained: a VGGT aggregator with one linear readout per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from experiments.mini.teacher_readout import Prediction, Readout, Scale
from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig

if TYPE_CHECKING:
    from experiments.mini.train_teacher import TrainTeacherConfig

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
