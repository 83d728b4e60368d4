"""The content of a report as plain data, from which the page, the tables and the JSON file are written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from detr_backbone.coco.typed_arrays import FloatArray, IntArray
from detr_backbone.evaluation.analysis import (
    OperatingPoint,
    calibration,
    confusion,
    curves,
    image_scores,
    operating_point,
    true_and_false_positives,
)
from detr_backbone.evaluation.average_precision import RECALLS, average_precision
from detr_backbone.evaluation.intervals import Interval, Intervals
from detr_backbone.evaluation.matching import Matches
from detr_backbone.evaluation.mistakes import MISTAKE_KINDS, Mistakes
from detr_backbone.evaluation.result import UNIT

Summary: TypeAlias = dict[str, Any]
"""Dicts, lists, strings, numbers, and None for a number that does not exist."""

MEANINGS = {
    "AP": "average precision, mean over the IoU thresholds 0.50 to 0.95 and the classes",
    "AP50": "at IoU 0.50: detected, with a box that may be loose",
    "AP75": "at IoU 0.75: detected, with a tight box",
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
"""In a confusion matrix: no object, or no detection."""


def summarise(
    matches: Matches,
    mistakes: Mistakes,
    *,
    title: str,
    origin: Mapping[str, str],
    config: str = "",
    intervals: Intervals | None = None,
) -> Summary:
    """Return the numbers of a report; precision, recall, F1 and AP between 0 and 1.

    Args:
        matches: with COCO's settings.
        mistakes: of the detections.
        title: of the report.
        origin: where the numbers come from, by name.
        config: of the detector, as text.
        intervals: of the numbers.
    """
    annotations, areas = matches.annotations, matches.settings.areas
    numbers = average_precision(matches)
    low_high = (None, None) if intervals is None else (intervals.stats, intervals.per_class)
    stats, aps = (
        {
            name: _with_interval(value, of_numbers, name)
            for name, value in zip(names, values[:, 0].tolist(), strict=True)
        }
        for names, values, of_numbers in zip(
            (matches.settings.stat_names, annotations.category_names),
            (numbers.stats, numbers.per_class),
            low_high,
            strict=True,
        )
    )
    curve, point = curves(matches), operating_point(matches)
    scores = image_scores(matches, score=point.score)
    calibrated = calibration(matches)
    objects = ~matches.object_ignored
    summary = {
        "title": title,
        "unit": UNIT,
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
                "objects": int(in_range.sum()),
                "AP": stats[f"AP_{name}"],
                "AR": stats[f"AR_{name}"],
            }
            for name, (least, most), in_range in zip(
                matches.settings.area_ranges, areas[1:].tolist(), objects[1:], strict=True
            )
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
        "mistakes": _mistakes(mistakes, matches, point),
        "confusion": _confusion(confusion(matches, score=point.score), annotations.category_names),
        "calibration": None if calibrated is None else vars(calibrated),
        "ranking": [
            {
                "image_id": int(matches.image_ids[index]),
                "file_name": str(
                    annotations.file_names[np.searchsorted(annotations.image_ids, matches.image_ids[index])]
                ),
                "true_positives": int(scores.true_positives[index]),
                "false_positives": int(scores.false_positives[index]),
                "false_negatives": int(scores.false_negatives[index]),
                "f1": float(scores.f1[index]),
            }
            for index in scores.ranked().tolist()
        ],
        "origin": dict(origin),
        "config": config,
    }
    return _to_json(summary)


def _mistakes(mistakes: Mistakes, matches: Matches, point: OperatingPoint) -> Summary:
    true, false = true_and_false_positives(matches, score=point.score)
    return {
        "ap50": mistakes.ap50,
        "kinds": {
            kind: {
                "count": mistakes.count(kind),
                "count_at_operating_point": None if kind == "missed" else mistakes.count(kind, true | false),
                "cost": mistakes.costs[kind],
            }
            for kind in MISTAKE_KINDS
        },
        "false_positives": mistakes.false_positives,
        "false_negatives": mistakes.false_negatives,
    }


def _confusion(counts: IntArray, category_names: Sequence[str]) -> list[Summary]:
    """Return the cells that are not empty, most frequent first."""
    names = [*category_names, BACKGROUND]
    truth, predicted = counts.nonzero()
    order = np.argsort(-counts[truth, predicted], kind="stable").tolist()
    return [
        {"truth": names[truth[i]], "predicted": names[predicted[i]], "count": int(counts[truth[i], predicted[i]])}
        for i in order
    ]


def _mean_over_classes(values: FloatArray) -> FloatArray:
    """Return the mean of [101, K] over the classes that have objects; NaN if none has."""
    defined = ~np.isnan(values[0])
    return values[:, defined].mean(axis=1) if defined.any() else np.full(len(values), np.nan)


def _with_interval(value: float, intervals: Mapping[str, Interval] | None, name: str) -> Summary:
    low, high = (None, None) if intervals is None else (intervals[name].low, intervals[name].high)
    return {"value": value, "low": low, "high": high}


def _to_json(value: Any) -> Any:
    """Return what JSON can hold: lists for arrays, None for NaN."""
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value
