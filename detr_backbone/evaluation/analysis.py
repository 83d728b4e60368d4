"""What lies behind an AP: curves, the score to work at, confusions, calibration, images that went well or badly.

Everything follows from COCO's matching over all object sizes. Detections that match a crowd, which count neither as
right nor as wrong, are left out throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.evaluation.average_precision import RECALLS
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import IOU_THRESHOLDS, Matches

Rows: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.float64]

LOOSE = 0
"""Place of the IoU threshold 0.5, at which a detection is called right below."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Precision over recall of K classes at T IoU thresholds; NaN for a class without objects.

    Attributes:
        objects: int64 [K], the objects to find.
        precision: float64 [T, 101, K], the highest precision with which a recall of 0, 0.01 .. 1 is reached, 0 where it
            is not; its mean over the recalls is the AP.
        recall: float64 [T, K], reached with all detections.
    """

    objects: Rows
    precision: Numbers
    recall: Numbers

    @property
    def average_precision(self) -> Numbers:
        """float64 [T, K]."""
        aps: Numbers = self.precision.mean(axis=1)
        return aps


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Detections with at least this score, counted over all classes at IoU 0.5; NaN where nothing can be divided."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """How often detections of a score are right; NaN in a bin without detections.

    Attributes:
        edges: float64 [bins + 1], of equal bins over 0 .. 1.
        counts: int64 [bins], detections in the bin.
        scores: float64 [bins], their mean score.
        precision: float64 [bins], the share of them that is right.
        error: the expected calibration error, |precision - score| averaged over the bins by their counts.
    """

    edges: Numbers
    counts: Rows
    scores: Numbers
    precision: Numbers
    error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageScores:
    """What went right and wrong in each of I images.

    Attributes:
        right: int64 [I], objects that were found.
        wrong: int64 [I], detections that found none.
        missed: int64 [I], objects that were not found.
    """

    right: Rows
    wrong: Rows
    missed: Rows

    @property
    def f1(self) -> Numbers:
        """float64 [I], 2 right / (2 right + wrong + missed); NaN where there is nothing to find and nothing found."""
        with np.errstate(invalid="ignore"):
            return 2 * self.right / (2 * self.right + self.wrong + self.missed)

    def ranked(self) -> Rows:
        """Images from the worst to the best, without those of which there is nothing to say.

        By F1; of equal ones the image with more mistakes is worse, then the one with more found is better.
        """
        order = np.lexsort((self.right, -self.wrong - self.missed, self.f1))
        return order[~np.isnan(self.f1[order])]


def precision_at_recalls(right: Flags, objects: int) -> Numbers:
    """The highest precision with which each of the 101 recalls is reached, 0 where it is not.

    Source: pycocotools, whose numbers these are to the last bit.

    Args:
        right: bool [D], of detections that count, best first.
        objects: to find, at least one.

    >>> curve = precision_at_recalls(np.array([True, False, True]), 4)
    >>> curve[[0, 25, 26, 50, 51]].round(3).tolist()
    [1.0, 1.0, 0.667, 0.667, 0.0]
    """
    found = right.cumsum()
    seen = found + (~right).cumsum() + np.spacing(1)
    envelope = np.maximum.accumulate((found / seen)[::-1])[::-1]
    return np.append(envelope, 0)[np.searchsorted(found / objects, RECALLS)]


def curves(matches: Matches) -> Curves:
    """The curves of every class at every threshold."""
    classes = len(matches.category_names)
    objects = np.bincount(matches.object_labels[~matches.object_ignored[0]], minlength=classes)
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), classes), np.nan)
    recall = np.full((len(IOU_THRESHOLDS), classes), np.nan)
    for label in np.flatnonzero(objects).tolist():
        rows = matches.class_slice(label)
        for threshold in range(len(IOU_THRESHOLDS)):
            counted = ~matches.ignored[0, threshold, rows]
            right = matches.matched[0, threshold, rows][counted] >= 0
            precision[threshold, :, label] = precision_at_recalls(right, int(objects[label]))
            recall[threshold, label] = right.sum() / objects[label]
    return Curves(objects=objects, precision=precision, recall=recall)


def right_and_wrong(matches: Matches, *, score: float = -np.inf) -> tuple[Flags, Flags]:
    """Which detections, bool [D], find an object at IoU 0.5, and which find none; both with at least this score."""
    counted = ~matches.ignored[0, LOOSE] & (matches.scores >= score)
    matched = matches.matched[0, LOOSE] >= 0
    return counted & matched, counted & ~matched


def operating_point(matches: Matches) -> OperatingPoint:
    """The score at which F1, taken over all classes together, is highest; 0.5 where no detection is right."""
    right, wrong = right_and_wrong(matches)
    objects = int((~matches.object_ignored[0]).sum())
    order = np.argsort(-matches.scores, kind="stable")
    order = order[(right | wrong)[order]]
    scores, found = matches.scores[order], right[order].cumsum()
    last = np.append(scores[1:] < scores[:-1], True)[: len(scores)]  # detections of one score count together
    f1 = np.where(last, 2 * found / (np.arange(len(found)) + 1 + max(objects, 1)), 0)
    if not f1.any():
        kept = int((scores >= 0.5).sum())
        nothing = np.float64(0)
        with np.errstate(invalid="ignore"):
            return OperatingPoint(
                score=0.5, precision=float(nothing / kept), recall=float(nothing / objects), f1=float(nothing / objects)
            )
    best = int(f1.argmax())
    return OperatingPoint(
        score=float(scores[best]),
        precision=float(found[best] / (best + 1)),
        recall=float(found[best] / objects),
        f1=float(f1[best]),
    )


def confusion(annotations: CocoAnnotations, detections: Detections, matches: Matches, *, score: float) -> Rows:
    """How often an object of a class is found as another: int64 [K + 1, K + 1], truth in rows, found in columns.

    What COCO's matching at IoU 0.5 pairs stands on the diagonal. Of what is left, each detection, best first, takes the
    free object of any class that it overlaps most, if by 0.5. The last row counts detections that find nothing, the
    last column objects that are not found.

    Args:
        annotations: the ground truth.
        detections: what was matched to it.
        matches: how.
        score: the least score of a detection.
    """
    classes = len(matches.category_names)
    right, wrong = right_and_wrong(matches, score=score)
    truth = np.where(right, matches.labels, classes)
    taken = np.zeros(len(annotations.labels), dtype=np.bool_)
    taken[matches.matched[0, LOOSE, right]] = True
    for found, objects, ious in overlaps_by_image(annotations, detections, matches):
        for place in np.flatnonzero(wrong[found] & (ious >= IOU_THRESHOLDS[LOOSE]).any(axis=1)).tolist():
            free = np.where(taken[objects], 0, ious[place])
            best = int(free.argmax())
            if free[best] >= IOU_THRESHOLDS[LOOSE]:
                taken[objects[best]] = True
                truth[found[place]] = annotations.labels[objects[best]]
    to_find = matches.object_index[~matches.object_ignored[0]]
    missed = annotations.labels[to_find[~taken[to_find]]]
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    np.add.at(counts, (truth[right | wrong], matches.labels[right | wrong]), 1)
    np.add.at(counts, (missed, classes), 1)
    return counts


def calibration(matches: Matches, *, bins: int = 10) -> Calibration | None:
    """How far scores are from the share of right detections at IoU 0.5; None unless all scores lie in 0 .. 1.

    Source: Guo et al., arXiv 1706.04599, equations 1 to 3, with precision in place of accuracy as for detectors in
    Küppers et al., arXiv 2004.13546.
    """
    right, wrong = right_and_wrong(matches)
    scores, right = matches.scores[right | wrong], right[right | wrong]
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return None
    bin_of = np.minimum((scores * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_of, weights=scores, minlength=bins) / counts
        precision = np.bincount(bin_of, weights=right, minlength=bins) / counts
    error = float(np.nansum(np.abs(precision - mean) * counts) / len(scores))
    return Calibration(edges=np.linspace(0, 1, bins + 1), counts=counts, scores=mean, precision=precision, error=error)


def image_scores(matches: Matches, *, score: float) -> ImageScores:
    """What is right and wrong in each image when detections of at least this score count."""
    images = len(matches.image_ids)
    right, wrong = (
        np.bincount(matches.image_index[rows], minlength=images) for rows in right_and_wrong(matches, score=score)
    )
    objects = np.bincount(matches.object_image_index[~matches.object_ignored[0]], minlength=images)
    return ImageScores(right=right, wrong=wrong, missed=objects - right)


def overlaps_by_image(
    annotations: CocoAnnotations, detections: Detections, matches: Matches
) -> Iterator[tuple[Rows, Rows, Numbers]]:
    """Of each image that has both: its detections, best first, its objects of all classes but crowds, their IoU [D, N].

    Detections are given as their places in `matches`, objects as theirs in `annotations`.
    """
    is_object = ~matches.object_ignored[0]
    order = np.argsort(matches.object_image_index[is_object], kind="stable")
    objects, object_images = (values[is_object][order] for values in (matches.object_index, matches.object_image_index))
    found = np.lexsort((-matches.scores, matches.image_index))
    images = matches.image_index[found]
    both = np.intersect1d(images, object_images)
    bounds = [np.searchsorted(of, both, side).tolist() for of in (images, object_images) for side in ("left", "right")]
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        rows, those = found[first:last], objects[first_object:last_object]
        boxes, object_boxes = detections.boxes[matches.detection_index[rows]], annotations.boxes[those]
        yield rows, those, rle.iou(boxes, object_boxes, np.zeros(len(those), dtype=np.uint8))
