"""The backbone of a detector: a network, its feature levels with their masks, and their position encodings."""

from detr_backbone.backbone.backbone import Backbone
from detr_backbone.backbone.base import BackboneBase
from detr_backbone.backbone.config import BackboneConfig
from detr_backbone.backbone.inference import fold_for_inference
from detr_backbone.backbone.joiner import Joiner, build_backbone

__all__ = ["Backbone", "BackboneBase", "BackboneConfig", "Joiner", "build_backbone", "fold_for_inference"]
