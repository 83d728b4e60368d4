"""Reference detectors on the backbone, with their matching, losses and post-processing."""

from detr_backbone.detectors.attention_maps import Samples, record_attention, record_samples
from detr_backbone.detectors.build import build_criterion, build_detector, build_postprocess
from detr_backbone.detectors.config import DetectorConfig
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.deformable_detr import DeformableDETR
from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.denoising import ContrastiveDenoising
from detr_backbone.detectors.detr import DETR
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.detectors.postprocess import PostProcess
from detr_backbone.detectors.transformer import Transformer

__all__ = [
    "DETR",
    "ContrastiveDenoising",
    "DeformableDETR",
    "DeformableTransformer",
    "DetectorConfig",
    "HungarianMatcher",
    "PostProcess",
    "Samples",
    "SetCriterion",
    "Transformer",
    "build_criterion",
    "build_detector",
    "build_postprocess",
    "record_attention",
    "record_samples",
]
