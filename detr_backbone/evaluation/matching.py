"""Which detection finds which object: COCO's matching, done once for every area range and IoU threshold.

AP, precision-recall curves, errors and confidence intervals all follow from it. The overlaps are pycocotools' own, so
that nothing is decided by another rounding.

Source: https://cocodataset.org/#detection-eval
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.segmentations import EncodedMask, Segmentations
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.detections import Detections, places_of

Rows: TypeAlias = npt.NDArray[np.int64]
Regions: TypeAlias = npt.NDArray[np.float64] | list[EncodedMask]

IouType: TypeAlias = Literal["bbox", "segm"]
"""Whether boxes or masks are compared."""
AREAS = ("all", "small", "medium", "large")
AREA_RANGES = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)])
"""Least and largest area in square pixels, both included."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100
"""Detections of one class that count in one image, best first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """D detections and what each of them matches, and the N objects to find, for A area ranges and T IoU thresholds.

    Detections stand by class, then by falling score; equal scores by image, then as they came.

    Attributes:
        image_ids: int64 [I], ascending: the images over which numbers are taken.
        category_names: the name of each label 0 .. K - 1.
        image_index: int64 [D], the place of the detection's image in `image_ids`.
        labels: int64 [D], ascending.
        scores: float64 [D].
        ranks: int64 [D], the place among the detections of the same image and class: 0 for the best.
        detection_index: int64 [D], the place in the `Detections`, and so its box.
        matched: int32 [A, T, D], the matched annotation as its place in the `CocoAnnotations`, or -1.
        ignored: bool [A, T, D], whether the detection counts neither as right nor as wrong: it matches a crowd or an
            object of another size, or matches nothing and is itself of another size.
        object_image_index: int64 [N], the place of the object's image in `image_ids`.
        object_labels: int64 [N].
        object_index: int64 [N], the place in the `CocoAnnotations`.
        object_ignored: bool [A, N], whether the object need not be found: a crowd, or of another size.
    """

    image_ids: Rows
    category_names: tuple[str, ...]
    image_index: Rows
    labels: Rows
    scores: npt.NDArray[np.float64]
    ranks: Rows
    detection_index: Rows
    matched: npt.NDArray[np.int32]
    ignored: npt.NDArray[np.bool_]
    object_image_index: Rows
    object_labels: Rows
    object_index: Rows
    object_ignored: npt.NDArray[np.bool_]

    def class_slice(self, label: int) -> slice:
        """Where the detections of a class stand."""
        start, stop = np.searchsorted(self.labels, (label, label + 1)).tolist()
        return slice(start, stop)

    def subset(self, image_ids: Sequence[int]) -> "Matches":
        """The same over some of the images.

        Raises:
            EvaluationError: an image id is unknown.
        """
        images = np.unique(np.array(image_ids, dtype=np.int64))
        places = np.full(len(self.image_ids), -1)
        places[places_of(images, self.image_ids, "image_ids", "matches")] = range(len(images))
        rows = np.flatnonzero(places[self.image_index] >= 0)
        objects = np.flatnonzero(places[self.object_image_index] >= 0)
        return Matches(
            image_ids=images,
            category_names=self.category_names,
            image_index=places[self.image_index[rows]],
            labels=self.labels[rows],
            scores=self.scores[rows],
            ranks=self.ranks[rows],
            detection_index=self.detection_index[rows],
            matched=self.matched[:, :, rows],
            ignored=self.ignored[:, :, rows],
            object_image_index=places[self.object_image_index[objects]],
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
) -> Matches:
    """Match detections to objects as pycocotools does.

    Within an image and a class, detections choose in the order of their scores: the free object that they overlap
    most, if that is enough; if there is none, an object to be ignored. A crowd may be chosen any number of times. The
    100 best detections of each class choose.

    Args:
        annotations: the ground truth.
        detections: of its images.
        image_ids: the images to look at; None takes all.
        iou_type: overlap of boxes or of masks.

    Raises:
        EvaluationError: an image id is unknown; masks are asked for and missing.
    """
    images = np.unique(np.array(annotations.image_ids if image_ids is None else list(image_ids), dtype=np.int64))
    places = np.full(len(annotations.image_ids), -1)
    places[places_of(images, annotations.image_ids, "image_ids", f"file={annotations.source}")] = range(len(images))
    classes = len(annotations.category_ids)

    found = np.flatnonzero(places[detections.image_index] >= 0)
    groups = places[detections.image_index[found]] * classes + detections.labels[found]
    order = np.lexsort((-detections.scores[found], groups))
    found, groups = found[order], groups[order]
    ranks = np.arange(len(found)) - np.searchsorted(groups, groups)
    found, groups, ranks = (values[ranks < MAX_DETECTIONS] for values in (found, groups, ranks))

    objects = np.flatnonzero(places[annotations.image_index] >= 0)
    object_groups = places[annotations.image_index[objects]] * classes + annotations.labels[objects]
    order = np.argsort(object_groups, kind="stable")
    objects, object_groups = objects[order], object_groups[order]
    crowd = annotations.is_crowd[objects]
    object_ignored = crowd | _outside(annotations.areas[objects])

    regions = _regions(annotations, detections, found, objects, iou_type)
    overlaps = _overlaps(*regions, groups, object_groups, crowd)
    choosing, chosen, chosen_ignored = _choose(overlaps, groups, crowd, object_ignored)

    image_index, labels = np.divmod(groups, classes)
    scores = detections.scores[found]
    by_class = np.lexsort((-scores, labels))
    places = np.empty_like(by_class)
    places[by_class] = np.arange(len(by_class))
    choosing = places[choosing]
    matched = np.full((len(AREAS), len(IOU_THRESHOLDS), len(found)), -1, dtype=np.int32)
    matched[:, :, choosing] = np.append(objects, -1)[chosen]
    ignored = np.repeat(_outside(detections.areas[found[by_class]])[:, None], len(IOU_THRESHOLDS), axis=1)
    ignored[:, :, choosing] = np.where(chosen < 0, ignored[:, :, choosing], chosen_ignored)
    return Matches(
        image_ids=images,
        category_names=annotations.category_names,
        image_index=image_index[by_class],
        labels=labels[by_class],
        scores=scores[by_class],
        ranks=ranks[by_class],
        detection_index=found[by_class],
        matched=matched,
        ignored=ignored,
        object_image_index=object_groups // classes,
        object_labels=object_groups % classes,
        object_index=objects,
        object_ignored=object_ignored,
    )


class _Overlaps(NamedTuple):
    """P pairs of a detection and an object that overlap enough for some threshold.

    They stand by detection; those of one detection so that a later one is preferred to an earlier one.
    """

    found: Rows
    objects: Rows
    ious: npt.NDArray[np.float64]


def _outside(areas: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether an area is outside of each range: bool [A, M]."""
    least, most = AREA_RANGES.T[:, :, None]
    outside: npt.NDArray[np.bool_] = (areas < least) | (areas > most)
    return outside


def _regions(
    annotations: CocoAnnotations, detections: Detections, found: Rows, objects: Rows, iou_type: str
) -> tuple[Regions, Regions]:
    """What overlaps: boxes or masks, of the chosen detections and objects."""
    if iou_type == "bbox":
        return detections.boxes[found], annotations.boxes[objects]
    segmentations = segmentations_of(annotations)
    if detections.masks is None:
        raise EvaluationError("detections have no masks | where: key=masks | fix: give them, or evaluate boxes")
    masks = detections.masks
    return [masks[i] for i in found.tolist()], [segmentations[i] for i in objects.tolist()]


def _overlaps(
    regions: Regions, object_regions: Regions, groups: Rows, object_groups: Rows, crowd: npt.NDArray[np.bool_]
) -> _Overlaps:
    """The overlaps within groups, which are numbered in ascending order: the images, and in each the classes."""
    shared = np.unique(object_groups)
    bounds = [
        np.searchsorted(of, shared, side).tolist() for of in (groups, object_groups) for side in ("left", "right")
    ]
    parts = [(groups[:0], groups[:0], np.zeros(0))]
    is_crowd = crowd.astype(np.uint8)
    for first, last, first_object, last_object in zip(*bounds, strict=True):
        if first == last:
            continue
        objects = slice(first_object, last_object)
        ious = rle.iou(regions[first:last], object_regions[objects], is_crowd[objects])
        which, whose = (ious >= IOU_THRESHOLDS[0]).nonzero()
        parts.append((first + which, first_object + whose, ious[which, whose]))
    which, whose, ious = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort((whose, ious, which))
    return _Overlaps(which[order], whose[order], ious[order])


def _choose(
    overlaps: _Overlaps, groups: Rows, crowd: npt.NDArray[np.bool_], object_ignored: npt.NDArray[np.bool_]
) -> tuple[Rows, Rows, npt.NDArray[np.bool_]]:
    """The detections that overlap objects [C], the object that each chooses [A, T, C], -1 for none, and is it ignored.

    The best detections of all groups choose together, then the second ones: groups do not know each other.
    """
    found, starts, counts = np.unique(overlaps.found, return_index=True, return_counts=True)
    turns = np.arange(len(found)) - np.searchsorted(groups[found], groups[found])
    areas, thresholds = len(AREAS), len(IOU_THRESHOLDS)
    chosen = np.full((len(found), areas, thresholds), -1)
    taken = np.zeros((len(crowd), areas, thresholds), dtype=np.bool_)
    for turn in range(turns.max(initial=-1) + 1):
        now = np.flatnonzero(turns == turn)
        places = np.arange(counts[now].max())
        is_pair = places < counts[now, None]  # [C', P']
        pairs = np.where(is_pair, starts[now, None] + places, 0)
        objects = overlaps.objects[pairs]
        enough = overlaps.ious[pairs, None, None] >= IOU_THRESHOLDS  # [C', P', 1, T]
        free = ~taken[objects] | crowd[objects, None, None]  # [C', P', A, T]
        counting = ~object_ignored.T[objects][..., None]  # [C', P', A, 1]
        preference = (is_pair[..., None, None] & enough & free) * (1 + places[:, None, None] + len(places) * counting)
        best = preference.argmax(axis=1)
        row, area, threshold = preference.max(axis=1).nonzero()
        choice = objects[row, best[row, area, threshold]]
        taken[choice, area, threshold] = True
        chosen[now[row], area, threshold] = choice
    chosen = chosen.transpose(1, 2, 0)
    return found, chosen, object_ignored[np.arange(areas)[:, None, None], chosen] & (chosen >= 0)


def segmentations_of(annotations: CocoAnnotations) -> Segmentations:
    """The mask of each annotation.

    Raises:
        EvaluationError: the annotations were loaded without.
    """
    if annotations.segmentations is None:
        raise EvaluationError(
            f"ground truth has no masks | where: file={annotations.source} key=segmentation | "
            "fix: load_annotations(path, segmentations=True)"
        )
    return annotations.segmentations
