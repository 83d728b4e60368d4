"""The loss of a DETR-style detector: match queries to targets, then compare classes and boxes of the pairs.

All decoder layers are matched and compared at once, as tensors with a leading layer axis L, last layer last.

Source: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), section 3.1 and A.2; focal
label loss and losses of two-stage proposals as in Deformable DETR (https://arxiv.org/abs/2010.04159) and its code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from detr_backbone.detectors.matcher import FOCAL_GAMMA, HungarianMatcher, Match, Target, generalized_iou, image_name
from detr_backbone.errors import NumericsError

BORDER = 0.01  # how far, in image sizes, a target box may reach over the border: rounded annotations do, by a pixel


class SetCriterion(nn.Module):
    """Losses of every decoder layer, under the names of the published training logs.

    Args:
        num_classes: K, the number of real classes.
        matcher: assigns queries to targets.
        weight_dict: the weight of each loss that trains, by its full name: `{"loss_ce": 1.0, "loss_ce_0": 1.0, ...}`.
        eos_coef: weight of the class "no object" in the softmax cross entropy.
        focal_alpha: label loss by sigmoid focal loss with this alpha, over K logits; None: by softmax cross entropy,
            over K + 1.
    """

    class_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        *,
        eos_coef: float = 0.1,
        focal_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.focal_alpha = focal_alpha
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = eos_coef
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return scalars by name: the losses, and two metrics that do not train.

        `loss_ce`, `loss_bbox` (L1) and `loss_giou`, sums divided by the number of targets: its mean over all processes,
        at least 1. `class_error`: percentage of matched queries whose best class is another, 100 without targets.
        `cardinality_error`: mean distance between the number of targets and of queries whose best logit is not the last
        one; that says nothing for sigmoid logits, as published. Names end in `_{i}` for each decoder layer i but the
        last, and in `_enc` for two-stage proposals, where every label counts as 0.

        Args:
            outputs: `pred_logits` [B, Q, K + 1], or [B, Q, K] with `focal_alpha`; `pred_boxes` [B, Q, 4] cxcywh as
                fractions of the image; optionally `aux_outputs`, a list of such dicts, and `enc_outputs`, one of them.
            targets: for each image `labels` int64 [N], `boxes` [N, 4] cxcywh as fractions of the image, and optionally
                `image_id`, used in messages. N is 0 for an image without objects.

        Raises:
            TypeError: labels are not integers.
            ValueError: shapes do not fit, or a label is outside 0 ... K - 1.
            NumericsError: a prediction is not finite, or a target box is not cxcywh as fractions of the image.
        """
        decoder = _stack([*outputs.get("aux_outputs", ()), outputs])
        proposals = _stack([outputs["enc_outputs"]]) if "enc_outputs" in outputs else None
        self._check_shapes(*decoder, targets)
        targets = [_to_device(targets, index, decoder[0].device) for index in range(len(targets))]
        _check_values([decoder] if proposals is None else [decoder, proposals], targets, self.num_classes)

        num_boxes = _mean_over_processes(sum(len(target["labels"]) for target in targets), decoder[0].device)
        by_layer = self._losses(*decoder, targets, num_boxes)
        losses = {name: values[-1] for name, values in by_layer.items()}
        del by_layer["class_error"]
        losses |= {f"{name}_{i}": value for name, values in by_layer.items() for i, value in enumerate(values[:-1])}
        if proposals is not None:
            classless = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
            by_layer = self._losses(*proposals, classless, num_boxes)
            losses |= {f"{name}_enc": values[0] for name, values in by_layer.items() if name != "class_error"}
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

    def _losses(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target], num_boxes: Tensor) -> dict[str, Tensor]:
        """Return every scalar of `forward` as [L], for logits [L, B, Q, ·] and boxes [L, B, Q, 4]."""
        counts = [len(target["labels"]) for target in targets]
        matches = self.matcher.match_layers(logits, boxes, targets)
        # From pageable memory a non-blocking copy is safe, and does not wait for the device.
        layer, image, query, target = _pairs(matches, counts).to(logits.device, non_blocking=True)
        labels = torch.cat([target["labels"] for target in targets])[target]
        target_boxes = torch.cat([target["boxes"] for target in targets])[target]
        predicted = boxes[layer, image, query]

        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[layer, image, query] = labels
        correct = (logits[layer, image, query].argmax(-1) == labels).float()
        num_predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
        num_objects = torch.tensor(counts).to(logits.device, non_blocking=True)
        return {
            "loss_ce": self._label_loss(logits, classes, num_boxes),
            "class_error": 100 - 100 * correct.sum(1) / max(correct.shape[1], 1),
            "loss_bbox": F.l1_loss(predicted, target_boxes, reduction="none").sum((1, 2)) / num_boxes,
            "loss_giou": (1 - generalized_iou(predicted, target_boxes)).sum(1) / num_boxes,
            "cardinality_error": (num_predicted - num_objects).abs().float().mean(1),
        }

    def _label_loss(self, logits: Tensor, classes: Tensor, num_boxes: Tensor) -> Tensor:
        """Return the label loss [L], for classes [L, B, Q] of which K is "no object"."""
        from torchvision.ops import sigmoid_focal_loss

        if self.focal_alpha is None:
            loss = F.cross_entropy(logits.movedim(-1, 1), classes, weight=self.class_weight, reduction="none")
            return loss.sum((1, 2)) / self.class_weight[classes].sum((1, 2))
        one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, one_hot, alpha=self.focal_alpha, gamma=FOCAL_GAMMA, reduction="none")
        return loss.sum((1, 2, 3)) / num_boxes

    def _check_shapes(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> None:
        width = self.num_classes + (self.focal_alpha is None)
        if logits.shape[-1] != width:
            kind = "K + 1" if self.focal_alpha is None else "K"
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


def _to_device(targets: Sequence[Target], index: int, device: torch.device) -> dict[str, Any]:
    """Return a target on `device` with labels int64 [N] and boxes float32 [N, 4]; N is 0 for empties of any shape."""
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


def _check_values(predictions: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Target], num_classes: int) -> None:
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
