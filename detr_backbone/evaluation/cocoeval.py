"""COCO's numbers as pycocotools computes them: the reference.

Images, categories and annotations are numbered from 1 for it: pycocotools reads a match with the annotation 0 as no
match.
"""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations, pause_garbage_collection
from detr_backbone.coco.typed_arrays import FloatArray, IntArray
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import IouType, segmentations_of
from detr_backbone.evaluation.settings import EvaluationSettings


def pycocotools_stats(
    annotations: CocoAnnotations,
    detections: Detections,
    *,
    images: IntArray,
    iou_type: IouType,
    settings: EvaluationSettings,
) -> tuple[dict[str, float], FloatArray]:
    """Return the results by name, and the AP of each class, float64 [K]; -1 without objects.

    Args:
        annotations: the ground truth.
        detections: on the same images.
        images: the images that count, as indices in `annotations.image_ids`, ascending.
        iou_type: overlap of boxes or of masks.
        settings: which matches count.
    """
    from pycocotools.cocoeval import COCOeval

    rows = np.flatnonzero(np.isin(annotations.image_index, images))
    objects = {
        "image_id": annotations.image_index[rows] + 1,
        "category_id": annotations.labels[rows] + 1,
        "bbox": annotations.boxes[rows],
        "area": annotations.areas[rows],
        "iscrowd": annotations.is_crowd[rows].astype(int),
    }
    columns = {
        "image_id": detections.image_index + 1,
        "category_id": detections.labels + 1,
        "bbox": detections.boxes,
        "area": detections.areas,
        "iscrowd": np.zeros(len(detections), int),
        "score": detections.scores,
    }
    masks, object_masks = None, None
    if iou_type == "segm":
        segmentations = segmentations_of(annotations)
        masks, object_masks = detections.masks, [segmentations[row] for row in rows.tolist()]
    with pause_garbage_collection(), contextlib.redirect_stdout(io.StringIO()):
        truth, results = (
            _coco(annotations, images, table, regions) for table, regions in ((objects, object_masks), (columns, masks))
        )
        evaluation = COCOeval(truth, results, iou_type)
        evaluation.params.iouThrs = settings.thresholds
        evaluation.params.maxDets = list(settings.max_dets)
        evaluation.params.areaRng = settings.areas.tolist()
        evaluation.params.areaRngLbl = ["all", *settings.area_ranges]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # [T, 101, K, A, M], [T, K, A, M]
    stats = {}
    for name, is_recall, area, threshold, max_dets in settings.stats:
        chosen = slice(None) if threshold is None else [threshold]
        values = (recall if is_recall else precision)[chosen][..., area, settings.max_dets.index(max_dets)]
        stats[name] = _mean(values)
    per_class = [_mean(values) for values in np.moveaxis(precision[:, :, :, 0, -1], -1, 0)]
    return stats, np.array(per_class)


def _mean(values: FloatArray) -> float:
    values = values[values > -1]
    return float(np.mean(values)) if len(values) else -1.0


def _coco(annotations: CocoAnnotations, images: IntArray, columns: Mapping[str, Any], masks: Any) -> Any:
    """Return objects or detections as the dataset that pycocotools reads."""
    from pycocotools.coco import COCO

    lists = {"id": range(1, len(columns["area"]) + 1)} | {name: values.tolist() for name, values in columns.items()}
    if masks is not None:
        lists["segmentation"] = masks
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": index + 1, "height": height, "width": width}
            for index, (height, width) in zip(images.tolist(), annotations.sizes[images].tolist(), strict=True)
        ],
        "categories": [{"id": label + 1} for label in range(len(annotations.category_ids))],
        "annotations": [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)],
    }
    coco.createIndex()
    return coco
