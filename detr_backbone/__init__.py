"""The backbone of DETR-style detectors as a component: images of any sizes in; feature levels, masks and positions out.

>>> import torch
>>> backbone = build_backbone(BackboneConfig(name="resnet18", return_layers=("layer2", "layer3", "layer4")))
>>> features, positions = backbone([torch.rand(3, 97, 131), torch.rand(3, 64, 160)])
>>> [level.tensors.shape for level in features]
[torch.Size([2, 128, 13, 20]), torch.Size([2, 256, 7, 10]), torch.Size([2, 512, 4, 5])]
>>> features[-1].sizes, backbone.strides, backbone.channels
(((4, 5), (2, 5)), (8, 16, 32), (128, 256, 512))

Letters in shapes, everywhere in this package: B images, C channels, H W padded pixels, h w cells, N boxes of one image,
Q queries, K classes, P num_pos_feats, L decoder layers or levels. Sizes are (h, w).
"""

from detr_backbone.backbone import Backbone, BackboneBase, BackboneConfig, Joiner, build_backbone, fold_for_inference
from detr_backbone.calibration import calibrate_frozen_batch_norm
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.inspection.describe import describe
from detr_backbone.inspection.table import Description, LayerDescription
from detr_backbone.layer_getter import IntermediateLayerGetter
from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr_backbone.position_encoding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    PositionEncodingConfig,
    build_position_encoding,
)
from detr_backbone.pyramid import PyramidConfig

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BackboneBase",
    "BackboneConfig",
    "Description",
    "FrozenBatchNorm2d",
    "IntermediateLayerGetter",
    "Joiner",
    "LayerDescription",
    "NestedTensor",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
    "PositionEncodingConfig",
    "PyramidConfig",
    "__version__",
    "build_backbone",
    "build_position_encoding",
    "calibrate_frozen_batch_norm",
    "describe",
    "fold_for_inference",
    "nested_tensor_from_tensor_list",
]
