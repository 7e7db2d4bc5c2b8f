"""Vision-language-action models on the OpenVLA-OFT layout: model classes, data, training."""
