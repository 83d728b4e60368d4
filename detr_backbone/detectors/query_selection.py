"""Queries of a two-stage decoder, selected among the boxes that every encoded cell proposes.

Beside the package's axis letters: S cells of all levels one after the other.

Sources: "Deformable DETR" (https://arxiv.org/abs/2010.04159), section 4.2 and the appendix; mixed query selection of
"DINO" (https://arxiv.org/abs/2203.03605), section 3.4.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.detectors.precision import outside_autocast
from detr_backbone.detectors.references import Cells, refine

QuerySelection: TypeAlias = Literal["published", "mixed"]
QUERY_SELECTIONS: tuple[QuerySelection, ...] = ("published", "mixed")
"""`published`: proposals learn objects without their classes, the first logit ranks them, and content and position of a
query are encoded from its box. `mixed`: proposals learn classes, the best logit ranks them, contents are learned, and
every layer encodes the position from the box that the layer before refined."""

PADDED_LOGIT = -1e4
"""Logit of a padded cell: below every valid one, without weight in a focal loss, and finite where it is matched."""
PADDED_BOX = 1.0
"""Each number of the box of a padded cell, and of one at the edge, as in the original code."""


class Proposals(NamedTuple):
    """Class and box that every cell proposes in the first stage: `logits` [B, S, K] and `boxes` [B, S, 4], cxcywh."""

    logits: Tensor
    boxes: Tensor


class Queries(NamedTuple):
    """Start of the decoder's queries."""

    content: Tensor
    """[B, Q, C]."""
    references: Tensor
    """Points [B, Q, 2] or boxes cxcywh [B, Q, 4], as fractions of the image without its padding."""
    position: Tensor | None
    """[B, Q, C], the same in every layer; None where every layer encodes it from its references."""


def propose(
    memory: Tensor,
    cells: Cells,
    transform: Callable[[Tensor], Tensor],
    class_head: nn.Module,
    box_head: nn.Module,
    *,
    anchor_size: float,
    propose_padding: bool,
) -> Proposals:
    """Return the proposals of all cells.

    Args:
        memory: encoded cells [B, S, C].
        cells: their geometry.
        transform: maps cells to what the heads read, [B, S, C].
        class_head: maps that to logits [B, S, K].
        box_head: maps it to corrections of the anchors in logit space, [B, S, 4].
        anchor_size: side of the anchors on the finest level; see `Cells.anchors`.
        propose_padding: let padded cells compete, as the original code does.
    """
    anchors = cells.anchors(anchor_size)
    usable = ((anchors > 0.01) & (anchors < 0.99)).all(dim=-1, keepdim=True)  # padding has its centres beyond 1
    content = transform(memory.masked_fill(~usable, 0))
    logits = outside_autocast(class_head, content)
    if not propose_padding and cells.mask is not None:
        logits = logits.masked_fill(cells.mask[..., None], PADDED_LOGIT)
    boxes = refine(anchors, outside_autocast(box_head, content))
    return Proposals(logits, boxes.masked_fill(~usable, PADDED_BOX))


def best_boxes(proposals: Proposals, count: int, selection: QuerySelection) -> Tensor:
    """Return the boxes [B, count, 4] of the proposals of the highest score, best first, without gradient.

    An image with fewer cells than `count` has the boxes of padded cells for the others, as in a batch that pads it.

    >>> import torch
    >>> logits = torch.tensor([[[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]])  # three cells, two classes
    >>> proposals = Proposals(logits, torch.tensor([[[0.1] * 4, [0.2] * 4, [0.3] * 4]]))
    >>> best_boxes(proposals, 2, "published")[0, :, 0], best_boxes(proposals, 2, "mixed")[0, :, 0]
    (tensor([0.2000, 0.3000]), tensor([0.1000, 0.2000]))
    """
    # Trained on targets whose labels are all 0, the first logit is the score of any object.
    scores = proposals.logits[..., 0] if selection == "published" else proposals.logits.amax(dim=-1)
    scores = F.pad(scores, (0, count), value=PADDED_LOGIT)  # whatever the sizes, so that a graph need not know them
    boxes = F.pad(proposals.boxes, (0, 0, 0, count), value=PADDED_BOX)
    best = scores.topk(count, dim=1).indices
    return boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
