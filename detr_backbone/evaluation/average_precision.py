"""COCO's numbers from matches: of the images as they are, or of thousands of resamples of them at once.

A resample counts each image as often as it was drawn, instead of copying it. Its numbers are those that pycocotools
gives for the copies, each beside the next, where no two detections of a class in one image have the same score; those
that have count together.

Source: https://cocodataset.org/#detection-eval
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from detr_backbone.evaluation.matching import AREAS, IOU_THRESHOLDS, Matches

Numbers: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = npt.NDArray[np.float64] | npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

STATS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
RECALLS = np.linspace(0, 1, 101)
_AR_LIMITS = ((0, 1), (0, 10), (0, 100), (1, 100), (2, 100), (3, 100))
"""Area range and detections per image of the six recalls."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampled:
    """COCO's numbers of B resamples, between 0 and 1; NaN where there is no object to find.

    Attributes:
        stats: float64 [12, B], in the order of `STATS`.
        by_class: float64 [12, K, B], the same of each class, of which `stats` are the means.
    """

    stats: Numbers
    by_class: Numbers

    @property
    def per_class(self) -> Numbers:
        """float64 [K, B], the AP of each class."""
        aps: Numbers = self.by_class[0]
        return aps


def average_precision(matches: Matches, weights: Weights | None = None) -> Resampled:
    """The numbers of B resamples of I images.

    Args:
        matches: of the I images.
        weights: [I, B], how often each image counts in each resample, as whole numbers; None counts each once. With
            float64 the numbers are those of pycocotools to 1e-12; float32 takes half the time and gives six digits.
    """
    if weights is None:
        weights = np.ones((len(matches.image_ids), 1))
    classes = len(matches.category_names)
    right = (matches.matched >= 0) & ~matches.ignored
    objects = _objects(matches, weights)
    precision = np.empty((len(AREAS), len(IOU_THRESHOLDS), classes, weights.shape[1]))
    for label in range(classes):
        rows = matches.class_slice(label)
        for area in range(len(AREAS)):
            precision[area, :, label] = _precision(
                matches.image_index[rows],
                right[area, :, rows],
                ~matches.ignored[area, :, rows],
                weights,
                objects[area, label],
            )
    precision[:, :, :] = np.where(objects[:, None] > 0, precision, np.nan)
    recall = _recall(matches, right, weights, objects)
    by_threshold, by_area = precision[0, (0, 5)], precision.mean(axis=1)
    by_class = np.stack([by_area[0], *by_threshold, *by_area[1:], *recall])
    return Resampled(stats=_mean(by_class), by_class=by_class)


def _objects(matches: Matches, weights: Weights) -> Numbers:
    """The objects to find, [A, K, B]."""
    classes = len(matches.category_names)
    area, which = np.nonzero(~matches.object_ignored)
    rows = area * classes + matches.object_labels[which]
    counts = _weighted_sums(rows, matches.object_image_index[which], len(AREAS) * classes, weights)
    return counts.reshape(len(AREAS), classes, -1)


def _precision(images: Rows, right: Flags, counted: Flags, weights: Weights, objects: Numbers) -> Numbers:
    """Precision of one class in one area range, averaged over the recalls, for each threshold: float64 [T, B].

    Args:
        images: the images of D detections, best first.
        right: bool [T, D], whether a detection finds an object.
        counted: bool [T, D], whether it counts as right or as wrong.
        weights: [I, B].
        objects: the objects to find, [B].
    """
    result = np.zeros((len(right), weights.shape[1]))
    ends = np.flatnonzero(right.any(axis=0))  # only where a detection is right may recall and the envelope step
    if not len(ends):
        return result
    levels, level = np.unique(objects, return_inverse=True)
    recalls_reached = _recalls_reached(levels.astype(np.int64)).astype(weights.dtype)
    offset = level * recalls_reached.shape[1]
    # Most detections count at every threshold; their sums are taken once.
    always = counted.all(axis=0)
    always_seen = _running_sums(np.flatnonzero(always), ends, images, weights)
    for threshold, (is_right, is_counted) in enumerate(zip(right, counted & ~always, strict=True)):
        chosen = np.flatnonzero(is_right[ends])
        if not len(chosen):
            continue
        found = _accumulate(np.add, weights[images[ends[chosen]]])
        seen = always_seen[chosen]
        if is_counted.any():
            seen += _running_sums(np.flatnonzero(is_counted), ends[chosen], images, weights)
        seen += np.spacing(1)
        precision = found / seen
        _accumulate(np.maximum, precision[::-1])
        gained = recalls_reached.take(found.astype(np.intp) + offset)
        gained[1:] -= gained[:-1]
        gained *= precision
        result[threshold] = gained.sum(axis=0) / len(RECALLS)
    return result


def _accumulate(function: np.ufunc, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The rows [D, B], each joined with all before it, in place; `function.accumulate` walks columns, and is slow."""
    for before, row in pairwise(rows):
        function(before, row, out=row)
    return rows


def _running_sums(rows: Rows, ends: Rows, images: Rows, weights: Weights) -> npt.NDArray[Any]:
    """The weights of the detections `rows` up to and with each of the detections `ends`, [E, B]."""
    steps = np.searchsorted(ends, rows)
    rows, steps = rows[steps < len(ends)], steps[steps < len(ends)]
    return _accumulate(np.add, _weighted_sums(steps, images[rows], len(ends), weights))


def _weighted_sums(rows: Rows, images: Rows, length: int, weights: Weights) -> npt.NDArray[Any]:
    """The weights of `images`, summed by `rows` 0 .. length - 1: [length, B]."""
    from scipy.sparse import csr_array

    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(length + 1))
    ones = np.ones(len(rows), dtype=weights.dtype)
    counts = csr_array((ones, images[order], starts), shape=(length, len(weights)))
    sums: npt.NDArray[Any] = counts @ weights
    return sums


def _recalls_reached(objects: Rows) -> npt.NDArray[np.int16]:
    """How many of the 101 recalls are reached with 0, 1, .. objects found, for several numbers of objects to find.

    Found and to find are divided and compared as pycocotools does: 7 of 100 is below the recall 0.07.
    """
    objects = np.maximum(objects, 1)[:, None]
    needed = np.ceil(RECALLS * objects).astype(np.int64)
    needed -= (needed - 1) / objects >= RECALLS
    needed += needed / objects < RECALLS
    table = np.zeros((len(objects), int(objects.max()) + 2), dtype=np.int16)
    np.add.at(table, (np.arange(len(objects))[:, None], needed), 1)
    return table.cumsum(axis=1, dtype=np.int16)


def _recall(matches: Matches, right: Flags, weights: Weights, objects: Numbers) -> Numbers:
    """The six recalls of each class, averaged over the thresholds: [6, K, B]."""
    recalls = np.empty((len(_AR_LIMITS), *objects.shape[1:]))
    for number, (area, most) in enumerate(_AR_LIMITS):
        _, which = np.nonzero(right[area] & (matches.ranks < most))
        found = _weighted_sums(matches.labels[which], matches.image_index[which], objects.shape[1], weights)
        with np.errstate(invalid="ignore"):
            recalls[number] = found / (objects[area] * len(IOU_THRESHOLDS))
    return recalls


def _mean(numbers: Numbers) -> Numbers:
    """The mean over classes [12, K, B] that have objects; NaN where none has."""
    there = ~np.isnan(numbers)
    with np.errstate(invalid="ignore"):
        mean: Numbers = np.where(there, numbers, 0).sum(axis=1) / there.sum(axis=1)
    return mean
