"""Detections on a dataset, checked and packed into arrays, and the COCO results file that holds them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detr_backbone.coco.annotations import CocoAnnotations, read_json
from detr_backbone.coco.segmentations import EncodedMask
from detr_backbone.coco.typed_arrays import FloatArray, IntArray
from detr_backbone.errors import AnnotationError, EvaluationError


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """M detections on the images of a `CocoAnnotations`, in any order.

    Attributes:
        image_index: int64 [M], the index of the image in `image_ids`.
        labels: int64 [M], 0 .. K - 1.
        scores: float64 [M].
        boxes: float64 [M, 4], xywh in pixels of the original image.
        masks: M masks of their images' sizes, or None.
    """

    image_index: IntArray
    labels: IntArray
    scores: FloatArray
    boxes: FloatArray
    masks: Sequence[EncodedMask] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def areas(self) -> FloatArray:
        """float64 [M], in square pixels: of the masks, or of the boxes where there are none."""
        if self.masks is None:
            return self.boxes[:, 2] * self.boxes[:, 3]
        # One by one: under NumPy 2, pycocotools 2.0.11 overflows for more than 255 at once.
        return np.array([rle.area(mask) for mask in self.masks], dtype=np.float64)


def load_detections(path: Path | str, annotations: CocoAnnotations) -> Detections:
    """Return the boxes of a COCO results file, a list of `image_id`, `category_id`, `bbox` (xywh in pixels), `score`.

    Raises:
        EvaluationError: the file is no such list, names images or categories that the annotations do not have, or holds
            numbers that are not finite.
    """
    try:
        content = read_json(path)
    except AnnotationError as error:
        raise EvaluationError(str(error)) from error
    where = f"file={path}"
    if not isinstance(content, list):
        raise EvaluationError(f"results are not a list | where: {where} | got {type(content).__name__}")
    image_ids, category_ids = (_column(content, key, "an integer", where) for key in ("image_id", "category_id"))
    scores, boxes = _column(content, "score", "a number", where), _column(content, "bbox", "four numbers", where)
    boxes = boxes.reshape(-1, 4)
    if invalid := np.flatnonzero((boxes[:, 2:] < 0).any(axis=1)).tolist():
        raise EvaluationError(
            f"box has a negative side | where: {where} index={invalid[0]} key=bbox | got {boxes[invalid[0]].tolist()} "
            "expected x, y, w, h"
        )
    return Detections(
        image_index=indices_of(image_ids, annotations.image_ids, "image_id", where),
        labels=indices_of(category_ids, np.array(annotations.category_ids), "category_id", where),
        scores=scores,
        boxes=boxes,
    )


def indices_of(ids: IntArray, known: IntArray, key: str, where: str) -> IntArray:
    """Return the index of each id in `known`, which ascends.

    Raises:
        EvaluationError: ids are not known.
    """
    refuse_unknown(np.unique(ids).tolist(), known.tolist(), key, where)
    return np.searchsorted(known, ids).astype(np.int64)


def refuse_unknown(ids: Iterable[int], known: Collection[int], key: str, where: str) -> None:
    """Raise an EvaluationError for ids that are not among the known ones."""
    if unknown := sorted(set(ids).difference(known)):
        raise EvaluationError(
            f"ids are not in the ground truth | where: {where} key={key} | got {len(unknown)} unknown, "
            f"first {unknown[:5]} expected among the {len(known)} listed"
        )


def _column(entries: list[Any], key: str, expected: str, where: str) -> npt.NDArray[Any]:
    """Return one field of every entry: int64 [M], float64 [M] or, of four numbers, float64 [M, 4]; all finite."""
    values = [entry.get(key) if isinstance(entry, Mapping) else None for entry in entries]
    types = {int} if expected == "an integer" else {int, float}
    for index, value in enumerate(values):
        numbers = value if expected == "four numbers" and isinstance(value, list) else [value]
        if len(numbers) != (4 if expected == "four numbers" else 1) or not types.issuperset(map(type, numbers)):
            raise EvaluationError(
                f"detection is malformed | where: {where} index={index} key={key} | got {value!r} expected {expected}"
            )
    try:
        column = np.array(values, dtype=np.int64 if types == {int} else np.float64)
    except OverflowError as error:
        raise EvaluationError(f"number is too large | where: {where} key={key} | got {error}") from error
    if invalid := np.flatnonzero(
        ~np.isfinite(column.reshape(len(values), 4 if expected == "four numbers" else 1)).all(axis=1)
    ).tolist():
        raise EvaluationError(
            f"number is not finite | where: {where} index={invalid[0]} key={key} | got {column[invalid[0]]}"
        )
    return column
