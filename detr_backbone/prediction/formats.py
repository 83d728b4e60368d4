"""Detections in the forms that other programs read: records, COCO results, supervision."""

from typing import Any

from detr_backbone.prediction.predictor import Prediction


def prediction_records(prediction: Prediction, file_name: str) -> list[dict[str, Any]]:
    """Return one dict for each detection, with the names of its file and category; `bbox` is xywh in pixels."""
    return [
        {"file_name": file_name, "category_id": entry["category_id"], "category": name, **entry}
        for entry, name in zip(_entries(prediction), prediction.names, strict=True)
    ]


def coco_results(prediction: Prediction, image_id: int) -> list[dict[str, Any]]:
    """Return the detections as entries of a COCO results file; `bbox` is xywh in pixels.

    Source: https://cocodataset.org/#format-results
    """
    return [{"image_id": image_id, **entry} for entry in _entries(prediction)]


def to_supervision(prediction: Prediction) -> Any:
    """Return the detections as `supervision.Detections`, with the categories' names as `data["class_name"]`.

    supervision (`pip install supervision`) merges, counts and draws detections of any detector.
    """
    import numpy as np
    import supervision

    return supervision.Detections(
        xyxy=prediction.boxes.numpy().astype(np.float32),
        confidence=prediction.scores.numpy().astype(np.float32),
        class_id=prediction.category_ids.numpy().astype(int),
        data={"class_name": np.array(prediction.names, dtype=np.str_)},
    )


def _entries(prediction: Prediction) -> list[dict[str, Any]]:
    columns = (prediction.category_ids.tolist(), prediction.boxes.double().tolist(), prediction.scores.tolist())
    return [
        {"category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for category_id, (x1, y1, x2, y2), score in zip(*columns, strict=True)
    ]
