"""Detection of boxes that are given in another format than the evaluator takes.

A wrong format gives an AP near 0 and no error. Coordinates alone do not prove it: an untrained detector may put all its
boxes anywhere. So boxes are refused only where their coordinates look like another format, and where they match at
least a tenth of the objects when they are converted from it, five times as many as they do as given.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.typed_arrays import FloatArray
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import match
from detr_backbone.evaluation.settings import EvaluationSettings

_FRACTION_OF_OBJECTS, _TIMES_AS_MANY = 0.1, 5
_LOOSE = EvaluationSettings(iou_thresholds=(0.5,), area_ranges={})
_SMALL_IMAGE = 16
"""Pixels; in an image with shorter sides, boxes of one pixel are plausible."""


def refuse_other_formats(annotations: CocoAnnotations, detections: Detections, where: str) -> None:
    """Refuse boxes in fractions of their image, in pixels scaled by its size again, or xyxy given as xywh.

    Args:
        annotations: the ground truth.
        detections: on its images.
        where: what errors call the detections.

    Raises:
        EvaluationError: naming the format, how many objects the boxes match in it, and the conversion.
    """
    for name, fix, boxes in _candidates(annotations, detections):
        objects = int((~annotations.is_crowd).sum())
        as_given, converted = (
            _count_matched(annotations, replace(detections, boxes=b)) for b in (detections.boxes, boxes)
        )
        if converted >= max(1, _FRACTION_OF_OBJECTS * objects, _TIMES_AS_MANY * as_given):
            low, high = detections.boxes.min(), detections.boxes.max()
            raise EvaluationError(
                f"boxes look like {name} | where: {where} key=boxes | got numbers from {low:.4g} to {high:.4g}, which "
                f"match {as_given} of {objects} objects as they are and {converted} as {name} | fix: {fix}"
            )


def conversion_of(corners: Tensor) -> str:
    """Return how to convert boxes [M, 4] to xyxy, of which some end before they start."""
    if corners.min() >= -0.5 and corners.max() <= 1.5:
        return "they look like cxcywh in fractions of the image: give what PostProcess makes of a detector's outputs"
    return "they look like xywh or cxcywh: torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')"


def _candidates(annotations: CocoAnnotations, detections: Detections) -> Iterator[tuple[str, str, FloatArray]]:
    """Yield the formats that the coordinates could be in: name, conversion in words, and the converted boxes, xywh."""
    if not len(detections):
        return
    corner, sides = detections.boxes[:, :2], detections.boxes[:, 2:]
    size = annotations.sizes[detections.image_index][:, ::-1]  # w, h
    if corner.min() >= -0.5 and (corner + sides).max() <= 1.5 and size.min() >= _SMALL_IMAGE:
        yield "fractions of the image", "multiply them by its width and height", detections.boxes * np.tile(size, 2)
    outside = ((corner >= size) | (corner + sides <= 0)).any(axis=1)
    if outside.mean() > 0.5:
        fix = "multiply fractions by the image's width and height once"
        yield "pixels scaled by the image's size once more", fix, detections.boxes / np.tile(size, 2)
    if (sides >= corner).all():
        yield "x1, y1, x2, y2", "give them as x, y, w, h", np.concatenate([corner, sides - corner], axis=1)


def _count_matched(annotations: CocoAnnotations, detections: Detections) -> int:
    """Return how many objects a detection of their class matches at IoU 0.5."""
    matches = match(annotations, detections, settings=_LOOSE)
    return len(np.unique(matches.matched[0, 0][(matches.matched[0, 0] >= 0) & ~matches.ignored[0, 0]]))
