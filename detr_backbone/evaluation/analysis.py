"""Curves, operating point, confusion matrix, calibration and per-image scores: what an AP is made of.

Everything follows from COCO's matching over all object areas. Detections that match a crowd are neither true nor false
positives and are left out throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle

from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.evaluation.average_precision import RECALLS
from detr_backbone.evaluation.matching import Matches

IOU_50 = 0
"""Index of the IoU threshold 0.5 in COCO's settings, at which true and false positives are told apart here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Precision over recall of K classes at T IoU thresholds; NaN for a class without objects.

    Attributes:
        objects: int64 [K], the number of objects.
        precision: float64 [T, 101, K], the highest precision with which a recall of 0, 0.01 .. 1 is reached, 0 where it
            is not; its mean over the recalls is the AP.
        recall: float64 [T, K], of all detections.
    """

    objects: IntArray
    precision: FloatArray
    recall: FloatArray

    @property
    def average_precision(self) -> FloatArray:
        """AP of each class at each threshold, float64 [T, K]."""
        return self.precision.mean(axis=1)


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Detections with at least this score, counted over all classes at IoU 0.5; NaN for a division by 0."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Precision of detections by their score; NaN in a bin without detections.

    Attributes:
        edges: float64 [bins + 1], of equal bins over 0 .. 1.
        counts: int64 [bins], detections in the bin.
        scores: float64 [bins], their mean score.
        precision: float64 [bins], the fraction of true positives among them.
        error: the expected calibration error, |precision - score| averaged over the bins by their counts.
    """

    edges: FloatArray
    counts: IntArray
    scores: FloatArray
    precision: FloatArray
    error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageScores:
    """True positives, false positives and false negatives in each of I images, int64 [I] each."""

    true_positives: IntArray
    false_positives: IntArray
    false_negatives: IntArray

    @property
    def f1(self) -> FloatArray:
        """F1 of each image, float64 [I], 2 TP / (2 TP + FP + FN); NaN without objects and detections."""
        with np.errstate(invalid="ignore"):
            return 2 * self.true_positives / (2 * self.true_positives + self.false_positives + self.false_negatives)

    def ranked(self) -> IntArray:
        """Return the images from the worst to the best, without those that have no F1.

        Of equal F1 the image with more mistakes is worse, then the one with fewer true positives.
        """
        order = np.lexsort((self.true_positives, -self.false_positives - self.false_negatives, self.f1))
        return order[~np.isnan(self.f1[order])]


def precision_at_recalls(true_positive: BoolArray, objects: int) -> FloatArray:
    """Return the highest precision with which each of the 101 recalls is reached, 0 where it is not: float64 [101].

    Source: pycocotools, whose numbers these are to the last bit.

    Args:
        true_positive: bool [D], of the true and false positives, best first.
        objects: the number of objects, at least one.

    >>> curve = precision_at_recalls(np.array([True, False, True]), 4)
    >>> curve[[0, 25, 26, 50, 51]].round(3).tolist()
    [1.0, 1.0, 0.667, 0.667, 0.0]
    """
    true_positives = true_positive.cumsum()
    positives = true_positives + (~true_positive).cumsum() + np.spacing(1)
    envelope = np.maximum.accumulate((true_positives / positives)[::-1])[::-1]
    return np.append(envelope, 0)[np.searchsorted(true_positives / objects, RECALLS)]


def curves(matches: Matches) -> Curves:
    """Return the curves of every class at every threshold."""
    classes = len(matches.category_names)
    thresholds = len(matches.settings.iou_thresholds)
    objects = np.bincount(matches.object_labels[~matches.object_ignored[0]], minlength=classes)
    precision = np.full((thresholds, len(RECALLS), classes), np.nan)
    recall = np.full((thresholds, classes), np.nan)
    for label in np.flatnonzero(objects).tolist():
        rows = matches.class_slice(label)
        for threshold in range(thresholds):
            counted = ~matches.ignored[0, threshold, rows]
            true_positive = matches.matched[0, threshold, rows][counted] >= 0
            precision[threshold, :, label] = precision_at_recalls(true_positive, int(objects[label]))
            recall[threshold, label] = true_positive.sum() / objects[label]
    return Curves(objects=objects, precision=precision, recall=recall)


def true_and_false_positives(matches: Matches, *, score: float = -np.inf) -> tuple[BoolArray, BoolArray]:
    """Return the true positives at IoU 0.5 and the false ones, bool [D] each; both with at least this score."""
    counted = ~matches.ignored[0, IOU_50] & (matches.scores >= score)
    matched = matches.matched[0, IOU_50] >= 0
    return counted & matched, counted & ~matched


def operating_point(matches: Matches) -> OperatingPoint:
    """Return the score with the highest F1 over all classes together; 0.5 without true positives."""
    true, false = true_and_false_positives(matches)
    objects = int((~matches.object_ignored[0]).sum())
    order = np.argsort(-matches.scores, kind="stable")
    order = order[(true | false)[order]]
    scores, true_positives = matches.scores[order], true[order].cumsum()
    last = np.append(scores[1:] < scores[:-1], True)[: len(scores)]  # detections of one score count together
    f1 = np.where(last, 2 * true_positives / (np.arange(len(order)) + 1 + max(objects, 1)), 0)
    if not f1.any():
        positives = int((scores >= 0.5).sum())
        zero = np.float64(0)
        with np.errstate(invalid="ignore"):
            return OperatingPoint(
                score=0.5, precision=float(zero / positives), recall=float(zero / objects), f1=float(zero / objects)
            )
    best = int(f1.argmax())
    return OperatingPoint(
        score=float(scores[best]),
        precision=float(true_positives[best] / (best + 1)),
        recall=float(true_positives[best] / objects),
        f1=float(f1[best]),
    )


def confusion(matches: Matches, *, score: float) -> IntArray:
    """Return the confusion matrix, int64 [K + 1, K + 1], classes of objects in rows, of detections in columns.

    COCO's matches at IoU 0.5 are on the diagonal. Of the rest, each detection, best first, takes the free object of any
    class with the highest IoU, if that is at least 0.5. The last row counts detections on background, the last column
    objects that are missed.

    Args:
        matches: with COCO's settings.
        score: the least score of a detection.
    """
    object_labels = matches.annotations.labels
    classes = len(matches.category_names)
    true, false = true_and_false_positives(matches, score=score)
    truth = np.where(true, matches.labels, classes)
    taken = np.zeros(len(object_labels), dtype=np.bool_)
    taken[matches.matched[0, IOU_50, true]] = True
    threshold = matches.settings.iou_thresholds[IOU_50]
    for rows, objects, ious in overlaps_by_image(matches):
        for row in np.flatnonzero(false[rows] & (ious >= threshold).any(axis=1)).tolist():
            free = np.where(taken[objects], 0, ious[row])
            best = int(free.argmax())
            if free[best] >= threshold:
                taken[objects[best]] = True
                truth[rows[row]] = object_labels[objects[best]]
    counted = matches.object_index[~matches.object_ignored[0]]
    missed = object_labels[counted[~taken[counted]]]
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    np.add.at(counts, (truth[true | false], matches.labels[true | false]), 1)
    np.add.at(counts, (missed, classes), 1)
    return counts


def calibration(matches: Matches, *, bins: int = 10) -> Calibration | None:
    """Return how far scores are from precision at IoU 0.5; None unless all scores lie in 0 .. 1.

    Source: Guo et al., arXiv 1706.04599, equations 1 to 3, with precision in place of accuracy as for detectors in
    Küppers et al., arXiv 2004.13546.
    """
    true, false = true_and_false_positives(matches)
    scores, true = matches.scores[true | false], true[true | false]
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return None
    bin_of = np.minimum((scores * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_of, weights=scores, minlength=bins) / counts
        precision = np.bincount(bin_of, weights=true, minlength=bins) / counts
    error = float(np.nansum(np.abs(precision - mean) * counts) / len(scores))
    return Calibration(edges=np.linspace(0, 1, bins + 1), counts=counts, scores=mean, precision=precision, error=error)


def image_scores(matches: Matches, *, score: float) -> ImageScores:
    """Return true positives, false positives and false negatives of each image at this score."""
    images = len(matches.image_ids)
    true, false = (
        np.bincount(matches.image_index[rows], minlength=images)
        for rows in true_and_false_positives(matches, score=score)
    )
    objects = np.bincount(matches.object_image_index[~matches.object_ignored[0]], minlength=images)
    return ImageScores(true_positives=true, false_positives=false, false_negatives=objects - true)


def overlaps_by_image(matches: Matches) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Yield detections, best first, objects without crowds, and their IoU [D, N], of each image that has both.

    Detections are indices in `matches`, objects of all classes in its `annotations`.
    """
    is_object = ~matches.object_ignored[0]
    order = np.argsort(matches.object_image_index[is_object], kind="stable")
    objects, object_images = (values[is_object][order] for values in (matches.object_index, matches.object_image_index))
    detections = np.lexsort((-matches.scores, matches.image_index))
    images = matches.image_index[detections]
    both = np.intersect1d(images, object_images)
    bounds = [np.searchsorted(of, both, side).tolist() for of in (images, object_images) for side in ("left", "right")]
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        rows, columns = detections[first:last], objects[first_object:last_object]
        boxes = matches.detections.boxes[matches.detection_index[rows]]
        ious = rle.iou(boxes, matches.annotations.boxes[columns], np.zeros(len(columns), dtype=np.uint8))
        yield rows, columns, ious
