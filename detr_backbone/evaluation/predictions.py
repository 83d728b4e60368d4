"""The predictions for one image, checked before any AP is computed from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr_backbone.coco.segmentations import EncodedMask
from detr_backbone.coco.typed_arrays import FloatArray, IntArray
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.box_format import conversion_of
from detr_backbone.evaluation.detections import refuse_unknown
from detr_backbone.evaluation.masks import encoded_masks
from detr_backbone.evaluation.matching import IouType


class ImageDetections(NamedTuple):
    """The detections in one image; its fields are those of `Detections`."""

    labels: IntArray
    scores: FloatArray
    boxes: FloatArray
    masks: list[EncodedMask] | None


def check_prediction(
    fields: Mapping[str, Any],
    *,
    category_ids: tuple[int, ...],
    size: tuple[int, int],
    iou_type: IouType,
    where: str,
) -> ImageDetections:
    """Return the detections in an image from fields that `CocoEvaluator.update` takes.

    Args:
        fields: `scores`, `labels`, and `boxes` or `masks`.
        category_ids: the category id of each label, ascending.
        size: (h, w) of the image.
        iou_type: whether boxes or masks are needed.
        where: what errors call the image.

    Raises:
        EvaluationError: a field is missing, of another length, not finite, or not what it should be.
    """
    regions = "boxes" if iou_type == "bbox" else "masks"
    if missing := [key for key in ("scores", "labels", regions) if key not in fields]:
        raise EvaluationError(f"prediction lacks {missing} | where: {where} key={missing[0]} | got {sorted(fields)}")
    scores, labels = (fields[key].detach().cpu() for key in ("scores", "labels"))
    count = scores.numel()
    _check_tensor(scores, [count], f"{where} key=scores")
    _check_tensor(labels, [count], f"{where} key=labels")
    if labels.is_floating_point():
        raise EvaluationError(f"category ids are not integers | where: {where} key=labels | got {labels.dtype}")
    refuse_unknown(labels.tolist(), category_ids, "labels", where)
    boxes, masks = np.zeros((count, 4)), None
    if iou_type == "segm":
        masks, boxes = encoded_masks(fields["masks"], count=count, size=size, where=f"{where} key=masks")
    else:
        corners = fields["boxes"].detach().cpu()
        _check_tensor(corners, [count, 4], f"{where} key=boxes")
        boxes = _xywh(corners.double(), f"{where} key=boxes")
    indices = np.searchsorted(category_ids, labels.numpy())
    return ImageDetections(indices, scores.double().numpy(), boxes, masks)


def _check_tensor(tensor: Tensor, shape: list[int], where: str) -> None:
    if list(tensor.shape) != shape:
        raise EvaluationError(f"lengths do not fit | where: {where} | got {list(tensor.shape)} expected {shape}")
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise EvaluationError(f"numbers are not finite | where: {where} | got {bad} of {tensor.numel()}")


def _xywh(corners: Tensor, where: str) -> FloatArray:
    """Return boxes [M, 4] given as xyxy as xywh."""
    sides = corners[:, 2:] - corners[:, :2]
    if invalid := (sides < 0).any(dim=1).nonzero().flatten().tolist():
        raise EvaluationError(
            f"box ends before it starts | where: {where} index={invalid[0]} | got {corners[invalid[0]].tolist()}, so "
            f"do {len(invalid)} of {len(corners)} boxes of the image, expected x1 <= x2 and y1 <= y2 | "
            f"fix: {conversion_of(corners)}"
        )
    return torch.cat([corners[:, :2], sides], dim=1).numpy()
