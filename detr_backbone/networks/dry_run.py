"""A pass through a network that computes nothing: shapes and structure without numbers, in milliseconds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import evaluating
from detr_backbone.nested_tensor import Size
from detr_backbone.networks.input_channels import first_convolution

PROBE: Size = (256, 320)
"""(h, w) of the measuring image: every stride that divides both is measured exactly."""

_KEEP_SHAPE = frozenset(
    (F.batch_norm, F.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.leaky_relu, F.elu, F.silu, F.mish, F.gelu)
)


def on_meta(network: nn.Module, size: Size = PROBE) -> Any:
    """What a network gives for an image of this size, as shapes without numbers.

    Raises:
        ConfigError: the network has no convolution, or does not take such an image.
    """
    _, first = first_convolution(network)
    meta = {name: tensor.to("meta") for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    image = torch.empty(1, first.in_channels, *size, device="meta", dtype=first.weight.dtype)
    try:
        with torch.no_grad(), evaluating(network), _Shortcut():
            return torch.func.functional_call(network, meta, (image,))
    except Exception as error:  # whatever a network raises at an image that it was not made for
        raise ConfigError(
            f"the network must take images of any size, got for {size[0]} x {size[1]} pixels: {error}"
        ) from error


class _Shortcut(TorchFunctionMode):
    """Says at once what the most frequent functions give: most of the time of a pass is what torch computes for these.

    Where they keep shape, dtype and strides, their input is given back, as a tensor of its own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        if isinstance(x, Tensor):
            contiguous = x.is_contiguous()
            if func in _KEEP_SHAPE and (contiguous or x.is_contiguous(memory_format=torch.channels_last)):
                return x.detach()
            if func is F.layer_norm and contiguous:
                return x.detach()
            if func is F.linear and contiguous and len(args) > 1 and x.shape[-1] == args[1].shape[1]:
                return x.new_empty((*x.shape[:-1], args[1].shape[0]))
        return func(*args, **(kwargs or {}))
