"""COCO's evaluation settings: IoU thresholds, ranges of object areas, detections per image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from detr_backbone.coco.typed_arrays import FloatArray
from detr_backbone.errors import ConfigError

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
COCO_AREAS: Mapping[str, tuple[float, float]] = {
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e5**2),
}
ALL_AREAS = (0.0, 1e5**2)
"""Least and largest area of an object that counts at all, in square pixels."""


class Stat(NamedTuple):
    """One number of a result: an average precision or an average recall of some objects and detections."""

    name: str
    is_recall: bool
    area: int
    """Index in `EvaluationSettings.areas`."""
    threshold: int | None
    """Index in `EvaluationSettings.thresholds`; None averages over all of them."""
    max_dets: int


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The settings of an evaluation. The defaults are COCO's.

    Source: https://cocodataset.org/#detection-eval

    Args:
        iou_thresholds: IoU from which a detection matches an object, ascending, above 0 and at most 1. AP and recall
            are averaged over them.
        area_ranges: least and largest area of objects in square pixels, both included, by the name that results have.
        max_dets: detections per image and class that count, best first, ascending: recall is given for each number,
            all other results for the last one.

    Raises:
        ConfigError: a value is out of range.
    """

    iou_thresholds: tuple[float, ...] = COCO_THRESHOLDS
    area_ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(COCO_AREAS))
    max_dets: tuple[int, ...] = (1, 10, 100)

    def __post_init__(self) -> None:
        for key, limit in (("iou_thresholds", 1), ("max_dets", 2**31)):
            values = getattr(self, key)
            if not values or list(values) != sorted(set(values)) or values[0] <= 0 or values[-1] > limit:
                raise ConfigError(f"`{key}` must ascend, above 0 and at most {limit}, got {values}")
        for name, (least, most) in self.area_ranges.items():
            if not 0 <= least < most or name == "all" or name.isdecimal():
                raise ConfigError(
                    "`area_ranges` must be ranges of square pixels by a name other than all or a number, got "
                    f"{name}: {least} to {most}"
                )

    @property
    def thresholds(self) -> FloatArray:
        """The IoU thresholds, float64 [T]."""
        return np.array(self.iou_thresholds)

    @property
    def areas(self) -> FloatArray:
        """Least and largest area of each range, float64 [A, 2]; the first one is that of all objects."""
        return np.array([ALL_AREAS, *self.area_ranges.values()], dtype=np.float64)

    @property
    def stats(self) -> tuple[Stat, ...]:
        """The results in COCO's order, with AP at 0.5 and 0.75; other thresholds than COCO's have an AP each.

        >>> EvaluationSettings().stat_names  # doctest: +NORMALIZE_WHITESPACE
        ('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
         'AR_1', 'AR_10', 'AR_100', 'AR_small', 'AR_medium', 'AR_large')
        >>> EvaluationSettings(iou_thresholds=(0.3, 0.5), area_ranges={}, max_dets=(300,)).stat_names
        ('AP', 'AP30', 'AP50', 'AR_300')
        """
        most = self.max_dets[-1]
        single = (0.5, 0.75) if self.iou_thresholds == COCO_THRESHOLDS else self.iou_thresholds
        at = [(f"AP{100 * value:g}", self.iou_thresholds.index(value)) for value in single]
        areas = list(enumerate(self.area_ranges, start=1))
        return (
            Stat("AP", False, 0, None, most),
            *(Stat(name, False, 0, index, most) for name, index in at),
            *(Stat(f"AP_{name}", False, area, None, most) for area, name in areas),
            *(Stat(f"AR_{count}", True, 0, None, count) for count in self.max_dets),
            *(Stat(f"AR_{name}", True, area, None, most) for area, name in areas),
        )

    @property
    def stat_names(self) -> tuple[str, ...]:
        """The names of `stats`."""
        return tuple(stat.name for stat in self.stats)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON file holds them."""
        return {
            "iou_thresholds": list(self.iou_thresholds),
            "area_ranges": {name: list(limits) for name, limits in self.area_ranges.items()},
            "max_dets": list(self.max_dets),
        }

    def __str__(self) -> str:
        """Return them in words.

        >>> print(EvaluationSettings(iou_thresholds=(0.5,), area_ranges={"tiny": (0, 256)}, max_dets=(1, 300)))
        IoU 0.5, areas tiny 0 to 256, at most 1, 300 detections
        """
        thresholds = ", ".join(f"{value:g}" for value in self.iou_thresholds)
        areas = ", ".join(f"{name} {least:g} to {most:g}" for name, (least, most) in self.area_ranges.items())
        return f"IoU {thresholds}, areas {areas or 'all'}, at most {', '.join(map(str, self.max_dets))} detections"


COCO_SETTINGS = EvaluationSettings()
