"""Targets of a batch as the losses take them, and the predictions they are compared with, both checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_backbone.detectors.matcher import Target, image_name
from detr_backbone.errors import NumericsError

BORDER = 0.01  # how far, in image sizes, a target box may reach over the border: rounded annotations do, by a pixel


def targets_on(device: torch.device, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return targets on `device` with labels int64 [N] and boxes float32 [N, 4]; N is 0 for empties of any shape.

    Raises:
        TypeError: labels are not integers.
        ValueError: shapes do not fit.
    """
    return [_target_on(device, targets, index) for index in range(len(targets))]


def check_values(predictions: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Target], num_classes: int) -> None:
    """Refuse predictions and targets whose values no loss can be computed from.

    Args:
        predictions: pairs of logits [L, B, Q, ·] and boxes [L, B, Q, 4].
        targets: as `targets_on` returns them.
        num_classes: K.

    Raises:
        ValueError: a label is outside 0 … K - 1.
        NumericsError: a prediction is not finite, or a target box is not cxcywh as fractions of the image.
    """
    # One wait for the device where all values are valid; only an invalid one costs more.
    flags = [tensor.isfinite().all() for pair in predictions for tensor in pair]
    flags.append(_are_classes(torch.cat([target["labels"] for target in targets]), num_classes).all())
    flags.append(_are_normalised(torch.cat([target["boxes"] for target in targets])).all())
    if torch.stack(flags).all():
        return
    for logits, boxes in predictions:
        for name, tensor in (("pred_logits", logits), ("pred_boxes", boxes)):
            finite = tensor.isfinite().flatten(2).all(2).all(0).tolist()
            images = ", ".join(image_name(targets, index) for index, is_finite in enumerate(finite) if not is_finite)
            if images:
                raise NumericsError(f"`{name}` must be finite, got NaN or infinity for {images}")
    for index, target in enumerate(targets):
        labels, boxes, where = target["labels"], target["boxes"], f"of {image_name(targets, index)}"
        for entry in (~_are_classes(labels, num_classes)).nonzero().flatten().tolist():
            raise ValueError(
                f"`labels[{entry}]` {where} must be within 0 ... {num_classes - 1}, got {int(labels[entry])}; category "
                "ids of a dataset must be mapped to contiguous labels"
            )
        for entry in (~_are_normalised(boxes)).nonzero().flatten().tolist():
            box = boxes[entry].tolist()
            raise NumericsError(
                f"`boxes[{entry}]` {where} must be (cx, cy, w, h) as fractions of the image, got {box}; "
                f"{_suggest_fix(box)}"
            )


def _target_on(device: torch.device, targets: Sequence[Target], index: int) -> dict[str, Any]:
    labels, boxes = targets[index]["labels"], targets[index]["boxes"]
    if not labels.numel() and not boxes.numel():
        labels, boxes = labels.new_zeros(0, dtype=torch.int64), boxes.new_zeros(0, 4)
    where = f"of {image_name(targets, index)}"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` {where} must be integers, got {labels.dtype}")
    if labels.ndim != 1 or boxes.shape != (len(labels), 4):
        raise ValueError(
            f"`labels` [N] and `boxes` [N, 4] {where} must fit each other, got {list(labels.shape)} and "
            f"{list(boxes.shape)}"
        )
    labels = labels.to(device, torch.int64, non_blocking=True)
    return {**targets[index], "labels": labels, "boxes": boxes.to(device, torch.float32, non_blocking=True)}


def _are_classes(labels: Tensor, num_classes: int) -> Tensor:
    return (labels >= 0) & (labels < num_classes)


def _are_normalised(boxes: Tensor) -> Tensor:
    centre, size = boxes.chunk(2, dim=-1)
    inside = (centre - size / 2 >= -BORDER) & (centre + size / 2 <= 1 + BORDER)
    return (inside & (size >= 0)).all(-1)


def _suggest_fix(box: Sequence[float]) -> str:
    if max(box) > 1 + 2 * BORDER:
        return "they seem to be pixels: divide by the image's width and height"
    if min(box[2:]) < 0:
        return "width and height must not be negative"
    return "it reaches over the border: if it is (x1, y1, x2, y2), convert it, otherwise clip it to the image"
