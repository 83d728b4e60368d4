"""IoU and generalised IoU of boxes (cx, cy, w, h), pair by pair.

torchvision's `box_iou` and `generalized_box_iou` compare every box of a list with every other, and
`generalized_box_iou_loss` waits for the device.
"""

import torch
from torch import Tensor


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of boxes [..., 4] with boxes [..., 4], both cxcywh, under broadcasting; 0 where both are empty.

    >>> iou(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([[0.25, 0.25, 0.5, 0.5], [1.5, 0.5, 1, 1]]))
    tensor([0.2500, 0.0000])
    """
    intersection, union, _ = _areas(boxes, others)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalised IoU of boxes [..., 4] with boxes [..., 4], both cxcywh, under broadcasting.

    Two boxes without area that coincide have 0 here, not NaN.

    Source: https://arxiv.org/abs/1902.09630, algorithm 1.

    >>> generalized_iou(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([[0.25, 0.25, 0.5, 0.5], [1.5, 0.5, 1, 1]]))
    tensor([0.2500, 0.0000])
    """
    intersection, union, hull = _areas(boxes, others)
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _areas(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of intersection, union and the smallest box around both."""
    from torchvision.ops import box_convert

    boxes, others = box_convert(boxes, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy")
    (low, high), (other_low, other_high) = boxes.chunk(2, dim=-1), others.chunk(2, dim=-1)
    intersection = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(-1)
    union = (high - low).prod(-1) + (other_high - other_low).prod(-1) - intersection
    return intersection, union, hull
