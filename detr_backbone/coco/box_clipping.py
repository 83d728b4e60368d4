"""Boxes clipped to their images."""

from dataclasses import dataclass

import numpy as np

from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray

MOVED_TOLERANCE = 0.01
"""Pixels by which a box may reach outside its image without being counted: the size of rounding errors."""
MOVED_PIXELS = 2
MOVED_FRACTION = 0.01
"""A larger fraction of boxes that clipping moves by more than MOVED_PIXELS points to wrong sizes or formats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clipped:
    """Boxes as xyxy within their images, and how clipping changed them.

    Attributes:
        boxes: float64 [N, 4], xyxy in pixels.
        outside: bool [N], True for boxes that do not overlap their image.
        without_area: bool [N], True for a width or height of 0.
        moved: float64 [N], the most pixels by which a side was moved, 0 for boxes outside.
    """

    boxes: FloatArray
    outside: BoolArray
    without_area: BoolArray
    moved: FloatArray

    @property
    def is_target(self) -> BoolArray:
        """True for the boxes of which an area is left to train on, bool [N]."""
        return ~self.outside & ~self.without_area


def clip(boxes: FloatArray, sizes: IntArray) -> Clipped:
    """Return boxes [N, 4], given as xywh in pixels, clipped to images of `sizes` [N, 2], (h, w)."""
    with np.errstate(over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.tile(sizes[:, ::-1], 2)
    has_sides = np.all(boxes[:, 2:] > 0, axis=1)
    outside = has_sides & np.any((corners[:, :2] >= limits[:, :2]) | (corners[:, 2:] <= 0), axis=1)
    inside = corners.clip(0, limits)
    moved = np.where(outside, 0, np.abs(inside - corners).max(axis=1, initial=0))
    without_area = ~outside & np.any(inside[:, 2:] <= inside[:, :2], axis=1)
    return Clipped(boxes=inside, outside=outside, without_area=without_area, moved=moved)
