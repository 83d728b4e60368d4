"""Label losses of a detector, per query: softmax cross entropy, sigmoid focal loss, matchability-aware loss."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone.detectors.matcher import FOCAL_GAMMA

LabelLoss: TypeAlias = Literal["focal", "mal"]
MAL_GAMMA = 1.5
"""Gamma of the matchability-aware loss in DEIM (https://arxiv.org/abs/2412.04234) and its code."""


def focal_loss(logits: Tensor, classes: Tensor, *, alpha: float) -> Tensor:
    """Return the sigmoid focal loss of every query, summed over classes.

    Source: RetinaNet (https://arxiv.org/abs/1708.02002), equation 5, with gamma 2 as in Deformable DETR.

    Args:
        logits: [..., K].
        classes: int64 [...], K for "no object".
        alpha: weight of a query's own class; 1 - alpha for all others.
    """
    from torchvision.ops import sigmoid_focal_loss

    one_hot = _one_hot(logits, classes)
    return sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=FOCAL_GAMMA, reduction="none").sum(-1)


def matchability_aware_loss(logits: Tensor, classes: Tensor, quality: Tensor) -> Tensor:
    """Return the matchability-aware loss (MAL) of every query, summed over classes.

    With the score p, and q the IoU of a matched query's box with its target, to the power of gamma: cross entropy of p
    with q^gamma for the query's own class, and p^gamma times the cross entropy with 0 for every other. A query learns
    the score that its box deserves. No gradient flows through the weights p^gamma and the IoU.

    Source: DEIM (https://arxiv.org/abs/2412.04234), "Matchability-Aware Loss".

    Args:
        logits: [..., K].
        classes: int64 [...], K for "no object".
        quality: q [...] in 0 … 1; ignored where there is no object.

    >>> logits = torch.zeros(1, 2)  # p is 0.5 for both classes, and its cross entropy with anything is ln 2
    >>> matchability_aware_loss(logits, torch.tensor([0]), torch.tensor([0.5]))  # (1 + 0.5^1.5) ln 2
    tensor([0.9382])
    """
    one_hot = _one_hot(logits, classes)
    target = one_hot * quality.detach()[..., None] ** MAL_GAMMA
    weight = torch.where(one_hot > 0, 1.0, logits.detach().sigmoid() ** MAL_GAMMA)
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none").sum(-1)


def _one_hot(logits: Tensor, classes: Tensor) -> Tensor:
    return F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
