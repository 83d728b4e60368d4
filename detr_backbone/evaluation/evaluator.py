"""COCO average precision that cannot be flattered by what is missing or not a number.

pycocotools computes the numbers, or a faster library that gives the same. Left alone it gives AP 1.0 to NaN boxes,
scores whichever images it is told to, and never matches a ground truth whose id is 0; so this evaluator knows which
images to expect, refuses predictions that are not boxes, and hands out ids of its own.

Source: https://cocodataset.org/#detection-eval
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_args

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations, parse_annotations
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import STATS
from detr_backbone.evaluation.backends import Backend, Regions, numbers_of
from detr_backbone.evaluation.box_format import refuse_other_formats
from detr_backbone.evaluation.detections import Detections, load_detections, refuse_unknown
from detr_backbone.evaluation.intervals import Interval, Intervals
from detr_backbone.evaluation.matching import IouType, Matches, match, segmentations_of
from detr_backbone.evaluation.predictions import Found, checked_prediction


class Detection(TypedDict):
    """One entry of a COCO results file, with a box or a mask."""

    image_id: int
    category_id: int
    score: float
    bbox: NotRequired[list[float]]
    """x, y, w, h in pixels of the original image."""
    segmentation: NotRequired[dict[str, Any]]
    """`size` (h, w), and `counts` as a string."""


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """The numbers of one evaluation, between 0 and 1; -1 where there is no ground truth to find.

    Attributes:
        stats: COCO's twelve by name: AP over IoU 0.50 .. 0.95, at 0.50 and at 0.75, by object area (below 32^2, up to
            96^2, above, in square pixels), and the recall with 1, 10 and 100 detections and by area.
        per_class: AP by category name.
        num_images: images that were seen.
        num_expected: images over which the numbers are taken; those not seen count as images without detections.
        part: which images of the dataset these are, in words; empty for all of them.
    """

    stats: Mapping[str, float]
    per_class: Mapping[str, float]
    num_images: int
    num_expected: int
    part: str = ""

    def table(self, intervals: Intervals | None = None) -> str:
        """The numbers as lines of text, in percent, `-` where there is no ground truth; with their intervals."""
        lines = [f"images {self.num_images} of {self.num_expected}"]
        lines += [f"subset {self.part}"] if self.part else []
        ranges = ({}, {}) if intervals is None else (intervals.stats, intervals.per_class)
        for numbers, around in zip((self.stats, self.per_class), ranges, strict=True):
            width = max(map(len, numbers))
            lines += [f"{name:<{width}} {_percent(value)}{_range(around.get(name))}" for name, value in numbers.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


class CocoEvaluator:
    """Collects the detections of every image of a dataset, then computes COCO's numbers.

    As in pycocotools, the 100 best detections of each class count in each image.

    Args:
        annotations: a COCO file, its parsed content, or what `CocoDetection.annotations` holds.
        image_ids: the images that will be evaluated, for a part of a dataset; None takes all.
        iou_type: whether boxes or masks are compared; masks need annotations with segmentations.
        backend: the library that computes the numbers; all give the same, the last two need `detr_backbone[fast-eval]`.

    Raises:
        AnnotationError: the annotations contradict themselves or the COCO format.
        EvaluationError: an image id is unknown, or masks are missing.
        ValueError: `iou_type` or `backend` is unknown.
    """

    def __init__(
        self,
        annotations: CocoAnnotations | Mapping[str, Any] | Path | str,
        *,
        image_ids: Sequence[int] | None = None,
        iou_type: IouType = "bbox",
        backend: Backend = "pycocotools",
    ) -> None:
        for name, value, known in (("iou_type", iou_type, IouType), ("backend", backend, Backend)):
            if value not in get_args(known):
                raise ValueError(f"`{name}` must be one of {get_args(known)}, got {value!r}")
        if isinstance(annotations, Mapping):
            annotations = parse_annotations(annotations, source="<mapping>")
        elif not isinstance(annotations, CocoAnnotations):
            annotations = load_annotations(annotations)
        if iou_type == "segm":
            segmentations_of(annotations)
        self.annotations = annotations
        self.iou_type, self.backend = iou_type, backend
        known_ids = annotations.image_ids.tolist()
        self.image_ids: tuple[int, ...] = tuple(known_ids if image_ids is None else sorted(set(image_ids)))
        self._expected = frozenset(self.image_ids)
        self._source = f"file={annotations.source}"
        refuse_unknown(self.image_ids, known_ids, "image_ids", self._source)
        self._places = {image_id: place for place, image_id in enumerate(known_ids)}
        self._found: dict[int, Found] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the predictions of some images, all of them or none.

        Args:
            predictions: by image id, `scores` [M], `labels` [M] as category ids of the dataset, and `boxes` [M, 4] as
                xyxy in pixels of the original image. With `iou_type="segm"`, instead of boxes `masks`, a bool tensor
                [M, h, w] or M masks in COCO's compressed form. An image without detections has empty tensors.

        Raises:
            EvaluationError: an image is not expected or was seen before; a category is unknown; lengths do not fit;
                a number is not finite; a box ends before it starts; a mask is not of its image's size.
        """
        refuse_unknown(predictions, self._expected, "image_id", self._source)
        if again := [image_id for image_id in predictions if image_id in self._found]:
            raise EvaluationError(
                f"images were evaluated before | where: {self._source} image_id={again[0]} | got {len(again)} again, "
                f"first {again[:5]} | fix: use a sampler that repeats none"
            )
        self._found |= {image_id: self._found_in(image_id, fields) for image_id, fields in predictions.items()}

    def load(self, path: Path | str) -> None:
        """Add the boxes of a COCO results file; an expected image that it does not name has no detections.

        Raises:
            EvaluationError: as `load_detections`, or as `update`.
        """
        found = load_detections(path, self.annotations)
        known_ids = self.annotations.image_ids
        refuse_unknown(np.unique(known_ids[found.image_index]).tolist(), self._expected, "image_id", f"file={path}")
        order = np.argsort(found.image_index, kind="stable")
        ends = np.searchsorted(found.image_index[order], np.arange(len(known_ids) + 1))
        for image_id in self.image_ids:
            rows = order[ends[self._places[image_id]] : ends[self._places[image_id] + 1]]
            self._found[image_id] = Found(found.labels[rows], found.scores[rows], found.boxes[rows], None)

    def _found_in(self, image_id: int, fields: Mapping[str, Any]) -> Found:
        place = self._places[image_id]
        return checked_prediction(
            fields,
            category_ids=self.annotations.category_ids,
            size=tuple(self.annotations.sizes[place].tolist()),
            iou_type=self.iou_type,
            where=f"{self._source} image_id={image_id}",
        )

    @property
    def collected(self) -> Detections:
        """Everything collected, packed into arrays."""
        image_ids = sorted(self._found)
        nothing = Found(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)), [])
        labels, scores, boxes, masks = zip(*(self._found[i] for i in image_ids), nothing, strict=True)
        places = np.array([self._places[image_id] for image_id in image_ids], dtype=np.int64)
        return Detections(
            image_index=np.repeat(places, [len(found) for found in labels[:-1]]),
            labels=np.concatenate(labels),
            scores=np.concatenate(scores),
            boxes=np.concatenate(boxes),
            masks=[mask for found in masks for mask in found] if self.iou_type == "segm" else None,
        )

    @property
    def detections(self) -> list[Detection]:
        """Everything collected, as the list that a COCO results file holds; with masks, it has no boxes."""
        collected = self.collected
        image_ids = self.annotations.image_ids[collected.image_index].tolist()
        category_ids = np.array(self.annotations.category_ids)[collected.labels].tolist()
        rows = zip(image_ids, category_ids, collected.scores.tolist(), strict=True)
        if collected.masks is None:
            return [
                Detection(image_id=image_id, category_id=category_id, bbox=box, score=score)
                for (image_id, category_id, score), box in zip(rows, collected.boxes.tolist(), strict=True)
            ]
        return [
            Detection(image_id=i, category_id=c, score=s, segmentation={**mask, "counts": mask["counts"].decode()})
            for (i, c, s), mask in zip(rows, collected.masks, strict=True)
        ]

    def compute(self, *, allow_partial: bool = False) -> CocoResult:
        """The numbers over all expected images.

        Args:
            allow_partial: count images that were not seen as images without detections, instead of refusing.

        Raises:
            EvaluationError: images were not seen, and `allow_partial` is not set; the boxes are in another format; the
                library of `backend` is missing.
        """
        collected = self._complete(allow_partial=allow_partial)
        truth = self.annotations
        places = np.array([self._places[image_id] for image_id in self.image_ids], dtype=np.int64)
        mine = np.flatnonzero(np.isin(truth.image_index, places))
        masks = None
        if self.iou_type == "segm":
            segmentations = segmentations_of(truth)
            masks = [segmentations[index] for index in mine.tolist()]
        stats, precision = numbers_of(
            self.backend,
            Regions(
                image_index=np.searchsorted(places, truth.image_index[mine]),
                labels=truth.labels[mine],
                boxes=truth.boxes[mine],
                areas=truth.areas[mine],
                is_crowd=truth.is_crowd[mine],
                masks=masks,
            ),
            Regions(
                image_index=np.searchsorted(places, collected.image_index),
                labels=collected.labels,
                boxes=collected.boxes,
                areas=collected.areas,
                scores=collected.scores,
                masks=None if collected.masks is None else list(collected.masks),
            ),
            sizes=truth.sizes[places],
            classes=len(truth.category_ids),
        )
        per_class = {
            name: float(values[values > -1].mean()) if (values > -1).any() else -1.0
            for name, values in zip(truth.category_names, np.moveaxis(precision, -1, 0), strict=True)
        }
        return CocoResult(
            stats=dict(zip(STATS, stats.tolist(), strict=True)),
            per_class=per_class,
            num_images=len(self._found),
            num_expected=len(self.image_ids),
            part=truth.part,
        )

    def matches(self, *, allow_partial: bool = False) -> Matches:
        """What each detection finds, for intervals, comparisons and reports; raises as `compute` does."""
        collected = self._complete(allow_partial=allow_partial)
        return match(self.annotations, collected, image_ids=self.image_ids, iou_type=self.iou_type)

    def _complete(self, *, allow_partial: bool) -> Detections:
        missing = [image_id for image_id in self.image_ids if image_id not in self._found]
        if missing and not allow_partial:
            raise EvaluationError(
                f"images were not evaluated | where: {self._source} image_id={missing[0]} | "
                f"got {len(self._found)} of {len(self.image_ids)} images, first missing {missing[:5]} | "
                "fix: evaluate them, or allow_partial"
            )
        collected = self.collected
        if self.iou_type == "bbox":
            refuse_other_formats(self.annotations, collected, self._source)
        return collected


def _percent(value: float) -> str:
    return "    -" if value < 0 else f"{100 * value:5.1f}"


def _range(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.low):
        return ""
    return f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
