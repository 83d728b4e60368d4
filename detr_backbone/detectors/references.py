"""Reference points and boxes of a deformable transformer: centres of cells, anchors, and boxes refined by layers.

All are (x, y) or (cx, cy, w, h) as fractions of the image without its padding, which they therefore do not depend on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone.nested_tensor import NestedTensor, Size

ANCHOR_SIZE = 0.05
"""Side of the anchors of the finest level, as a fraction of the image, in Deformable DETR's published code."""


@dataclass(frozen=True)
class Cells:
    """The cells of all levels in sequence: their padding mask and their centres in the image."""

    spatial_shapes: list[Size]
    mask: Tensor | None  # [B, S], True on padding; None where nothing is padded
    centres: Tensor  # [B, S, 2], (x, y) as a fraction of the image without its padding
    valid_ratios: Tensor  # [B, L, 2], the image's fraction (x, y) of the padded level

    @classmethod
    def of(cls, levels: Sequence[NestedTensor]) -> "Cells":
        is_padded = any(level.is_padded for level in levels)
        centres, ratios = [], []
        for level in levels:
            batch, height, width = level.mask.shape
            if is_padded:
                valid_height, valid_width = (~level.mask[:, :, 0]).sum(dim=1), (~level.mask[:, 0]).sum(dim=1)
            else:  # from the shape, so that a graph for images without padding does not compute a mask
                valid_height, valid_width = (
                    torch.full((batch,), side, device=level.mask.device) for side in (height, width)
                )
            y = (torch.arange(height, device=level.mask.device) + 0.5) / valid_height[:, None]
            x = (torch.arange(width, device=level.mask.device) + 0.5) / valid_width[:, None]
            x, y = x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
            centres.append(torch.stack([x, y], dim=-1).flatten(1, 2))
            ratios.append(torch.stack([valid_width / width, valid_height / height], dim=-1))
        return cls(
            spatial_shapes=[(level.mask.shape[1], level.mask.shape[2]) for level in levels],
            mask=torch.cat([level.mask.flatten(1) for level in levels], dim=1) if is_padded else None,
            centres=torch.cat(centres, dim=1),
            valid_ratios=torch.stack(ratios, dim=1),
        )

    def on_levels(self, references: Tensor) -> Tensor:
        """Return references [B, Q, 2 or 4] as fractions of each padded level, [B, Q, L, 2 or 4]."""
        return references[:, :, None] * self.valid_ratios[:, None].repeat(1, 1, 1, references.shape[-1] // 2)

    def anchors(self, size: float = ANCHOR_SIZE) -> Tensor:
        """Return boxes cxcywh [B, S, 4] around the cells' centres, from which two-stage proposals start.

        Their sides are `size` on the finest level, as a fraction of the image, and double from level to level.
        """
        levels = torch.split(self.centres, [h * w for h, w in self.spatial_shapes], dim=1)
        return torch.cat([F.pad(level, (0, 2), value=size * 2**i) for i, level in enumerate(levels)], dim=1)


def refine(references: Tensor, change: Tensor) -> Tensor:
    """Return boxes cxcywh: points [..., 2] or boxes [..., 4] plus the output of a box head [..., 4] in logit space."""
    start = references.logit(eps=1e-5)
    return (F.pad(start, (0, 4 - start.shape[-1])) + change).sigmoid()


def box_encoding(boxes: Tensor, num_pos_feats: int) -> Tensor:
    """Return the sine encoding of (cx, cy, w, h) [B, Q, 4], P channels for each, [B, Q, 4P]."""
    pair = torch.arange(num_pos_feats // 2, device=boxes.device)
    angle = boxes[..., None] * 2 * math.pi / 10000 ** (2 * pair / num_pos_feats)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)
