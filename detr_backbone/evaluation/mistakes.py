"""Why detections are wrong, and what each kind of mistake costs in AP.

Every wrong detection at IoU 0.5 has one kind, every object that no detection comes near is missed, and the cost of a
kind is the AP at IoU 0.5 that would be gained if an oracle mended it and nothing else. Costs do not add up to what is
lacking to 1: mending two kinds at once may gain more or less than each alone.

Source: TIDE, Bolya et al., arXiv 2008.08115, sections 2.2 and 2.3; where a detection fits two kinds, the one that its
published implementation tries first. That implementation differs in three points: it counts detections on crowds as
mistakes; it lets the better one of a class and a localisation mistake on the same object hide the other even while only
one of the two kinds is mended; and it takes a class without objects into the mean if it has detections.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.evaluation.analysis import (
    LOOSE,
    Flags,
    Numbers,
    Rows,
    overlaps_by_image,
    precision_at_recalls,
    right_and_wrong,
)
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import Matches

KINDS = {
    "localisation": "overlaps an object of its class, by an IoU of 0.1 to 0.5",
    "class": "overlaps an object of another class by 0.5 or more",
    "duplicate": "overlaps an object of its class by 0.5 or more, which a better detection has found",
    "background": "overlaps no object by 0.1",
    "both": "overlaps an object of another class only, by 0.1 to 0.5",
    "missed": "an object that is not found, nor the nearest to a localisation or class mistake",
}
"""Kinds in the order in which they are tried, and what each means."""
FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU from which a box is in the right place, and below which it is nowhere near."""
_PLACES = {kind: place for place, kind in enumerate(KINDS)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Mistakes:
    """The kinds of all mistakes and their costs.

    Attributes:
        kinds: int64 [D], the place in `KINDS` of each detection of the `Matches`, -1 for one that is not wrong.
        missed: int64, the missed objects as places in the `CocoAnnotations`.
        ap50: COCO's AP at IoU 0.5; NaN without objects.
        costs: by kind, the gain of `ap50` if this kind is mended: a `class` or `localisation` mistake whose object is
            not found becomes right, the best one of each object; all others of the kind, and `both`, `duplicate` and
            `background`, vanish; missed objects are taken out of those to find, and a class of which none is left
            keeps an AP of 0. NaN without objects.
        false_positives: the gain if every wrong detection vanishes.
        false_negatives: the gain if every object that is not found is taken out of those to find.
    """

    kinds: Rows
    missed: Rows
    ap50: float
    costs: Mapping[str, float]
    false_positives: float
    false_negatives: float

    def count(self, kind: str, among: Flags | None = None) -> int:
        """How often a kind occurs, for detections among some [D]."""
        if kind == "missed":
            return len(self.missed)
        return int(((self.kinds == _PLACES[kind]) & (True if among is None else among)).sum())


def mistakes(annotations: CocoAnnotations, detections: Detections, matches: Matches) -> Mistakes:
    """The kinds of all mistakes in some matched detections, by the overlap of boxes."""
    right, wrong = right_and_wrong(matches)
    kinds, nearest = _kinds(annotations, detections, matches, wrong)
    to_find = matches.object_index[~matches.object_ignored[0]]
    found = np.zeros(len(annotations.labels), dtype=np.bool_)
    found[matches.matched[0, LOOSE, right]] = True
    near = found.copy()
    near[nearest[nearest >= 0]] = True
    missed = to_find[~near[to_find]]

    classes = len(matches.category_names)
    objects = np.bincount(annotations.labels[to_find], minlength=classes)
    labels, scores = matches.labels, matches.scores
    there = np.flatnonzero(objects)
    ap50 = _ap((labels, scores), right, wrong, objects, there)

    def gain(right: Flags, wrong: Flags, objects: Rows = objects, labels: Rows = labels) -> float:
        return _ap((labels, scores), right, wrong, objects, there) - ap50

    costs = {}
    for kind, place in _PLACES.items():
        these = kinds == place
        mended = _best_of_each(np.flatnonzero(these & (nearest >= 0)), nearest, scores, found)
        corrected = labels.copy()
        corrected[mended] = annotations.labels[nearest[mended]]
        becomes_right = right.copy()
        becomes_right[mended] = True
        left = objects - np.bincount(annotations.labels[missed], minlength=classes) if kind == "missed" else objects
        costs[kind] = gain(becomes_right, wrong & ~these, left, corrected)
    return Mistakes(
        kinds=kinds,
        missed=missed,
        ap50=ap50,
        costs=costs,
        false_positives=gain(right, np.zeros_like(wrong)),
        false_negatives=gain(right, wrong, np.bincount(labels[right], minlength=classes)),
    )


def _kinds(annotations: CocoAnnotations, detections: Detections, matches: Matches, wrong: Flags) -> tuple[Rows, Rows]:
    """The kind of each wrong detection, and the object that a localisation or class mistake is nearest to; else -1."""
    own, other = np.zeros(len(wrong)), np.zeros(len(wrong))
    own_object, other_object = np.full(len(wrong), -1), np.full(len(wrong), -1)
    for found, objects, ious in overlaps_by_image(annotations, detections, matches):
        same = matches.labels[found][:, None] == annotations.labels[objects]
        for where, best, nearest in ((same, own, own_object), (~same, other, other_object)):
            overlaps = np.where(where, ious, 0)
            best[found], nearest[found] = overlaps.max(axis=1), objects[overlaps.argmax(axis=1)]
    tried = {
        "localisation": (own >= BACKGROUND) & (own < FOREGROUND),
        "class": other >= FOREGROUND,
        "duplicate": own >= FOREGROUND,
        "background": np.maximum(own, other) < BACKGROUND,
        "both": np.ones_like(wrong),
    }
    kinds = np.select([wrong & fits for fits in tried.values()], [_PLACES[kind] for kind in tried], -1)
    nearest = np.select([kinds == _PLACES["localisation"], kinds == _PLACES["class"]], [own_object, other_object], -1)
    return kinds, nearest


def _best_of_each(rows: Rows, nearest: Rows, scores: Numbers, found: Flags) -> Rows:
    """Of some detections the best one for each object that is not found."""
    rows = rows[~found[nearest[rows]]]
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return rows[np.unique(nearest[rows], return_index=True)[1]]


def _ap(ranking: tuple[Rows, Numbers], right: Flags, wrong: Flags, objects: Rows, classes: Rows) -> float:
    """Mean over `classes` of the AP of those detections that are right or wrong; 0 for a class without objects."""
    labels, scores = ranking
    order = np.lexsort((-scores, labels))
    order = order[(right | wrong)[order]]
    starts, ends = (np.searchsorted(labels[order], classes, side) for side in ("left", "right"))
    aps = [
        precision_at_recalls(right[order[start:end]], count).mean() if count else 0
        for start, end, count in zip(starts.tolist(), ends.tolist(), objects[classes].tolist(), strict=True)
    ]
    return float(np.mean(aps)) if aps else float("nan")
