"""Named features out of the middle of a network."""

from detr_backbone.layer_getter.getter import IntermediateLayerGetter

__all__ = ["IntermediateLayerGetter"]
