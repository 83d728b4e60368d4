"""COCO's matching of detections to objects, done once for every area range and IoU threshold.

AP, precision-recall curves, mistakes and confidence intervals all follow from it. The IoU is computed by pycocotools,
so that rounding is the same as in the reference.

Source: https://cocodataset.org/#detection-eval
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.segmentations import EncodedMask, Segmentations
from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.detections import Detections, indices_of
from detr_backbone.evaluation.settings import COCO_SETTINGS, EvaluationSettings

Regions: TypeAlias = FloatArray | list[EncodedMask]

IouType: TypeAlias = Literal["bbox", "segm"]
"""IoU of boxes or of masks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """A ground truth, detections on it, and which of them match, for A area ranges and T IoU thresholds.

    The D detections that count are sorted by class, then by falling score; equal scores by image, then by the order in
    which they came. N is the number of objects, crowds included, in the I images that count.

    Attributes:
        annotations: the ground truth.
        detections: all detections on it.
        settings: which matches count.
        image_ids: int64 [I], ascending: the images that count.
        image_index: int64 [D], the index of the detection's image in `image_ids`.
        labels: int64 [D], ascending.
        scores: float64 [D].
        ranks: int64 [D], the rank among the detections of the same image and class: 0 for the best.
        detection_index: int64 [D], the index in `detections`, and so the box.
        matched: int32 [A, T, D], the index of the matched object in `annotations`, or -1.
        ignored: bool [A, T, D], True for a detection that is neither a true nor a false positive: it matches a crowd or
            an object of another size, or matches nothing and is itself of another size.
        object_image_index: int64 [N], the index of the object's image in `image_ids`.
        object_labels: int64 [N].
        object_index: int64 [N], the index in `annotations`.
        object_ignored: bool [A, N], True for an object that is no false negative if nothing matches it: a crowd, or of
            another size.
    """

    annotations: CocoAnnotations
    detections: Detections
    settings: EvaluationSettings
    image_ids: IntArray
    image_index: IntArray
    labels: IntArray
    scores: FloatArray
    ranks: IntArray
    detection_index: IntArray
    matched: npt.NDArray[np.int32]
    ignored: BoolArray
    object_image_index: IntArray
    object_labels: IntArray
    object_index: IntArray
    object_ignored: BoolArray

    @property
    def category_names(self) -> tuple[str, ...]:
        """The name of each label 0 .. K - 1."""
        return self.annotations.category_names

    def class_slice(self, label: int) -> slice:
        """Return the slice of the detections of a class."""
        start, stop = np.searchsorted(self.labels, (label, label + 1)).tolist()
        return slice(start, stop)

    def subset(self, image_ids: Sequence[int]) -> "Matches":
        """Return the matches in some of the images.

        Raises:
            EvaluationError: an image id is unknown.
        """
        images = np.unique(np.array(image_ids, dtype=np.int64))
        new_index = np.full(len(self.image_ids), -1)
        new_index[indices_of(images, self.image_ids, "image_ids", "matches")] = range(len(images))
        rows = np.flatnonzero(new_index[self.image_index] >= 0)
        objects = np.flatnonzero(new_index[self.object_image_index] >= 0)
        return replace(
            self,
            image_ids=images,
            image_index=new_index[self.image_index[rows]],
            labels=self.labels[rows],
            scores=self.scores[rows],
            ranks=self.ranks[rows],
            detection_index=self.detection_index[rows],
            matched=self.matched[:, :, rows],
            ignored=self.ignored[:, :, rows],
            object_image_index=new_index[self.object_image_index[objects]],
            object_labels=self.object_labels[objects],
            object_index=self.object_index[objects],
            object_ignored=self.object_ignored[:, objects],
        )


def match(
    annotations: CocoAnnotations,
    detections: Detections,
    *,
    image_ids: Sequence[int] | None = None,
    iou_type: IouType = "bbox",
    settings: EvaluationSettings = COCO_SETTINGS,
) -> Matches:
    """Match detections to objects as pycocotools does.

    Within an image and a class, detections choose in the order of their scores: the free object with the highest IoU,
    if that reaches the threshold; if there is none, an object that is ignored. A crowd may be chosen any number of
    times. Only the best detections of each class choose, as many as `settings.max_dets` says.

    Args:
        annotations: the ground truth.
        detections: on its images.
        image_ids: the images that count; None takes all.
        iou_type: IoU of boxes or of masks.
        settings: which matches count.

    Raises:
        EvaluationError: an image id is unknown; masks are asked for and missing.
    """
    images = annotations.image_ids if image_ids is None else np.unique(np.array(image_ids, dtype=np.int64))
    new_index = np.full(len(annotations.image_ids), -1)
    new_index[indices_of(images, annotations.image_ids, "image_ids", f"file={annotations.source}")] = range(len(images))
    classes = len(annotations.category_ids)
    areas, thresholds = settings.areas, settings.thresholds

    rows = np.flatnonzero(new_index[detections.image_index] >= 0)
    groups = new_index[detections.image_index[rows]] * classes + detections.labels[rows]
    order = np.lexsort((-detections.scores[rows], groups))
    rows, groups = rows[order], groups[order]
    ranks = np.arange(len(rows)) - np.searchsorted(groups, groups)
    rows, groups, ranks = (values[ranks < settings.max_dets[-1]] for values in (rows, groups, ranks))

    objects = np.flatnonzero(new_index[annotations.image_index] >= 0)
    object_groups = new_index[annotations.image_index[objects]] * classes + annotations.labels[objects]
    order = np.argsort(object_groups, kind="stable")
    objects, object_groups = objects[order], object_groups[order]
    crowd = annotations.is_crowd[objects]
    object_ignored = crowd | _outside(annotations.areas[objects], areas)

    regions = _regions(annotations, detections, rows, objects, iou_type)
    pairs = _overlapping_pairs(regions, (groups, object_groups), crowd, threshold=thresholds[0])
    choosing, chosen, chosen_ignored = _choose(pairs, groups, crowd, object_ignored, thresholds)

    image_index, labels = np.divmod(groups, classes)
    scores = detections.scores[rows]
    by_class = np.lexsort((-scores, labels))
    position = np.empty_like(by_class)
    position[by_class] = np.arange(len(by_class))
    choosing = position[choosing]
    matched = np.full((len(areas), len(thresholds), len(rows)), -1, dtype=np.int32)
    matched[:, :, choosing] = np.append(objects, -1)[chosen]
    ignored = np.repeat(_outside(detections.areas[rows[by_class]], areas)[:, None], len(thresholds), axis=1)
    ignored[:, :, choosing] = np.where(chosen < 0, ignored[:, :, choosing], chosen_ignored)
    return Matches(
        annotations=annotations,
        detections=detections,
        settings=settings,
        image_ids=images,
        image_index=image_index[by_class],
        labels=labels[by_class],
        scores=scores[by_class],
        ranks=ranks[by_class],
        detection_index=rows[by_class],
        matched=matched,
        ignored=ignored,
        object_image_index=object_groups // classes,
        object_labels=object_groups % classes,
        object_index=objects,
        object_ignored=object_ignored,
    )


class _Pairs(NamedTuple):
    """P pairs of a detection and an object whose IoU reaches the lowest threshold.

    They are sorted by detection; of one detection, a later pair is preferred to an earlier one.
    """

    detections: IntArray
    objects: IntArray
    ious: FloatArray


def _outside(object_areas: FloatArray, areas: FloatArray) -> BoolArray:
    """Return which of M areas lie outside of each range, bool [A, M]."""
    least, most = areas.T[:, :, None]
    return (object_areas < least) | (object_areas > most)


def _regions(
    annotations: CocoAnnotations, detections: Detections, rows: IntArray, objects: IntArray, iou_type: str
) -> tuple[Regions, Regions]:
    """Return the boxes or masks of the chosen detections and objects."""
    if iou_type == "bbox":
        return detections.boxes[rows], annotations.boxes[objects]
    segmentations = segmentations_of(annotations)
    if detections.masks is None:
        raise EvaluationError("detections have no masks | where: key=masks | fix: give them, or evaluate boxes")
    masks = detections.masks
    return [masks[i] for i in rows.tolist()], [segmentations[i] for i in objects.tolist()]


def _overlapping_pairs(
    regions: tuple[Regions, Regions], groups: tuple[IntArray, IntArray], crowd: BoolArray, *, threshold: float
) -> _Pairs:
    """Return the pairs of detections and objects within each group of an image and a class; groups ascend."""
    shared = np.unique(groups[1])
    bounds = [np.searchsorted(of, shared, side).tolist() for of in groups for side in ("left", "right")]
    parts = [(shared[:0], shared[:0], np.zeros(0))]
    is_crowd = crowd.astype(np.uint8)
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        if first == last:
            continue
        objects = slice(first_object, last_object)
        ious = rle.iou(regions[0][first:last], regions[1][objects], is_crowd[objects])
        row, column = (ious >= threshold).nonzero()
        parts.append((first + row, first_object + column, ious[row, column]))
    rows, columns, ious = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort((columns, ious, rows))
    return _Pairs(rows[order], columns[order], ious[order])


def _choose(
    pairs: _Pairs, groups: IntArray, crowd: BoolArray, object_ignored: BoolArray, thresholds: FloatArray
) -> tuple[IntArray, IntArray, BoolArray]:
    """Return C detections that overlap objects, the object that each chooses, and whether that one is ignored.

    The best detections of all groups choose together, then the second ones: groups are independent.

    Returns:
        The detections [C], the chosen objects [A, T, C], -1 for none, and whether they are ignored [A, T, C].
    """
    choosing, starts, counts = np.unique(pairs.detections, return_index=True, return_counts=True)
    turns = np.arange(len(choosing)) - np.searchsorted(groups[choosing], groups[choosing])
    areas = len(object_ignored)
    chosen = np.full((len(choosing), areas, len(thresholds)), -1)
    taken = np.zeros((len(crowd), areas, len(thresholds)), dtype=np.bool_)
    for turn in range(turns.max(initial=-1) + 1):
        now = np.flatnonzero(turns == turn)
        position = np.arange(counts[now].max())
        is_pair = position < counts[now, None]  # [C', P']
        candidates = np.where(is_pair, starts[now, None] + position, 0)
        objects = pairs.objects[candidates]
        reached = pairs.ious[candidates, None, None] >= thresholds  # [C', P', 1, T]
        free = ~taken[objects] | crowd[objects, None, None]  # [C', P', A, T]
        counting = ~object_ignored.T[objects][..., None]  # [C', P', A, 1]
        rank = 1 + position[:, None, None] + len(position) * counting
        preference = (is_pair[..., None, None] & reached & free) * rank
        best = preference.argmax(axis=1)
        row, area, threshold = preference.max(axis=1).nonzero()
        choice = objects[row, best[row, area, threshold]]
        taken[choice, area, threshold] = True
        chosen[now[row], area, threshold] = choice
    chosen = chosen.transpose(1, 2, 0)
    return choosing, chosen, object_ignored[np.arange(areas)[:, None, None], chosen] & (chosen >= 0)


def segmentations_of(annotations: CocoAnnotations) -> Segmentations:
    """Return the mask of each annotation.

    Raises:
        EvaluationError: the annotations were loaded without.
    """
    if annotations.segmentations is None:
        raise EvaluationError(
            f"ground truth has no masks | where: file={annotations.source} key=segmentation | "
            "fix: load_annotations(path, segmentations=True)"
        )
    return annotations.segmentations
