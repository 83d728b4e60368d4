"""Everything that a report says, as plain data: the page, the tables and the JSON file all show these numbers."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.evaluation.analysis import (
    OperatingPoint,
    calibration,
    confusion,
    curves,
    image_scores,
    operating_point,
    right_and_wrong,
)
from detr_backbone.evaluation.average_precision import RECALLS, STATS, average_precision
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.intervals import Interval, Intervals
from detr_backbone.evaluation.matching import AREA_RANGES, AREAS, Matches
from detr_backbone.evaluation.mistakes import KINDS, Mistakes

Summary: TypeAlias = dict[str, Any]
"""Dicts, lists, strings, numbers, and None for a number that does not exist."""

MEANINGS = {
    "AP": "average precision, mean over the IoU thresholds 0.50 to 0.95 and the classes",
    "AP50": "at IoU 0.50: found, though perhaps not tightly",
    "AP75": "at IoU 0.75: found, with a tight box",
    "AP_small": "of objects up to 32² pixels",
    "AP_medium": "of objects of 32² to 96² pixels",
    "AP_large": "of objects from 96² pixels",
    "AR_1": "recall with one detection of each class in each image, mean over the IoU thresholds",
    "AR_10": "with ten",
    "AR_100": "with a hundred",
    "AR_small": "with a hundred, of objects up to 32² pixels",
    "AR_medium": "of objects of 32² to 96² pixels",
    "AR_large": "of objects from 96² pixels",
}
BACKGROUND = "(background)"
"""In a confusion: nothing there, or nothing found."""


def summarise(
    annotations: CocoAnnotations,
    detections: Detections,
    matches: Matches,
    found: Mistakes,
    *,
    title: str,
    origin: Mapping[str, str],
    config: str = "",
    intervals: Intervals | None = None,
) -> Summary:
    """The numbers of a report, between 0 and 1 where they are shares.

    Args:
        annotations: the ground truth.
        detections: all of them.
        matches: of the two.
        found: the mistakes in them.
        title: of the report.
        origin: where the numbers come from, by name.
        config: of the detector, as text.
        intervals: of the numbers.
    """
    numbers = average_precision(matches)
    low_high = (None, None) if intervals is None else (intervals.stats, intervals.per_class)
    stats, aps = (
        {name: _interval(value, around, name) for name, value in zip(names, values[:, 0].tolist(), strict=True)}
        for names, values, around in zip(
            (STATS, annotations.category_names), (numbers.stats, numbers.per_class), low_high, strict=True
        )
    )
    curve, point = curves(matches), operating_point(matches)
    scores = image_scores(matches, score=point.score)
    calibrated = calibration(matches)
    objects = ~matches.object_ignored
    summary = {
        "title": title,
        "images": len(matches.image_ids),
        "objects": int(objects[0].sum()),
        "crowds": int(matches.object_ignored[0].sum()),
        "detections": len(matches.scores),
        "level": None if intervals is None else intervals.level,
        "resamples": None if intervals is None else intervals.resamples,
        "stats": stats,
        "classes": [
            {
                "name": name,
                "category_id": category_id,
                "objects": int(curve.objects[label]),
                "AP": aps[name],
                "AP50": curve.average_precision[0, label],
                "AP75": curve.average_precision[5, label],
                "AR": curve.recall[:, label].mean(),
            }
            for label, (category_id, name) in enumerate(
                zip(annotations.category_ids, annotations.category_names, strict=True)
            )
        ],
        "sizes": [
            {
                "name": name,
                "least_area": least,
                "most_area": most,
                "objects": int(there.sum()),
                "AP": stats[f"AP_{name}"],
                "AR": stats[f"AR_{name}"],
            }
            for name, (least, most), there in zip(AREAS[1:], AREA_RANGES[1:].tolist(), objects[1:], strict=True)
        ],
        "curves": {
            "recall": RECALLS,
            "precision": {
                name: {"mean": _mean_over_classes(values), "classes": values.T.round(4)}
                for name, values in (
                    ("0.50", curve.precision[0]),
                    ("0.75", curve.precision[5]),
                    ("0.50:0.95", curve.precision.mean(axis=0)),
                )
            },
        },
        "operating_point": vars(point),
        "mistakes": _mistakes(found, matches, point),
        "confusion": _confusion(confusion(annotations, detections, matches, score=point.score), annotations),
        "calibration": None if calibrated is None else vars(calibrated),
        "ranking": [
            {
                "image_id": int(matches.image_ids[place]),
                "file_name": str(
                    annotations.file_names[np.searchsorted(annotations.image_ids, matches.image_ids[place])]
                ),
                "right": int(scores.right[place]),
                "wrong": int(scores.wrong[place]),
                "missed": int(scores.missed[place]),
                "f1": float(scores.f1[place]),
            }
            for place in scores.ranked().tolist()
        ],
        "origin": dict(origin),
        "config": config,
    }
    plain: Summary = _plain(summary)
    return plain


def _mistakes(found: Mistakes, matches: Matches, point: OperatingPoint) -> Summary:
    right, wrong = right_and_wrong(matches, score=point.score)
    return {
        "ap50": found.ap50,
        "kinds": {
            kind: {
                "count": found.count(kind),
                "count_at_operating_point": None if kind == "missed" else found.count(kind, right | wrong),
                "cost": found.costs[kind],
            }
            for kind in KINDS
        },
        "false_positives": found.false_positives,
        "false_negatives": found.false_negatives,
    }


def _confusion(counts: npt.NDArray[np.int64], annotations: CocoAnnotations) -> list[Summary]:
    """The cells that are not empty, most frequent first."""
    names = [*annotations.category_names, BACKGROUND]
    truth, found = counts.nonzero()
    order = np.argsort(-counts[truth, found], kind="stable").tolist()
    return [
        {"truth": names[truth[i]], "found": names[found[i]], "count": int(counts[truth[i], found[i]])} for i in order
    ]


def _mean_over_classes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of [101, K] over the classes that have objects; NaN if none has."""
    there = ~np.isnan(values[0])
    mean: npt.NDArray[np.float64] = values[:, there].mean(axis=1) if there.any() else np.full(len(values), np.nan)
    return mean


def _interval(value: float, intervals: Mapping[str, Interval] | None, name: str) -> Summary:
    low, high = (None, None) if intervals is None else (intervals[name].low, intervals[name].high)
    return {"value": value, "low": low, "high": high}


def _plain(value: Any) -> Any:
    """What JSON can hold: lists for arrays, None for NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value
