"""The libraries that compute COCO's numbers, each given the same arrays; equal to 1e-9, which tests prove.

Images, categories and annotations are numbered from 1 before a library sees them: pycocotools takes a match with the
annotation 0 for no match, and faster-coco-eval passes ids as floating point.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.annotations import no_collection
from detr_backbone.coco.segmentations import EncodedMask
from detr_backbone.errors import EvaluationError

Backend: TypeAlias = Literal["pycocotools", "faster_coco_eval", "hotcoco"]
Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """N objects or detections in images 0 .. I - 1, of classes 0 .. K - 1.

    Attributes:
        image_index: int64 [N].
        labels: int64 [N].
        boxes: float64 [N, 4], xywh in pixels.
        areas: float64 [N].
        is_crowd: bool [N], for objects.
        scores: float64 [N], for detections.
        masks: N masks, where masks are compared.
    """

    image_index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    boxes: Numbers
    areas: Numbers
    is_crowd: npt.NDArray[np.bool_] | None = None
    scores: Numbers | None = None
    masks: list[EncodedMask] | None = None


def numbers_of(
    backend: Backend, objects: Regions, detections: Regions, *, sizes: npt.NDArray[np.int64], classes: int
) -> tuple[Numbers, Numbers]:
    """COCO's twelve numbers, and its precision [T, 101, K] over all areas with 100 detections; -1 without objects.

    Args:
        backend: the library.
        objects: the ground truth.
        detections: of the same images.
        sizes: int64 [I, 2], (h, w).
        classes: K.

    Raises:
        EvaluationError: the library is not installed.
    """
    try:
        coco_class, eval_class = _classes(backend)
    except ImportError as error:
        raise EvaluationError(
            f"a library is missing | where: key=backend | got {backend} | fix: pip install detr_backbone[fast-eval]"
        ) from error
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in enumerate(sizes.tolist(), start=1)]
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    pack = _columns if backend == "hotcoco" else _records
    with no_collection(), contextlib.redirect_stdout(io.StringIO()):
        truth, results = (pack(coco_class, images, categories, regions) for regions in (objects, detections))
        evaluation = eval_class(truth, results, "bbox" if objects.masks is None else "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.asarray(evaluation.stats, dtype=np.float64)[:12]
    return stats, np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]


def _classes(backend: Backend) -> tuple[Any, Any]:
    """The library's dataset and its evaluation."""
    if backend == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    if backend == "hotcoco":
        import hotcoco

        return hotcoco.COCO, hotcoco.COCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _records(coco_class: Any, images: list[Any], categories: list[Any], regions: Regions) -> Any:
    """The regions as one dict each."""
    count = len(regions.labels)
    crowd = np.zeros(count) if regions.is_crowd is None else regions.is_crowd
    columns = {
        "id": range(1, count + 1),
        "image_id": (regions.image_index + 1).tolist(),
        "category_id": (regions.labels + 1).tolist(),
        "bbox": regions.boxes.tolist(),
        "area": regions.areas.tolist(),
        "iscrowd": crowd.astype(int).tolist(),
    }
    if regions.scores is not None:
        columns["score"] = regions.scores.tolist()
    if regions.masks is not None:
        columns["segmentation"] = regions.masks
    coco = coco_class()
    coco.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }
    coco.createIndex()
    return coco


def _columns(coco_class: Any, images: list[Any], categories: list[Any], regions: Regions) -> Any:
    """The regions as arrays, which hotcoco takes without a dict for each."""
    ids = np.arange(1, len(regions.labels) + 1)
    if regions.scores is None:
        return coco_class.from_arrays(
            images,
            categories,
            regions.image_index + 1,
            regions.labels + 1,
            regions.boxes,
            ids=ids,
            area=regions.areas,
            iscrowd=regions.is_crowd,
            segmentation=regions.masks,
        )
    dataset = coco_class({"images": images, "categories": categories, "annotations": []})
    rows = np.column_stack([regions.image_index + 1, regions.boxes, regions.scores, regions.labels + 1])
    results = dataset.load_res(rows, segmentation=regions.masks)
    results.update_anns(ids=ids, area=regions.areas)
    return results
