"""A pass through a network that computes nothing: shapes and structure without numbers, in milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from detr_backbone.errors import ConfigError
from detr_backbone.input_channels import first_convolution
from detr_backbone.nested_tensor import Size

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
        with torch.no_grad(), evaluating(network), _Shortcut():  # type: ignore[no-untyped-call]
            return torch.func.functional_call(network, meta, (image,))
    except Exception as error:  # whatever a network raises at an image that it was not made for
        raise ConfigError(
            f"the network must take images of any size, got for {size[0]} x {size[1]} pixels: {error}"
        ) from error


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within this context, a network is in eval mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        network.train(modes[network])  # a layer getter passes it on to the network that it runs, which is no child
        for module, training in modes.items():
            module.training = training


class _Shortcut(TorchFunctionMode):
    """Gives functions that keep shape, dtype and strides their input back, as a tensor of its own.

    What torch computes instead, for shapes alone, takes most of the time of a pass: 1 ms for one BatchNorm.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEEP_SHAPE and args and _is_dense(args[0]):
            return args[0].detach()
        if func is F.layer_norm and args and args[0].is_contiguous():  # of other strides it makes contiguous ones
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
