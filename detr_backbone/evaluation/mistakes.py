"""Kinds of mistakes of a detector, and what each kind costs in AP.

Every false positive at IoU 0.5 has one kind, every object that no detection comes near is missed, and the cost of a
kind is the AP at IoU 0.5 that would be gained if it was fixed and nothing else. Costs do not add up to what is lacking
to 1: fixing two kinds at once may gain more or less than each alone.

Source: TIDE, Bolya et al., arXiv 2008.08115, sections 2.2 and 2.3; where a detection fits two kinds, the one that its
published implementation tries first. That implementation differs in three points: it counts detections on crowds as
mistakes; it lets the better one of a class and a localisation mistake on the same object hide the other even while only
one of the two kinds is fixed; and it takes a class without objects into the mean if it has detections.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.evaluation.analysis import (
    IOU_50,
    overlaps_by_image,
    precision_at_recalls,
    true_and_false_positives,
)
from detr_backbone.evaluation.matching import Matches

MISTAKE_KINDS = {
    "localisation": "overlaps an object of its class, by an IoU of 0.1 to 0.5",
    "class": "overlaps an object of another class by 0.5 or more",
    "duplicate": "overlaps an object of its class by 0.5 or more, which a better detection matches",
    "background": "overlaps no object by 0.1",
    "both": "overlaps an object of another class only, by 0.1 to 0.5",
    "missed": "a false negative that is not the nearest object of a localisation or class mistake",
}
"""Kinds in the order in which they are tried, and the meaning of each."""
FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU from which a box matches, and below which it is on background."""
_INDEX = {kind: index for index, kind in enumerate(MISTAKE_KINDS)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Mistakes:
    """The kinds of all mistakes and their costs.

    Attributes:
        kinds: int64 [D], the index in `MISTAKE_KINDS` of each detection of the `Matches`, -1 for no mistake.
        missed: int64, the missed objects as indices in the `CocoAnnotations`.
        ap50: COCO's AP at IoU 0.5; NaN without objects.
        costs: by kind, the gain of `ap50` if this kind is fixed: a `class` or `localisation` mistake on a false
            negative becomes a true positive, the best one of each object; all others of the kind, and `both`,
            `duplicate` and `background`, vanish; missed objects are no longer counted, and a class of which none is
            left keeps an AP of 0. NaN without objects.
        false_positives: the gain if every false positive vanishes.
        false_negatives: the gain if no false negative is counted.
    """

    kinds: IntArray
    missed: IntArray
    ap50: float
    costs: Mapping[str, float]
    false_positives: float
    false_negatives: float

    def count(self, kind: str, among: BoolArray | None = None) -> int:
        """Return how often a kind occurs, among some of the detections [D]."""
        if kind == "missed":
            return len(self.missed)
        return int(((self.kinds == _INDEX[kind]) & (True if among is None else among)).sum())


def mistakes(matches: Matches) -> Mistakes:
    """Return the kinds of all mistakes, by the IoU of boxes."""
    labels, scores = matches.labels, matches.scores
    object_labels = matches.annotations.labels
    true, false = true_and_false_positives(matches)
    kinds, nearest = _classify(matches, false)
    counted = matches.object_index[~matches.object_ignored[0]]
    detected = np.zeros(len(object_labels), dtype=np.bool_)
    detected[matches.matched[0, IOU_50, true]] = True
    near = detected.copy()
    near[nearest[nearest >= 0]] = True
    missed = counted[~near[counted]]

    classes = len(matches.category_names)
    objects = np.bincount(object_labels[counted], minlength=classes)
    with_objects = np.flatnonzero(objects)
    ap50 = _mean_ap((labels, scores), true, false, objects, with_objects)

    def gain(true: BoolArray, false: BoolArray, objects: IntArray = objects, labels: IntArray = labels) -> float:
        return _mean_ap((labels, scores), true, false, objects, with_objects) - ap50

    costs = {}
    for kind, index in _INDEX.items():
        these = kinds == index
        fixed = _best_of_each(np.flatnonzero(these & (nearest >= 0)), nearest, scores, detected)
        corrected = labels.copy()
        corrected[fixed] = object_labels[nearest[fixed]]
        becomes_true = true.copy()
        becomes_true[fixed] = True
        left = objects - np.bincount(object_labels[missed], minlength=classes) if kind == "missed" else objects
        costs[kind] = gain(becomes_true, false & ~these, left, corrected)
    return Mistakes(
        kinds=kinds,
        missed=missed,
        ap50=ap50,
        costs=costs,
        false_positives=gain(true, np.zeros_like(false)),
        false_negatives=gain(true, false, np.bincount(labels[true], minlength=classes)),
    )


def _classify(matches: Matches, false: BoolArray) -> tuple[IntArray, IntArray]:
    """Return the kind of each false positive, and the nearest object of a localisation or class mistake; else -1."""
    own, other = np.zeros(len(false)), np.zeros(len(false))
    own_object, other_object = np.full(len(false), -1), np.full(len(false), -1)
    for rows, objects, ious in overlaps_by_image(matches):
        same = matches.labels[rows][:, None] == matches.annotations.labels[objects]
        for of_interest, best, nearest in ((same, own, own_object), (~same, other, other_object)):
            overlaps = np.where(of_interest, ious, 0)
            best[rows], nearest[rows] = overlaps.max(axis=1), objects[overlaps.argmax(axis=1)]
    tried = {
        "localisation": (own >= BACKGROUND) & (own < FOREGROUND),
        "class": other >= FOREGROUND,
        "duplicate": own >= FOREGROUND,
        "background": np.maximum(own, other) < BACKGROUND,
        "both": np.ones_like(false),
    }
    kinds = np.select([false & fits for fits in tried.values()], [_INDEX[kind] for kind in tried], -1)
    nearest = np.select([kinds == _INDEX["localisation"], kinds == _INDEX["class"]], [own_object, other_object], -1)
    return kinds, nearest


def _best_of_each(rows: IntArray, nearest: IntArray, scores: FloatArray, detected: BoolArray) -> IntArray:
    """Return, of some detections, the best one for each object that is a false negative."""
    rows = rows[~detected[nearest[rows]]]
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return rows[np.unique(nearest[rows], return_index=True)[1]]


def _mean_ap(
    ranking: tuple[IntArray, FloatArray], true: BoolArray, false: BoolArray, objects: IntArray, classes: IntArray
) -> float:
    """Return the mean AP over `classes` of the true and false positives; 0 for a class without objects."""
    labels, scores = ranking
    order = np.lexsort((-scores, labels))
    order = order[(true | false)[order]]
    starts, ends = (np.searchsorted(labels[order], classes, side) for side in ("left", "right"))
    aps = [
        precision_at_recalls(true[order[start:end]], count).mean() if count else 0
        for start, end, count in zip(starts.tolist(), ends.tolist(), objects[classes].tolist(), strict=True)
    ]
    return float(np.mean(aps)) if aps else float("nan")
