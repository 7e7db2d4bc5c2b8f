"""Vision-language-action models on the OpenVLA-OFT layout: model classes, data, training."""

from prismatic.util.moved import keep_earlier_names

keep_earlier_names(
    {
        "prismatic.models.components": "prismatic.checkpoint.load",
        "prismatic.models.merge_lora": "prismatic.checkpoint.merge",
        "prismatic.training.build": "prismatic.checkpoint.load",
        "prismatic.training.checkpoint": "prismatic.checkpoint.write",
        "prismatic.training.folders": "prismatic.checkpoint.layout",
        "prismatic.vla.datasets.episode_table": "prismatic.vla.datasets.episodes",
    }
)
