"""Vision-language-action models on the OpenVLA-OFT layout: model classes, data, training."""

from prismatic.util.moved import keep_earlier_names

keep_earlier_names({"prismatic.vla.datasets.episode_table": "prismatic.vla.datasets.episodes"})
