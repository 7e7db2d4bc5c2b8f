"""OpenVLA's model, configuration and processor as Hugging Face classes, for stock transformers and timm."""

from __future__ import annotations


def register_openvla() -> None:
    """Make the Auto classes for configurations, models, image processors and processors know model type "openvla".

    Calling it again changes nothing. Checkpoints then load without remote code.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor

    AutoConfig.register("openvla", OpenVLAConfig, exist_ok=True)
    AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
    AutoImageProcessor.register(OpenVLAConfig, slow_image_processor_class=PrismaticImageProcessor, exist_ok=True)
    AutoProcessor.register(OpenVLAConfig, PrismaticProcessor, exist_ok=True)
