"""Pictures of what a network holds and of what a detector finds; from tensors to PIL images."""

from detr_backbone.visualize.attention import draw_attention, draw_sampling_points
from detr_backbone.visualize.detections import COLORS, draw_detections
from detr_backbone.visualize.features import draw_feature_maps, draw_levels

__all__ = [
    "COLORS",
    "draw_attention",
    "draw_detections",
    "draw_feature_maps",
    "draw_levels",
    "draw_sampling_points",
]
