"""COCO average precision that cannot be flattered by what is missing or not a number.

pycocotools computes the numbers. Left alone it gives AP 1.0 to NaN boxes, scores whichever images it is told to, and
never matches a ground truth whose id is 0; so this evaluator knows which images to expect, refuses predictions that are
not boxes, and hands out ids of its own.

Source: https://cocodataset.org/#detection-eval
"""

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations, parse_annotations
from detr_backbone.errors import EvaluationError

STATS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


class Detection(TypedDict):
    """One entry of a COCO results file."""

    image_id: int
    category_id: int
    bbox: list[float]
    """x, y, w, h in pixels of the original image."""
    score: float


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

    def table(self) -> str:
        """The numbers as lines of text, in percent, `-` where there is no ground truth."""
        lines = [f"images {self.num_images} of {self.num_expected}"]
        lines += [f"subset {self.part}"] if self.part else []
        for numbers in (self.stats, self.per_class):
            width = max(map(len, numbers))
            lines += [f"{name:<{width}} {_percent(value)}" for name, value in numbers.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


class CocoEvaluator:
    """Collects the detections of every image of a dataset, then computes COCO's numbers.

    As in pycocotools, the 100 best detections of each class count in each image.

    Args:
        annotations: a COCO file, its parsed content, or what `CocoDetection.annotations` holds.
        image_ids: the images that will be evaluated, for a part of a dataset; None takes all.

    Raises:
        AnnotationError: the annotations contradict themselves or the COCO format.
        EvaluationError: an image id is unknown.
    """

    def __init__(
        self, annotations: CocoAnnotations | Mapping[str, Any] | Path | str, *, image_ids: Sequence[int] | None = None
    ) -> None:
        if isinstance(annotations, Mapping):
            annotations = parse_annotations(annotations, source="<mapping>")
        elif not isinstance(annotations, CocoAnnotations):
            annotations = load_annotations(annotations)
        self.annotations = annotations
        known = annotations.image_ids.tolist()
        self.image_ids: tuple[int, ...] = tuple(known if image_ids is None else sorted(set(image_ids)))
        self._expected = frozenset(self.image_ids)
        self._source = f"file={annotations.source}"
        _refuse_unknown(self.image_ids, known, "image_ids", self._source)
        self._detections: dict[int, list[Detection]] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the predictions of some images, all of them or none.

        Args:
            predictions: by image id, `scores` [M], `labels` [M] as category ids of the dataset, and `boxes` [M, 4] as
                xyxy in pixels of the original image. An image without detections has empty tensors.

        Raises:
            EvaluationError: an image is not expected or was seen before; a category is unknown; lengths do not fit;
                a number is not finite; a box ends before it starts.
        """
        _refuse_unknown(predictions, self._expected, "image_id", self._source)
        if again := [image_id for image_id in predictions if image_id in self._detections]:
            raise EvaluationError(
                f"images were evaluated before | where: {self._source} image_id={again[0]} | got {len(again)} again, "
                f"first {again[:5]} | fix: use a sampler that repeats none"
            )
        self._detections |= {image_id: self._checked(image_id, fields) for image_id, fields in predictions.items()}

    @property
    def detections(self) -> list[Detection]:
        """Everything collected, as the list that a COCO results file holds."""
        return [detection for image_id in sorted(self._detections) for detection in self._detections[image_id]]

    def compute(self, *, allow_partial: bool = False) -> CocoResult:
        """The numbers over all expected images.

        Args:
            allow_partial: count images that were not seen as images without detections, instead of refusing.

        Raises:
            EvaluationError: images were not seen, and `allow_partial` is not set.
        """
        missing = [image_id for image_id in self.image_ids if image_id not in self._detections]
        if missing and not allow_partial:
            raise EvaluationError(
                f"images were not evaluated | where: {self._source} image_id={missing[0]} | "
                f"got {len(self._detections)} of {len(self.image_ids)} images, first missing {missing[:5]} | "
                "fix: evaluate them, or allow_partial"
            )
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._ground_truth(), self._results(), "bbox")
            evaluation.params.imgIds = list(self.image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], any area, 100 detections
        per_class = {
            name: float(values[values > -1].mean()) if (values > -1).any() else -1.0
            for name, values in zip(self.annotations.category_names, np.moveaxis(precision, -1, 0), strict=True)
        }
        stats = dict(zip(STATS, map(float, evaluation.stats), strict=True))
        return CocoResult(
            stats=stats,
            per_class=per_class,
            num_images=len(self._detections),
            num_expected=len(self.image_ids),
            part=self.annotations.part,
        )

    def _checked(self, image_id: int, fields: Mapping[str, Tensor]) -> list[Detection]:
        where = f"{self._source} image_id={image_id}"
        if missing := [key for key in ("scores", "labels", "boxes") if key not in fields]:
            raise EvaluationError(
                f"prediction lacks {missing} | where: {where} key={missing[0]} | got {sorted(fields)}"
            )
        scores, labels, boxes = (fields[key].detach().cpu() for key in ("scores", "labels", "boxes"))
        count = scores.numel()
        for key, tensor, shape in (
            ("scores", scores, [count]),
            ("labels", labels, [count]),
            ("boxes", boxes, [count, 4]),
        ):
            if list(tensor.shape) != shape:
                raise EvaluationError(
                    f"lengths do not fit | where: {where} key={key} | got {list(tensor.shape)} expected {shape}"
                )
            if bad := int((~torch.isfinite(tensor)).sum()):
                raise EvaluationError(
                    f"numbers are not finite | where: {where} key={key} | got {bad} of {tensor.numel()}"
                )
        if labels.is_floating_point():
            raise EvaluationError(f"category ids are not integers | where: {where} key=labels | got {labels.dtype}")
        _refuse_unknown(labels.tolist(), self.annotations.category_ids, "labels", where)
        boxes = boxes.double()
        sides = boxes[:, 2:] - boxes[:, :2]
        for index in (sides < 0).any(dim=1).nonzero().flatten().tolist():
            raise EvaluationError(
                f"box ends before it starts | where: {where} key=boxes index={index} | got {boxes[index].tolist()} "
                "expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
            )
        xywh = torch.cat([boxes[:, :2], sides], dim=1)
        return [
            Detection(image_id=image_id, category_id=label, bbox=box, score=score)
            for label, box, score in zip(labels.tolist(), xywh.tolist(), scores.tolist(), strict=True)
        ]

    def _ground_truth(self) -> COCO:
        truth = self.annotations
        entries = [
            {
                "image_id": image_id,
                "category_id": truth.category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for image_id, label, box, area, crowd in zip(
                truth.image_ids[truth.image_index].tolist(),
                truth.labels.tolist(),
                truth.boxes.tolist(),
                truth.areas.tolist(),
                truth.is_crowd.tolist(),
                strict=True,
            )
        ]
        return self._coco(entries)

    def _results(self) -> COCO:
        return self._coco(
            [{**found, "area": found["bbox"][2] * found["bbox"][3], "iscrowd": 0} for found in self.detections]
        )

    def _coco(self, entries: Sequence[Mapping[str, Any]]) -> COCO:
        """What pycocotools reads; annotation ids from 1, since it takes a match with the id 0 for no match."""
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in self.image_ids],
            "categories": [{"id": category_id} for category_id in self.annotations.category_ids],
            "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, start=1)],
        }
        coco.createIndex()
        return coco


def _refuse_unknown(ids: Mapping[int, Any] | Sequence[int], known: Collection[int], key: str, where: str) -> None:
    if unknown := sorted(set(ids).difference(known)):
        raise EvaluationError(
            f"ids are not in the ground truth | where: {where} key={key} | got {len(unknown)} unknown, "
            f"first {unknown[:5]} expected among the {len(known)} listed"
        )


def _percent(value: float) -> str:
    return "    -" if value < 0 else f"{100 * value:5.1f}"
