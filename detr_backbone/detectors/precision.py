"""What a detector computes in float32, whatever the precision around it: where things are."""

import torch
from torch import Tensor, nn


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if its own floating type is shorter."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def outside_autocast(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a head reads from `hidden`, at least in float32: bfloat16 places a box no better than within 1/512."""
    with torch.autocast(hidden.device.type, enabled=False):
        out: Tensor = head(hidden.to(next(head.parameters()).dtype))
    return at_least_float32(out)
