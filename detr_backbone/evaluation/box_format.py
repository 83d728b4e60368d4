"""Boxes that are given in another format than they should be, told by what they would find if they were read so.

A wrong format gives an AP near 0 and no error. Coordinates alone do not prove it: a detector that has learned nothing
may put all its boxes anywhere. So boxes are refused only where their coordinates look like another format, and where
they find at least a tenth of the objects when they are read in it, five times as many as they do as given.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import match

_SHARE_OF_OBJECTS, _TIMES_AS_MANY = 0.1, 5
_SMALL_IMAGE = 16
"""Pixels; in an image whose sides are shorter, a box of one pixel may be right."""


def refuse_other_formats(annotations: CocoAnnotations, detections: Detections, where: str) -> None:
    """Refuse boxes that are shares of their image, scaled to its pixels twice, or corners given as corner and size.

    Args:
        annotations: the ground truth.
        detections: on its images.
        where: what errors call the detections.

    Raises:
        EvaluationError: naming the format, how many objects the boxes find in it, and the conversion.
    """
    for name, fix, boxes in _readings(annotations, detections):
        objects = int((~annotations.is_crowd).sum())
        as_given, as_read = (_found(annotations, replace(detections, boxes=b)) for b in (detections.boxes, boxes))
        if as_read >= max(1, _SHARE_OF_OBJECTS * objects, _TIMES_AS_MANY * as_given):
            low, high = detections.boxes.min(), detections.boxes.max()
            raise EvaluationError(
                f"boxes look like {name} | where: {where} key=boxes | got numbers from {low:.4g} to {high:.4g}, which "
                f"find {as_given} of {objects} objects as they are and {as_read} as {name} | fix: {fix}"
            )


def conversion_of(corners: Tensor) -> str:
    """How to turn boxes [M, 4], of which some end before they start, into what they should be."""
    if corners.min() >= -0.5 and corners.max() <= 1.5:
        return "they look like cxcywh in shares of the image: give what PostProcess makes of a detector's outputs"
    return "they look like xywh or cxcywh: torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')"


def _readings(
    annotations: CocoAnnotations, detections: Detections
) -> Iterator[tuple[str, str, npt.NDArray[np.float64]]]:
    """The formats that the boxes could be in by their coordinates: its name, the conversion, and they as xywh."""
    if not len(detections):
        return
    corner, sides = detections.boxes[:, :2], detections.boxes[:, 2:]
    size = annotations.sizes[detections.image_index][:, ::-1]  # w, h
    if corner.min() >= -0.5 and (corner + sides).max() <= 1.5 and size.min() >= _SMALL_IMAGE:
        yield "shares of the image", "multiply them by its width and height", detections.boxes * np.tile(size, 2)
    outside = ((corner >= size) | (corner + sides <= 0)).any(axis=1)
    if outside.mean() > 0.5:
        fix = "multiply shares by the image's width and height once"
        yield "pixels scaled by the image's size once more", fix, detections.boxes / np.tile(size, 2)
    if (sides >= corner).all():
        yield "x1, y1, x2, y2", "give them as x, y, w, h", np.concatenate([corner, sides - corner], axis=1)


def _found(annotations: CocoAnnotations, detections: Detections) -> int:
    """Objects that some detection of their class overlaps by half."""
    matches = match(annotations, detections)
    return len(np.unique(matches.matched[0, 0][(matches.matched[0, 0] >= 0) & ~matches.ignored[0, 0]]))
