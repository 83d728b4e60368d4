"""A pass through a network that computes nothing: shapes and structure without numbers, in milliseconds."""

from typing import Any

import torch
from torch import nn

from detr_backbone.errors import ConfigError

PROBE = 256
"""Pixels of the image's side: every stride that divides it is measured exactly."""


def run_on_meta(network: nn.Module) -> Any:
    """What a network that maps [B, C, H, W] returns for one image of `PROBE` x `PROBE` pixels, on the meta device.

    Raises:
        ConfigError: there is no convolution, so that the image's channels are not known.
    """
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ConfigError("the network must begin with a convolution, got none")
    tensors = {
        name: tensor.to("meta")
        for name, tensor in [
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        ]
    }
    image = torch.empty(1, first.in_channels, PROBE, PROBE, device="meta", dtype=first.weight.dtype)
    with torch.no_grad():
        return torch.func.functional_call(network, tensors, (image,))
