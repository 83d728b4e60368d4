"""What of a box lies in its image."""

from dataclasses import dataclass

import numpy as np

from detr_backbone.coco.columns import Bools, Floats
from detr_backbone.coco.findings import Rows

MOVED_TOLERANCE = 0.01
"""Pixels by which a box may reach outside its image without being counted: what rounding leaves."""
MOVED_PIXELS = 2
MOVED_SHARE = 0.01
"""More than this share of boxes that clipping moves by more than MOVED_PIXELS tells of wrong sizes or formats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clipped:
    """Boxes [N, 4] as xyxy within their images, and what had to be done for that.

    Attributes:
        boxes: float64 [N, 4].
        outside: the box shares nothing with its image.
        without_area: its width or height is 0.
        moved: float64 [N], by how many pixels a side was moved, 0 for boxes outside.
    """

    boxes: Floats
    outside: Bools
    without_area: Bools
    moved: Floats

    @property
    def is_target(self) -> Bools:
        """Whether anything is left of a box [N] to be found."""
        return ~self.outside & ~self.without_area


def clip(boxes: Floats, sizes: Rows) -> Clipped:
    """Clip boxes [N, 4] as xywh to images of `sizes` [N, 2] as (h, w)."""
    with np.errstate(over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.tile(sizes[:, ::-1], 2)
    has_sides = np.all(boxes[:, 2:] > 0, axis=1)
    outside: Bools = has_sides & np.any((corners[:, :2] >= limits[:, :2]) | (corners[:, 2:] <= 0), axis=1)
    inside = corners.clip(0, limits)
    moved = np.where(outside, 0, np.abs(inside - corners).max(axis=1, initial=0))
    without_area: Bools = ~outside & np.any(inside[:, 2:] <= inside[:, :2], axis=1)
    return Clipped(boxes=inside, outside=outside, without_area=without_area, moved=moved)
