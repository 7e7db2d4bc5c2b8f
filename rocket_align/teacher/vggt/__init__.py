"""VGGT (Visual Geometry Grounded Transformer), written from its published architecture and checkpoint layout."""

from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig
from rocket_align.teacher.vggt.teacher import VGGTTeacher

__all__ = ["VGGTAggregator", "VGGTConfig", "VGGTTeacher"]
