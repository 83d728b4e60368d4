"""COCO datasets and detections, random ones and one of two images, and what pycocotools computes for them."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_backbone.coco.annotations import CocoAnnotations, parse_annotations
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import Matches, match
from detr_backbone.evaluation.settings import EvaluationSettings

HEIGHT, WIDTH = 96, 128

TOY = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in (1, 2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 12, "image_id": 1, "category_id": 1, "bbox": [100, 100, 60, 60], "area": 3600, "iscrowd": 1},
        {"id": 13, "image_id": 2, "category_id": 5, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0},
    ],
}


def random_set(
    rng: np.random.Generator, *, objects: bool = True, ties: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """12 images, one of them empty; 5 categories from 0 with gaps, one of them without objects; crowds; objects of 32^2
    and 96^2 square pixels; up to 130 detections of one class in an image, with equal scores on request.

    Gives the content of an annotation file and of a results file.
    """
    categories = (0, 2, 3, 7, 90)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    images = [{"id": 3 * i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(12)]
    for image in images[1:]:
        for _ in range(rng.integers(0, 7) if objects else 0):
            box = [*rng.uniform(0, 60, 2).round(1), *rng.uniform(4, 60, 2).round(1)]
            area = rng.choice([box[2] * box[3], 32.0**2, 96.0**2])
            category = int(rng.choice(categories[:-1]))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = np.maximum(np.array(box) + rng.normal(0, 2, 4), 1).round(1)
                results.append({"image_id": image["id"], "category_id": category, "bbox": near.tolist()})
        for _ in range(rng.integers(0, 8)):
            other = int(rng.choice(categories))
            box = [*rng.uniform(0, 60, 2), *rng.choice([10, 32, 96], 2)]
            results.append({"image_id": image["id"], "category_id": other, "bbox": list(map(float, box))})
    results += [{"image_id": 3, "category_id": 2, "bbox": [1.0, 2.0, 30.0, 40.0]} for _ in range(130)]
    scores = rng.permutation(len(results)) / len(results)
    for result, score in zip(results, scores.round(1) if ties else scores, strict=True):
        result["score"] = float(score)
    categories_listed = [{"id": i, "name": f"class {i}"} for i in categories]
    return {"images": images, "categories": categories_listed, "annotations": annotations}, results


def with_masks(rng: np.random.Generator, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a ragged mask in each box instead of the box."""
    masked = []
    for entry in entries:
        x, y, w, h = (round(number) for number in entry["bbox"])
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[y : y + h, x : x + w] = 1
        mask &= rng.random(mask.shape) < 0.9
        encoded = rle.encode(np.asfortranarray(mask))
        masked.append({**entry, "segmentation": {**encoded, "counts": encoded["counts"].decode()}})
    return masked


def plain_pycocotools(
    content: dict[str, Any], results: Sequence[Mapping[str, Any]], iou_type: str = "bbox"
) -> tuple[np.ndarray, np.ndarray]:
    """The twelve numbers and the AP of each category as pycocotools gives them, -1 for none."""
    evaluation = _evaluate((COCO, COCOeval), content, results, iou_type)
    precision = np.moveaxis(evaluation.eval["precision"][:, :, :, 0, -1], 2, 0).reshape(len(content["categories"]), -1)
    per_class = [values[values > -1].mean() if (values > -1).any() else -1.0 for values in precision]
    return evaluation.stats, np.array(per_class)


def pycocotools_precision_and_recall(
    content: dict[str, Any], results: Sequence[Mapping[str, Any]], settings: EvaluationSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, 101, K, A, M] and recall [T, K, A, M] of pycocotools with other parameters, -1 for none."""
    areas = {"all": (0, 1e5**2), **settings.area_ranges}

    def configure(params: Any) -> None:
        params.iouThrs, params.maxDets = np.array(settings.iou_thresholds), list(settings.max_dets)
        params.areaRng, params.areaRngLbl = [list(limits) for limits in areas.values()], list(areas)

    evaluation = _evaluate((COCO, COCOeval), content, results, "bbox", configure)
    return evaluation.eval["precision"], evaluation.eval["recall"]


def peer_stats(
    library: str, content: dict[str, Any], results: Sequence[Mapping[str, Any]], iou_type: str
) -> list[float]:
    """The twelve numbers as another library computes them."""
    if library == "hotcoco":
        import hotcoco

        return list(_evaluate((hotcoco.COCO, hotcoco.COCOeval), content, results, iou_type).stats)[:12]
    import faster_coco_eval

    classes = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    return list(_evaluate(classes, content, results, iou_type).stats)[:12]


def _evaluate(
    library: tuple[Any, Any],
    content: dict[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    configure: Callable[[Any], None] | None = None,
) -> Any:
    """The evaluation of a results file; annotations are numbered from 1, as a match with the id 0 counts as none."""
    coco_class, eval_class = library
    annotations = [{**entry, "id": number} for number, entry in enumerate(content["annotations"], start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        if coco_class is COCO:
            truth = COCO()
            truth.dataset = {**content, "annotations": annotations}
            truth.createIndex()
        else:
            truth = coco_class({**content, "annotations": annotations})
        copies = [dict(result) for result in results]
        load = truth.load_res if hasattr(truth, "load_res") else truth.loadRes
        evaluation = eval_class(truth, load(copies) if copies else COCO(), iou_type)
        if configure is not None:
            configure(evaluation.params)
        evaluation.evaluate()
        evaluation.accumulate()
        if configure is None:
            evaluation.summarize()
    return evaluation


def packed(truth: CocoAnnotations, results: list[dict[str, Any]]) -> Detections:
    """The content of a results file as the arrays that evaluation works on."""
    return Detections(
        image_index=np.searchsorted(truth.image_ids, [one["image_id"] for one in results]).astype(np.int64),
        labels=np.searchsorted(truth.category_ids, [one["category_id"] for one in results]).astype(np.int64),
        scores=np.array([one["score"] for one in results]),
        boxes=np.array([one["bbox"] for one in results], dtype=np.float64).reshape(-1, 4),
    )


def matched(content: dict[str, Any], results: list[dict[str, Any]], **options: Any) -> Matches:
    """The content of a results file matched with the objects of an annotation file's content."""
    truth = parse_annotations(content, source="<test>")
    return match(truth, packed(truth, results), **options)
