"""Convolutions that do the work of what follows: of frozen BatchNorm, and for inference of sums and ReLUs too."""

from detr_backbone.folding.fold import FoldedConv2d, fold, fold_pairs, prepare_folding, scale_and_shift_together
from detr_backbone.folding.fused import FusedConv2d, fuse
from detr_backbone.folding.fusions import find_fusions

__all__ = [
    "FoldedConv2d",
    "FusedConv2d",
    "find_fusions",
    "fold",
    "fold_pairs",
    "fuse",
    "prepare_folding",
    "scale_and_shift_together",
]
