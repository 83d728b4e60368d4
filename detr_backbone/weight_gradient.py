"""A convolution whose weight gradient is computed in the memory format that the processor has fast code for.

Convolutions are fastest with the channels of a cell side by side, and so are their gradients but for one: without
AVX-512, oneDNN takes two to five times as long for the weights of a window over such maps as over planes of one channel
each, the copies that bring the maps there included.
"""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

Pair: TypeAlias = tuple[int, int]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """What `F.conv2d` gives, with the gradients that it has.

    Args:
        x: maps [B, C, h, w].
        weight: [O, C, k, l].
        bias: [O].
        stride: cells between two windows.
        padding: cells of zeros around the map.
        dilation: cells between two weights.
    """
    if _slow_as_it_is(x, weight):
        apply: Any = _WeightGradientInPlanes.apply
        output: Tensor = apply(x, weight, bias, (stride, padding, dilation))
        return output
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _slow_as_it_is(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[2:] != (1, 1)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


class _WeightGradientInPlanes(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        of: Any = grad
        return (
            of.conv2d_input(x.shape, weight, gradient, *ctx.geometry) if of_x else None,
            of.conv2d_weight(x.contiguous(), weight.shape, gradient.contiguous(), *ctx.geometry) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )
