"""COCO's numbers from matches (the backend "matching"; `cocoeval` is the default).

They are of the images as they are, or of thousands of resamples of them at once.

A resample weights each image by how often it was drawn, instead of copying it. Its numbers equal those that pycocotools
gives for the copies, copies of an image next to each other, where no two detections of a class in one image have the
same score.

Source: https://cocodataset.org/#detection-eval
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.evaluation.matching import Matches

Weights: TypeAlias = FloatArray | npt.NDArray[np.float32]

RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResampledStats:
    """COCO's numbers of B resamples, between 0 and 1; NaN without objects.

    Attributes:
        stats: float64 [S, B], in the order of `EvaluationSettings.stats`.
        by_class: float64 [S, K, B], the same of each class; `stats` are their means.
    """

    stats: FloatArray
    by_class: FloatArray

    @property
    def per_class(self) -> FloatArray:
        """The AP of each class, float64 [K, B]."""
        return self.by_class[0]


def average_precision(matches: Matches, weights: Weights | None = None) -> ResampledStats:
    """Return the numbers of B resamples of I images.

    Args:
        matches: in the I images.
        weights: [I, B], how often each image counts in each resample, as whole numbers; None counts each once. With
            float64 the numbers are those of pycocotools to 1e-12; float32 takes half the time and gives six digits.
    """
    if weights is None:
        weights = np.ones((len(matches.image_ids), 1))
    classes = len(matches.category_names)
    true_positive = (matches.matched >= 0) & ~matches.ignored
    objects = _count_objects(matches, weights)
    areas, thresholds = true_positive.shape[:2]
    precision = np.empty((areas, thresholds, classes, weights.shape[1]))
    for label in range(classes):
        rows = matches.class_slice(label)
        for area in range(areas):
            precision[area, :, label] = _mean_precision(
                matches.image_index[rows],
                true_positive[area, :, rows],
                ~matches.ignored[area, :, rows],
                weights,
                objects[area, label],
            )
    precision[:, :, :] = np.where(objects[:, None] > 0, precision, np.nan)
    by_class = np.stack(
        [
            _recall(matches, true_positive[stat.area], stat.max_dets, weights, objects[stat.area])
            if stat.is_recall
            else precision[stat.area].mean(axis=0)
            if stat.threshold is None
            else precision[stat.area, stat.threshold]
            for stat in matches.settings.stats
        ]
    )
    return ResampledStats(stats=_mean_over_classes(by_class), by_class=by_class)


def _count_objects(matches: Matches, weights: Weights) -> FloatArray:
    """Return the number of objects that are not ignored, [A, K, B]."""
    classes, areas = len(matches.category_names), len(matches.object_ignored)
    area, column = np.nonzero(~matches.object_ignored)
    rows = area * classes + matches.object_labels[column]
    counts = _weighted_sums(rows, matches.object_image_index[column], areas * classes, weights)
    return counts.reshape(areas, classes, -1)


def _mean_precision(
    images: IntArray, true_positive: BoolArray, counted: BoolArray, weights: Weights, objects: FloatArray
) -> FloatArray:
    """Return the precision of one class in one area range, averaged over the recalls, at each threshold: [T, B].

    Args:
        images: the images of D detections, best first.
        true_positive: bool [T, D].
        counted: bool [T, D], True for true and false positives.
        weights: [I, B].
        objects: the number of objects, [B].
    """
    result = np.zeros((len(true_positive), weights.shape[1]))
    ends = np.flatnonzero(true_positive.any(axis=0))  # recall and the envelope step at true positives only
    if not len(ends):
        return result
    levels, level = np.unique(objects, return_inverse=True)
    recalls_reached = _recalls_reached(levels.astype(np.int64)).astype(weights.dtype)
    offset = level * recalls_reached.shape[1]
    # Most detections count at every threshold; their sums are taken once.
    always = counted.all(axis=0)
    always_positives = _running_sums(np.flatnonzero(always), ends, images, weights)
    for threshold, (is_true, is_counted) in enumerate(zip(true_positive, counted & ~always, strict=True)):
        chosen = np.flatnonzero(is_true[ends])
        if not len(chosen):
            continue
        true_positives = _accumulate(np.add, weights[images[ends[chosen]]])
        positives = always_positives[chosen]
        if is_counted.any():
            positives += _running_sums(np.flatnonzero(is_counted), ends[chosen], images, weights)
        positives += np.spacing(1)
        precision = true_positives / positives
        _accumulate(np.maximum, precision[::-1])
        gained = recalls_reached.take(true_positives.astype(np.intp) + offset)
        gained[1:] -= gained[:-1]
        gained *= precision
        result[threshold] = gained.sum(axis=0) / len(RECALLS)
    return result


def _accumulate(function: np.ufunc, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Join each of the rows [D, B] with all before it, in place; `function.accumulate` goes by columns, and is slow."""
    for before, row in pairwise(rows):
        function(before, row, out=row)
    return rows


def _running_sums(rows: IntArray, ends: IntArray, images: IntArray, weights: Weights) -> npt.NDArray[Any]:
    """Return the summed weights of the detections `rows` up to and with each of the detections `ends`, [E, B]."""
    steps = np.searchsorted(ends, rows)
    rows, steps = rows[steps < len(ends)], steps[steps < len(ends)]
    return _accumulate(np.add, _weighted_sums(steps, images[rows], len(ends), weights))


def _weighted_sums(rows: IntArray, images: IntArray, length: int, weights: Weights) -> npt.NDArray[Any]:
    """Return the weights of `images`, summed by `rows` 0 .. length - 1: [length, B]."""
    from scipy.sparse import csr_array

    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(length + 1))
    ones = np.ones(len(rows), dtype=weights.dtype)
    counts = csr_array((ones, images[order], starts), shape=(length, len(weights)))
    return counts @ weights


def _recalls_reached(objects: IntArray) -> npt.NDArray[np.int16]:
    """Return how many of the 101 recalls 0, 1, .. true positives reach, for several numbers of objects.

    Recall is divided and compared as pycocotools does: 7 of 100 is below the recall 0.07.
    """
    objects = np.maximum(objects, 1)[:, None]
    needed = np.ceil(RECALLS * objects).astype(np.int64)
    needed -= (needed - 1) / objects >= RECALLS
    needed += needed / objects < RECALLS
    table = np.zeros((len(objects), int(objects.max()) + 2), dtype=np.int16)
    np.add.at(table, (np.arange(len(objects))[:, None], needed), 1)
    return table.cumsum(axis=1, dtype=np.int16)


def _recall(
    matches: Matches, true_positive: BoolArray, max_dets: int, weights: Weights, objects: FloatArray
) -> FloatArray:
    """Return the recall of each class, averaged over the thresholds: [K, B]."""
    _, column = np.nonzero(true_positive & (matches.ranks < max_dets))
    sums = _weighted_sums(matches.labels[column], matches.image_index[column], len(objects), weights)
    with np.errstate(invalid="ignore"):
        return sums / (objects * len(true_positive))


def _mean_over_classes(values: FloatArray) -> FloatArray:
    """Return the mean over the classes [S, K, B] that have objects; NaN where none has."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(axis=1) / defined.sum(axis=1)
