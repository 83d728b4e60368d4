"""The loss of a DETR-style detector: match queries to targets, then compare classes and boxes of the pairs.

All decoder layers are matched and compared at once, as tensors with a leading layer axis L, last layer last.

Source: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), section 3.1 and A.2; focal
label loss and losses of two-stage proposals as in Deformable DETR (https://arxiv.org/abs/2010.04159) and its code;
losses of noised queries as in DINO (https://arxiv.org/abs/2203.03605), section 3.3, and its code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from detr_backbone.detectors.denoising import noised_pairs
from detr_backbone.detectors.iou import generalized_iou, iou
from detr_backbone.detectors.label_loss import LabelLoss, focal_loss, matchability_aware_loss
from detr_backbone.detectors.matcher import HungarianMatcher, Match, Target
from detr_backbone.detectors.targets import check_values, targets_on
from detr_backbone.errors import NumericsError

_TRAINED = ("loss_ce", "loss_bbox", "loss_giou")


class SetCriterion(nn.Module):
    """Losses of every decoder layer, under the names of the published training logs.

    Args:
        num_classes: K, the number of real classes.
        matcher: assigns queries to targets.
        weight_dict: the weight of each loss that trains, by its full name: `{"loss_ce": 1.0, "loss_ce_0": 1.0, ...}`.
        label_loss: `cross_entropy`: of a softmax over K + 1 logits (DETR). Over K logits: `focal`, the sigmoid focal
            loss (Deformable DETR), or `mal`, the matchability-aware loss (DEIM).
        eos_coef: `cross_entropy` only: weight of the class "no object".
        focal_alpha: `focal` only: weight of a query's own class.
        classless_proposals: two-stage proposals learn label 0 for every object (Deformable DETR), not its class (DINO).
    """

    class_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        *,
        label_loss: Literal["cross_entropy"] | LabelLoss = "cross_entropy",
        eos_coef: float = 0.1,
        focal_alpha: float = 0.25,
        classless_proposals: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.label_loss = label_loss
        self.focal_alpha = focal_alpha
        self.classless_proposals = classless_proposals
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = eos_coef
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return scalars by name: the losses, and two metrics that do not train.

        `loss_ce`, `loss_bbox` (L1) and `loss_giou`, sums divided by the number of targets: its mean over all processes,
        at least 1. `class_error`: percentage of matched queries whose best class is another, 100 without targets.
        `cardinality_error`: mean distance between the number of targets and of queries whose best logit is not the last
        one; that says nothing for sigmoid logits, as published. Names end in `_{i}` for each decoder layer i but the
        last, in `_enc` for two-stage proposals, and in `_dn` and `_dn_{i}` for noised queries, whose sums are also
        divided by their number of groups.

        Args:
            outputs: `pred_logits` [B, Q, K + 1] (`cross_entropy`) or [B, Q, K]; `pred_boxes` [B, Q, 4] cxcywh as
                fractions of the image; optionally `aux_outputs`, a list of such dicts, `enc_outputs`, one of them, and
                `dn_outputs` as `DeformableDETR` returns them.
            targets: for each image `labels` int64 [N], `boxes` [N, 4] cxcywh as fractions of the image, and optionally
                `image_id`, used in messages. N is 0 for an image without objects.

        Raises:
            TypeError: labels are not integers.
            ValueError: shapes do not fit, or a label is outside 0 ... K - 1.
            NumericsError: a prediction is not finite, or a target box is not cxcywh as fractions of the image.
        """
        decoder = _stack([*outputs.get("aux_outputs", ()), outputs])
        proposals = _stack([outputs["enc_outputs"]]) if "enc_outputs" in outputs else None
        dn_outputs = outputs.get("dn_outputs")
        noised = None if dn_outputs is None else _stack([*dn_outputs.get("aux_outputs", ()), dn_outputs])
        self._check_shapes(*decoder, targets)
        targets = targets_on(decoder[0].device, targets)
        check_values([pair for pair in (decoder, proposals, noised) if pair is not None], targets, self.num_classes)

        counts = [len(target["labels"]) for target in targets]
        num_boxes = _mean_over_processes(sum(counts), decoder[0].device)
        by_layer = self._losses(*decoder, targets, num_boxes, self._match(*decoder, targets))
        class_error = by_layer.pop("class_error")[-1]
        losses = {"class_error": class_error, **_by_name(by_layer)}
        if proposals is not None:
            of_objects = targets
            if self.classless_proposals:
                of_objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
            by_layer = self._losses(*proposals, of_objects, num_boxes, self._match(*proposals, of_objects))
            del by_layer["class_error"]
            losses |= _by_name(by_layer, "_enc")
        if noised is not None and dn_outputs is not None:
            groups, layers = dn_outputs["groups"], len(noised[0])
            pairs = noised_pairs(counts, groups, layers)
            by_layer = self._losses(*noised, targets, num_boxes * groups, pairs, ignored=~dn_outputs["valid"])
            losses |= _by_name({name: by_layer[name] for name in _TRAINED}, "_dn")
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses, the scalar to train on.

        Raises:
            ValueError: a loss in `weight_dict` is missing.
            NumericsError: the sum is not finite; names the losses that are not.
        """
        missing = [name for name in self.weight_dict if name not in losses]
        if missing:
            raise ValueError(f"`losses` must hold every name in `weight_dict`, got none for {', '.join(missing)}")
        total = torch.stack([weight * losses[name] for name, weight in self.weight_dict.items()]).sum()
        if not total.isfinite():
            values = {name: float(losses[name]) for name in self.weight_dict if not losses[name].isfinite()}
            raise NumericsError(f"losses must be finite, got {values or float(total)}")
        return total

    def _match(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
        return _pairs(self.matcher.match_layers(logits, boxes, targets), [len(target["labels"]) for target in targets])

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        num_boxes: Tensor,
        pairs: Tensor,
        *,
        ignored: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return every scalar of `forward` as [L].

        Args:
            logits: [L, B, Q, ·].
            boxes: [L, B, Q, 4].
            targets: of the batch.
            num_boxes: what sums are divided by.
            pairs: layer, image, query and target (counted through the batch) of M pairs, [4, L, M].
            ignored: bool [B, Q], True on queries without label loss; None for none.
        """
        # From pageable memory a non-blocking copy is safe, and does not wait for the device.
        layer, image, query, target = pairs.to(logits.device, non_blocking=True)
        labels = torch.cat([target["labels"] for target in targets])[target]
        target_boxes = torch.cat([target["boxes"] for target in targets])[target]
        predicted = boxes[layer, image, query]

        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[layer, image, query] = labels
        quality = boxes.new_zeros(boxes.shape[:3])
        if self.label_loss == "mal":
            quality[layer, image, query] = iou(predicted.detach(), target_boxes)
        correct = (logits[layer, image, query].argmax(-1) == labels).float()
        num_predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
        num_objects = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device, non_blocking=True)
        return {
            "loss_ce": self._label_loss(logits, classes, quality, ignored, num_boxes),
            "class_error": 100 - 100 * correct.sum(1) / max(correct.shape[1], 1),
            "loss_bbox": F.l1_loss(predicted, target_boxes, reduction="none").sum((1, 2)) / num_boxes,
            "loss_giou": (1 - generalized_iou(predicted, target_boxes)).sum(1) / num_boxes,
            "cardinality_error": (num_predicted - num_objects).abs().float().mean(1),
        }

    def _label_loss(
        self, logits: Tensor, classes: Tensor, quality: Tensor, ignored: Tensor | None, num_boxes: Tensor
    ) -> Tensor:
        """Return the label loss [L], for classes [L, B, Q] of which K is "no object"."""
        if self.label_loss == "cross_entropy":
            loss = F.cross_entropy(logits.movedim(-1, 1), classes, weight=self.class_weight, reduction="none")
            return loss.sum((1, 2)) / self.class_weight[classes].sum((1, 2))
        if self.label_loss == "focal":
            loss = focal_loss(logits, classes, alpha=self.focal_alpha)
        else:
            loss = matchability_aware_loss(logits, classes, quality)
        if ignored is not None:
            loss = loss.masked_fill(ignored, 0)
        return loss.sum((1, 2)) / num_boxes

    def _check_shapes(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> None:
        softmax = self.label_loss == "cross_entropy"
        width = self.num_classes + softmax
        if logits.shape[-1] != width:
            kind = "K + 1" if softmax else "K"
            raise ValueError(
                f"`pred_logits` must be [B, Q, {kind}] with {kind} = {width}, got {list(logits.shape[1:])}"
            )
        if boxes.shape != (*logits.shape[:-1], 4):
            expected = [*logits.shape[1:-1], 4]
            raise ValueError(f"`pred_boxes` must be [B, Q, 4] = {expected}, got {list(boxes.shape[1:])}")
        if len(targets) != logits.shape[1]:
            raise ValueError(f"`targets` must hold one entry for each of {logits.shape[1]} images, got {len(targets)}")


def _stack(layers: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    logits = torch.stack([layer["pred_logits"] for layer in layers])
    boxes = torch.stack([layer["pred_boxes"] for layer in layers])
    return logits.float(), boxes.float()


def _by_name(by_layer: Mapping[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    """Return the scalars of every layer by name: the last layer's with the suffix, the others' with their index too."""
    losses = {f"{name}{suffix}": values[-1] for name, values in by_layer.items()}
    return losses | {
        f"{name}{suffix}_{i}": value for name, values in by_layer.items() for i, value in enumerate(values[:-1])
    }


def _pairs(matches: Sequence[Sequence[Match]], counts: Sequence[int]) -> Tensor:
    """Return layer, image, query and target (counted through the batch) of every matched pair, [4, L, M]."""
    layers = []
    for number, layer in enumerate(matches):
        pairs, before = [], 0
        for image, ((queries, targets), count) in enumerate(zip(layer, counts, strict=True)):
            index = torch.tensor([[number], [image]]).expand(2, len(queries))
            pairs.append(torch.cat([index, queries[None], targets[None] + before]))
            before += count
        layers.append(torch.cat(pairs, dim=1))
    return torch.stack(layers, dim=1)


def _mean_over_processes(count: int, device: torch.device) -> Tensor:
    mean = torch.full((), float(count), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean.clamp(min=1)
