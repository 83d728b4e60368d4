"""From a detector's outputs to detections: scores, category ids, and boxes in pixels of the original images."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr_backbone.errors import NumericsError


class PostProcess(nn.Module):
    """Turns queries into detections, image by image.

    Args:
        score: `softmax`: every query gives its best real class (DETR). `sigmoid`: the `num_select` best of all queries
            and classes, so a query may count twice (Deformable DETR), best first.
        num_select: detections per image with `sigmoid`; fewer where queries times classes are fewer.
        category_ids: the dataset's category id of each label 0 ... K - 1; None leaves labels as they are.

    Raises:
        ValueError: `score` is unknown.

    >>> outputs = {"pred_logits": torch.zeros(1, 2, 4), "pred_boxes": torch.full((1, 2, 4), 0.5)}
    >>> [detections] = PostProcess(category_ids=[1, 2, 44])(outputs, [(100, 200)])
    >>> detections["boxes"][0], detections["labels"][0], detections["scores"][0]
    (tensor([ 50.,  25., 150.,  75.]), tensor(1), tensor(0.2500))
    """

    category_ids: Tensor | None

    def __init__(
        self,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        num_select: int = 100,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"`score` must be 'softmax' or 'sigmoid', got {score!r}")
        self.score = score
        self.num_select = num_select
        ids = None if category_ids is None else torch.tensor(category_ids)
        self.register_buffer("category_ids", ids, persistent=False)

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Any], target_sizes: Tensor | Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return for each image `scores` [N], `labels` [N], `boxes` [N, 4] (x1, y1, x2, y2) in pixels, not clipped.

        Args:
            outputs: `pred_logits` [B, Q, K + 1] (`softmax`) or [B, Q, K] (`sigmoid`), `pred_boxes` [B, Q, 4] cxcywh as
                fractions of the image.
            target_sizes: original (h, w) of each image, [B, 2].

        Raises:
            ValueError: shapes or `category_ids` do not fit the outputs.
            NumericsError: a prediction is not finite; an evaluator would take a NaN box for a perfect one.
        """
        from torchvision.ops import box_convert

        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        sizes = torch.as_tensor(target_sizes, dtype=boxes.dtype, device=boxes.device)
        self._check(logits, boxes, sizes)
        height, width = sizes.unbind(1)
        pixels = box_convert(boxes, "cxcywh", "xyxy") * torch.stack([width, height, width, height], dim=1)[:, None]
        if self.score == "softmax":
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        else:
            scores, best = logits.sigmoid().flatten(1).topk(min(self.num_select, logits[0].numel()))
            queries, labels = best // logits.shape[2], best % logits.shape[2]
            pixels = pixels.take_along_dim(queries[..., None], dim=1)
        if self.category_ids is not None:
            labels = self.category_ids.to(labels.device)[labels]
        return [{"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, labels, pixels, strict=True)]

    def _check(self, logits: Tensor, boxes: Tensor, sizes: Tensor) -> None:
        if sizes.shape != (len(logits), 2):
            raise ValueError(f"`target_sizes` must be [B, 2] = [{len(logits)}, 2], got {list(sizes.shape)}")
        classes = logits.shape[2] - (self.score == "softmax")
        if self.category_ids is not None and len(self.category_ids) != classes:
            raise ValueError(
                f"`category_ids` must hold one id for each of {classes} classes, got {len(self.category_ids)}"
            )
        finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in (logits, boxes)])
        if not finite.all():
            for name, flags in zip(("pred_logits", "pred_boxes"), finite.tolist(), strict=True):
                images = [index for index, is_finite in enumerate(flags) if not is_finite]
                if images:
                    raise NumericsError(
                        f"`{name}` must be finite, got NaN or infinity for images {images} of the batch"
                    )
