"""DETR: a backbone, a transformer over its coarsest feature map, and heads for the class and the box of every query.

Source: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), section 3.2.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detr_backbone.backbone import Joiner
from detr_backbone.detectors.matcher import Target
from detr_backbone.detectors.mlp import MLP
from detr_backbone.detectors.precision import outside_autocast
from detr_backbone.detectors.transformer import Transformer
from detr_backbone.nested_tensor import NestedTensor, as_nested_tensor


class DETR(nn.Module):
    """Images in; for each of Q queries class logits and a box out.

    Args:
        backbone: gives features and positions; only the coarsest level is read.
        transformer: built with `return_intermediate_dec=True` where `aux_loss` is wanted.
        num_classes: K; the class head has one logit more, the last, for "no object".
        num_queries: Q, the most objects detected in one image.
        aux_loss: also give the predictions of every decoder layer but the last.

    Raises:
        ValueError: `aux_loss` with a transformer that gives the last decoder layer only.
    """

    def __init__(
        self,
        backbone: Joiner,
        transformer: Transformer,
        *,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = False,
    ) -> None:
        super().__init__()
        if aux_loss and not transformer.decoder.return_intermediate:
            raise ValueError("`aux_loss` needs a transformer with `return_intermediate_dec=True`, got False")
        hidden_dim = transformer.d_model
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        # Published optimizer states number parameters in this order.
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, output_dim=4, num_layers=3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.backbone = backbone

    def forward(
        self, images: NestedTensor | Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Any]:
        """Return predictions for every query.

        Args:
            images: a NestedTensor, a list of [3, h, w], or a batch [B, 3, H, W] without padding: RGB in 0 .. 1 minus
                mean, divided by std, as the backbone's weights expect it.
            targets: not read; every detector takes them, so that one training loop serves all.

        Returns:
            `pred_logits` [B, Q, K + 1]; `pred_boxes` [B, Q, 4], (cx, cy, w, h) as fractions of the image without its
            padding; with `aux_loss` also `aux_outputs`, a list of such dicts, first decoder layer first.
        """
        features, positions = self.backbone(as_nested_tensor(images))
        level = features[-1]
        mask = level.mask if level.is_padded else None
        hidden, _ = self.transformer(self.input_proj(level.tensors), mask, self.query_embed.weight, positions[-1])
        logits = outside_autocast(self.class_embed, hidden)
        boxes = outside_autocast(self.bbox_embed, hidden).sigmoid()
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            earlier = zip(logits[:-1], boxes[:-1], strict=True)
            outputs["aux_outputs"] = [{"pred_logits": a, "pred_boxes": b} for a, b in earlier]
        return outputs
