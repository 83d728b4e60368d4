"""Boxes and locations in float32 under mixed precision."""

import torch
from torch import Tensor, nn


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor, in float32 if its own floating type is shorter."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def outside_autocast(head: nn.Module, hidden: Tensor) -> Tensor:
    """Return `head(hidden)`, computed at least in float32: bfloat16 rounds a box to 1/512 of the image."""
    with torch.autocast(hidden.device.type, enabled=False):
        out = head(hidden.to(next(head.parameters()).dtype))
    return at_least_float32(out)
