"""What a detector found in a dataset, checked and packed into arrays."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle

from detr_backbone.coco.annotations import CocoAnnotations, read_json
from detr_backbone.coco.segmentations import EncodedMask
from detr_backbone.errors import AnnotationError, EvaluationError


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """M detections on the images of a `CocoAnnotations`, in any order.

    Attributes:
        image_index: int64 [M], the place of each one's image in `image_ids`.
        labels: int64 [M], 0 .. K - 1.
        scores: float64 [M].
        boxes: float64 [M, 4], xywh in pixels of the original image.
        masks: M masks of their images' sizes, or None.
    """

    image_index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float64]
    masks: Sequence[EncodedMask] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def areas(self) -> npt.NDArray[np.float64]:
        """float64 [M], in square pixels: of the masks, or of the boxes where there are none."""
        if self.masks is None:
            return self.boxes[:, 2] * self.boxes[:, 3]
        # One by one: under NumPy 2, pycocotools 2.0.11 overflows for more than 255 at once.
        return np.array([rle.area(mask) for mask in self.masks], dtype=np.float64)


def load_detections(path: Path | str, annotations: CocoAnnotations) -> Detections:
    """The boxes of a COCO results file: a list of `image_id`, `category_id`, `bbox` (xywh in pixels) and `score`.

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
    columns = [_column(content, key, shape, where) for key, shape in (("image_id", ()), ("category_id", ()))]
    image_ids, category_ids = (column.astype(np.int64) for column in columns)
    scores, boxes = _column(content, "score", (), where), _column(content, "bbox", (4,), where)
    for key, ids, integers in zip(("image_id", "category_id"), columns, (image_ids, category_ids), strict=True):
        if wrong := np.flatnonzero(ids != integers).tolist():
            raise EvaluationError(
                f"id is not an integer | where: {where} index={wrong[0]} key={key} | got {ids[wrong[0]]}"
            )
    if wrong := np.flatnonzero((boxes[:, 2:] < 0).any(axis=1)).tolist():
        raise EvaluationError(
            f"box has a negative side | where: {where} index={wrong[0]} key=bbox | got {boxes[wrong[0]].tolist()} "
            "expected x, y, w, h"
        )
    return Detections(
        image_index=places_of(image_ids, annotations.image_ids, "image_id", where),
        labels=places_of(category_ids, np.array(annotations.category_ids), "category_id", where),
        scores=scores,
        boxes=boxes,
    )


def places_of(ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64], key: str, where: str) -> npt.NDArray[np.int64]:
    """The place of each id in `known`, which ascends.

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


def _column(entries: list[Any], key: str, shape: tuple[int, ...], where: str) -> npt.NDArray[np.float64]:
    """One field of every entry as finite numbers [M, *shape]."""
    expected = "four numbers x, y, w, h" if shape else "a number"
    try:
        values = np.array([entry[key] for entry in entries], dtype=np.float64).reshape(len(entries), *shape)
    except (KeyError, TypeError, ValueError, OverflowError):
        for index, entry in enumerate(entries):
            got = entry.get(key) if isinstance(entry, Mapping) else entry
            numbers = got if shape and isinstance(got, list) else [got]
            if len(numbers) != (shape or (1,))[0] or not all(type(number) in (int, float) for number in numbers):
                raise EvaluationError(
                    f"detection is malformed | where: {where} index={index} key={key} | got {got!r} expected {expected}"
                ) from None
        raise
    if wrong := np.flatnonzero(~np.isfinite(values.reshape(len(entries), -1)).all(axis=1)).tolist():
        raise EvaluationError(
            f"number is not finite | where: {where} index={wrong[0]} key={key} | got {values[wrong[0]]}"
        )
    return values
