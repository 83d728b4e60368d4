"""Bipartite matching: the one-to-one assignment of queries to targets of the least cost, image by image.

Source: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), section 3.1; the focal class
cost is that of Deformable DETR's published code (https://arxiv.org/abs/2010.04159).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detr_backbone.detectors.iou import generalized_iou
from detr_backbone.errors import NumericsError

Target: TypeAlias = Mapping[str, Any]
Match: TypeAlias = tuple[Tensor, Tensor]

FOCAL_ALPHA, FOCAL_GAMMA, FOCAL_EPS = 0.25, 2.0, 1e-8


class HungarianMatcher(nn.Module):
    """Assigns each target the query that predicts it best, no query twice.

    The cost of a pair is `cost_class` times the class cost, plus `cost_bbox` times the L1 distance of the boxes, plus
    `cost_giou` times their negative GIoU, in float32 whatever the predictions' type.

    Args:
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance between (cx, cy, w, h) as fractions of the image.
        cost_giou: weight of the negative generalised IoU.
        focal: class cost from the sigmoid focal loss (Deformable DETR), not from the softmax probability (DETR).

    Raises:
        ValueError: all three weights are 0.

    >>> logits, boxes = torch.tensor([[[9.0, 0, 0], [0, 9, 0]]]), torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7] * 4]])
    >>> target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.7, 0.7, 0.7, 0.7]])}
    >>> HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, [target])
    [(tensor([1]), tensor([0]))]
    """

    def __init__(
        self, cost_class: float = 1.0, cost_bbox: float = 1.0, cost_giou: float = 1.0, *, focal: bool = False
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("one of `cost_class`, `cost_bbox` and `cost_giou` must not be 0, got 0 for all")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.focal = focal

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> list[Match]:
        """Return query and target indices of each image's matched pairs, on the CPU, queries ascending.

        Args:
            outputs: `pred_logits` [B, Q, K] (one more for "no object" unless `focal`), `pred_boxes` [B, Q, 4] cxcywh.
            targets: for each image `labels` int64 [N], `boxes` [N, 4] cxcywh as fractions of the image, and optionally
                `image_id`, used in messages.

        Raises:
            NumericsError: a cost is NaN or infinite; names the term and the images.
        """
        return self.match_layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)[0]

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[list[Match]]:
        """Return what `forward` does, for the predictions of L decoder layers at once: [L, B, Q, K] and [L, B, Q, 4].

        Waits for the device once. Where an image has more targets than queries, the most expensive targets stay
        unmatched, with a warning.
        """
        counts = [len(target["labels"]) for target in targets]
        _warn_about_unmatched_targets(targets, counts, queries=logits.shape[2])
        terms = self._terms(logits, boxes, targets, counts)
        cost = (terms["class"] + terms["L1"] + terms["GIoU"]).cpu()
        if not torch.isfinite(cost).all():
            raise NumericsError(_describe_non_finite(terms, targets, counts))
        per_image = [block.transpose(1, 2).double().numpy() for block in torch.split(cost, counts, dim=1)]
        return [[_assign(block[layer]) for block in per_image] for layer in range(len(logits))]

    def _terms(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[Target], counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return weighted costs [L, T, Q] of all T targets in the batch, each against the queries of its own image."""
        device = logits.device
        image = torch.repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
        labels = torch.cat([target["labels"] for target in targets]).to(device, torch.int64)
        target_boxes = torch.cat([target["boxes"] for target in targets]).to(device, torch.float32).reshape(-1, 1, 4)
        predicted = boxes.float()[:, image]
        class_cost = self._class_cost(logits.float(), image, labels)
        return {
            "class": self.cost_class * class_cost,
            "L1": self.cost_bbox * (predicted - target_boxes).abs().sum(-1),
            "GIoU": -self.cost_giou * generalized_iou(predicted, target_boxes),
        }

    def _class_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        p = logits.sigmoid() if self.focal else logits.softmax(-1)
        p = p[:, image, :, labels].transpose(0, 1)
        if not self.focal:
            return -p
        positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + FOCAL_EPS).log()
        negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + FOCAL_EPS).log()
        return positive - negative

    def extra_repr(self) -> str:
        """Return the weights and the kind of class cost, for `repr`."""
        costs = f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"
        return f"{costs}, focal={self.focal}"


def image_name(targets: Sequence[Target], index: int) -> str:
    """Return an image's name for messages: its `image_id` where the target has one, else its index in the batch."""
    image_id = targets[index].get("image_id")
    return f"image {index} of the batch" if image_id is None else f"image_id {int(image_id)}"


def _assign(cost: NDArray[np.float64]) -> Match:
    from scipy.optimize import linear_sum_assignment

    queries, matched = linear_sum_assignment(cost)
    return torch.from_numpy(queries), torch.from_numpy(matched)


def _warn_about_unmatched_targets(targets: Sequence[Target], counts: Sequence[int], *, queries: int) -> None:
    for index, count in enumerate(counts):
        if count > queries:
            warnings.warn(
                f"{image_name(targets, index)} has {count} targets for {queries} queries: {count - queries} of them "
                "train nothing; raise `num_queries`",
                stacklevel=2,
            )


def _describe_non_finite(terms: Mapping[str, Tensor], targets: Sequence[Target], counts: list[int]) -> str:
    bad_terms, bad_images = [], []
    for name, term in terms.items():
        blocks = [bool(block.isfinite().all()) for block in torch.split(term, counts, dim=1)]
        if not all(blocks):
            bad_terms.append(name)
            bad_images += [index for index, finite in enumerate(blocks) if not finite]
    images = ", ".join(image_name(targets, index) for index in sorted(set(bad_images)))
    return (
        f"matching cost must be finite, got NaN or infinity in the {', '.join(bad_terms)} cost of {images}; look for "
        "what made `pred_logits` or `pred_boxes` NaN: learning rate, precision, an input image"
    )
