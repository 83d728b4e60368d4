"""COCO's average precision, not inflated by images that are missing or numbers that are NaN.

pycocotools computes the numbers. Left alone it gives AP 1.0 to NaN boxes, evaluates whichever images it is given, and
never matches a ground truth whose id is 0; so this evaluator knows which images to expect, refuses predictions that are
not boxes, and numbers annotations itself.

Source: https://cocodataset.org/#detection-eval
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, get_args

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations, parse_annotations
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import average_precision
from detr_backbone.evaluation.box_format import refuse_other_formats
from detr_backbone.evaluation.cocoeval import pycocotools_stats
from detr_backbone.evaluation.detections import Detections, load_detections, refuse_unknown
from detr_backbone.evaluation.matching import IouType, Matches, match, segmentations_of
from detr_backbone.evaluation.predictions import ImageDetections, check_prediction
from detr_backbone.evaluation.result import CocoResult
from detr_backbone.evaluation.settings import COCO_SETTINGS, EvaluationSettings

Backend: TypeAlias = Literal["pycocotools", "matching"]
"""pycocotools is the reference; "matching" is this package's own, equal to 1e-12 and many times faster."""


class Detection(TypedDict):
    """One entry of a COCO results file, with a box or a mask."""

    image_id: int
    category_id: int
    score: float
    bbox: NotRequired[list[float]]
    """x, y, w, h in pixels of the original image."""
    segmentation: NotRequired[dict[str, Any]]
    """`size` (h, w), and `counts` as a string."""


class CocoEvaluator:
    """Collects the detections of every image of a dataset, then computes COCO's numbers.

    As in pycocotools, the 100 best detections of each class count in each image.

    Args:
        annotations: a COCO file, its parsed content, or what `CocoDetection.annotations` holds.
        image_ids: the images that count, for a part of a dataset; None takes all.
        iou_type: IoU of boxes or of masks; masks need annotations with segmentations.
        backend: what computes the numbers: pycocotools, the reference, or this package's own matching, which gives the
            same to 1e-12 in a fraction of the time.
        settings: IoU thresholds, area ranges and detections per image.

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
        settings: EvaluationSettings = COCO_SETTINGS,
    ) -> None:
        for name, value, known in (("iou_type", iou_type, IouType), ("backend", backend, Backend)):
            if value not in get_args(known):
                hint = "; matching gives the same numbers as fast as other libraries do" if name == "backend" else ""
                raise ValueError(f"`{name}` must be one of {get_args(known)}, got {value!r}{hint}")
        if isinstance(annotations, Mapping):
            annotations = parse_annotations(annotations, source="<mapping>")
        elif not isinstance(annotations, CocoAnnotations):
            annotations = load_annotations(annotations)
        if iou_type == "segm":
            segmentations_of(annotations)
        self.annotations = annotations
        self.iou_type, self.backend, self.settings = iou_type, backend, settings
        known_ids = annotations.image_ids.tolist()
        self.image_ids: tuple[int, ...] = tuple(known_ids if image_ids is None else sorted(set(image_ids)))
        self._expected = frozenset(self.image_ids)
        self._source = f"file={annotations.source}"
        refuse_unknown(self.image_ids, known_ids, "image_ids", self._source)
        self._image_index = {image_id: index for index, image_id in enumerate(known_ids)}
        self._by_image: dict[int, ImageDetections] = {}
        self._matches: Matches | None = None

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the predictions of some images, all of them or none.

        Args:
            predictions: by image id, `scores` [M], `labels` [M] as category ids of the dataset, and `boxes` [M, 4] as
                xyxy in pixels of the original image. With `iou_type="segm"`, instead of boxes `masks`, a bool tensor
                [M, h, w] or M masks in COCO's compressed form. An image without detections has empty tensors.

        Raises:
            EvaluationError: an image is not expected or was evaluated before; a category is unknown; lengths do not
                fit; a number is not finite; a box ends before it starts; a mask is not of its image's size.
        """
        refuse_unknown(predictions, self._expected, "image_id", self._source)
        if again := [image_id for image_id in predictions if image_id in self._by_image]:
            raise EvaluationError(
                f"images were evaluated before | where: {self._source} image_id={again[0]} | got {len(again)} again, "
                f"first {again[:5]} | fix: use a sampler that repeats none"
            )
        self._by_image |= {image_id: self._check(image_id, fields) for image_id, fields in predictions.items()}
        self._matches = None

    def load(self, path: Path | str) -> None:
        """Add the boxes of a COCO results file; an expected image that it does not name has no detections.

        Raises:
            EvaluationError: as `load_detections`, or as `update`.
        """
        loaded = load_detections(path, self.annotations)
        known_ids = self.annotations.image_ids
        refuse_unknown(np.unique(known_ids[loaded.image_index]).tolist(), self._expected, "image_id", f"file={path}")
        order = np.argsort(loaded.image_index, kind="stable")
        ends = np.searchsorted(loaded.image_index[order], np.arange(len(known_ids) + 1))
        for image_id in self.image_ids:
            index = self._image_index[image_id]
            rows = order[ends[index] : ends[index + 1]]
            self._by_image[image_id] = ImageDetections(
                loaded.labels[rows], loaded.scores[rows], loaded.boxes[rows], None
            )
        self._matches = None

    def _check(self, image_id: int, fields: Mapping[str, Any]) -> ImageDetections:
        return check_prediction(
            fields,
            category_ids=self.annotations.category_ids,
            size=tuple(self.annotations.sizes[self._image_index[image_id]].tolist()),
            iou_type=self.iou_type,
            where=f"{self._source} image_id={image_id}",
        )

    @property
    def collected(self) -> Detections:
        """All detections so far, packed into arrays."""
        image_ids = sorted(self._by_image)
        empty = ImageDetections(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4)), [])
        labels, scores, boxes, masks = zip(*(self._by_image[i] for i in image_ids), empty, strict=True)
        indices = np.array([self._image_index[image_id] for image_id in image_ids], dtype=np.int64)
        return Detections(
            image_index=np.repeat(indices, [len(of_image) for of_image in labels[:-1]]),
            labels=np.concatenate(labels),
            scores=np.concatenate(scores),
            boxes=np.concatenate(boxes),
            masks=[mask for of_image in masks for mask in of_image] if self.iou_type == "segm" else None,
        )

    @property
    def detections(self) -> list[Detection]:
        """All detections so far, as the list that a COCO results file holds; with masks, it has no boxes."""
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
        """Return the numbers over all expected images.

        Args:
            allow_partial: count images that were not evaluated as images without detections, instead of refusing.

        Raises:
            EvaluationError: images were not evaluated, and `allow_partial` is not set; the boxes are in another format.
        """
        if self.backend == "matching":
            numbers = average_precision(self.matches(allow_partial=allow_partial))
            of_stats, of_classes = (np.nan_to_num(v[:, 0], nan=-1).tolist() for v in (numbers.stats, numbers.per_class))
            stats = dict(zip(self.settings.stat_names, of_stats, strict=True))
        else:
            self._refuse_missing(allow_partial=allow_partial)
            images = np.array([self._image_index[image_id] for image_id in self.image_ids], dtype=np.int64)
            stats, per_class = pycocotools_stats(
                self.annotations, self._in_pixels(), images=images, iou_type=self.iou_type, settings=self.settings
            )
            of_classes = per_class.tolist()
        return CocoResult(
            stats=stats,
            per_class=dict(zip(self.annotations.category_names, of_classes, strict=True)),
            num_images=len(self._by_image),
            num_expected=len(self.image_ids),
            part=self.annotations.part,
            warnings=self.annotations.warnings,
            settings=self.settings,
        )

    def matches(self, *, allow_partial: bool = False) -> Matches:
        """Return the matches of all detections, for intervals, comparisons and reports; computed once.

        Raises:
            EvaluationError: as `compute`.
        """
        self._refuse_missing(allow_partial=allow_partial)
        if self._matches is None:
            self._matches = match(
                self.annotations,
                self._in_pixels(),
                image_ids=self.image_ids,
                iou_type=self.iou_type,
                settings=self.settings,
            )
        return self._matches

    def with_settings(self, settings: EvaluationSettings) -> "CocoEvaluator":
        """Return an evaluator of the same detections with other settings."""
        other = copy.copy(self)
        other.settings, other._by_image, other._matches = settings, dict(self._by_image), None
        return other

    def _refuse_missing(self, *, allow_partial: bool) -> None:
        missing = [image_id for image_id in self.image_ids if image_id not in self._by_image]
        if missing and not allow_partial:
            raise EvaluationError(
                f"images were not evaluated | where: {self._source} image_id={missing[0]} | "
                f"got {len(self._by_image)} of {len(self.image_ids)} images, first missing {missing[:5]} | "
                "fix: evaluate them, or allow_partial"
            )

    def _in_pixels(self) -> Detections:
        """Return all detections, unless their boxes are in another format."""
        collected = self.collected
        if self.iou_type == "bbox":
            refuse_other_formats(self.annotations, collected, f"detections for {self._source}")
        return collected
