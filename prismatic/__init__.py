"""Vision-language-action models on the OpenVLA-OFT layout: model classes, data, training."""

from prismatic.util.moved import keep_earlier_names

keep_earlier_names(
    {
        "prismatic.models.components": "prismatic.checkpoint.load",
        "prismatic.models.merge_lora": "prismatic.checkpoint.merge",
        "prismatic.training.build": "prismatic.checkpoint.load",
        "prismatic.training.checkpoint": "prismatic.checkpoint.write",
        "prismatic.training.folders": "prismatic.checkpoint.layout",
        "prismatic.util.hub": "prismatic.util.files",
        "prismatic.vla.action_masks": "prismatic.vla.action_tokenizer",
        "prismatic.vla.prompting": "prismatic.vla.action_tokenizer",
        "prismatic.vla.datasets.episode_table": "prismatic.vla.datasets.episodes",
        "prismatic.vla.datasets.formats": "prismatic.vla.datasets.builder",
        "prismatic.vla.datasets.lerobot.features": "prismatic.vla.datasets.lerobot.metadata",
        "prismatic.vla.datasets.oxe.mixtures": "prismatic.vla.datasets.oxe.table",
        "prismatic.vla.datasets.oxe.assembly": "prismatic.vla.datasets.oxe.operations",
        "prismatic.vla.datasets.subset": "prismatic.vla.datasets.episodes",
    }
)
