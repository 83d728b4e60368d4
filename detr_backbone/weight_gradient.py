"""A convolution whose weight gradient is computed as matrix products where that is faster.

The gradient of one cell of the window is the product of the output's gradient with the inputs under that cell, each a
matrix of cells times channels (arXiv 1603.07285, chapter 4, is the convolution as such a product). Without AVX-512,
oneDNN takes up to four times as long for the gradient of a window's weights, and a quarter longer for that of many
single cells, where the channels of a cell lie side by side.
"""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

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
        apply: Any = _Convolution.apply
        output: Tensor = apply(x, weight, bias, (stride, padding, dilation))
        return output
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _slow_as_it_is(x: Tensor, weight: Tensor) -> bool:
    # Measured for the layers of ResNet-50 and MobileNetV2 on one and two cores (Zen 3, oneDNN 3.12, MKL 2024.2).
    fewest_channels = 128 if weight.shape[2:] == (1, 1) else 32
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and min(weight.shape[:2]) >= fewest_channels
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


class _Convolution(torch.autograd.Function):
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
        only_of_x = {"transposed": False, "output_padding": (0, 0), "groups": 1, "output_mask": (True, False, False)}
        of_convolution = torch.ops.aten.convolution_backward
        return (
            of_convolution(gradient, x, weight, None, *ctx.geometry, **only_of_x)[0] if of_x else None,
            _weight_gradient(x, gradient, weight.shape[2:], ctx.geometry) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def _weight_gradient(x: Tensor, gradient: Tensor, window: torch.Size, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
    """The gradient [O, C, k, l] of the weights, from maps [B, C, h, w] and the gradient [B, O, p, q] of the output."""
    stride, padding, dilation = geometry
    height, width = gradient.shape[-2:]
    x = _grow(x, before=padding, after=padding)
    offsets = [(i * dilation[0], j * dilation[1]) for i in range(window[0]) for j in range(window[1])]
    if stride == (1, 1):
        # In a grid as large as the padded maps, all inputs under a cell of the window lie equally far from the outputs.
        gradient = _grow(gradient, before=(0, 0), after=(x.shape[-2] - height, x.shape[-1] - width))
        inputs, starts = _rows(x), [row * x.shape[-1] + column for row, column in offsets]
        count = len(inputs) - starts[-1]  # what is left out is padding
        outputs = _rows(gradient)[:count].t()
        products = [outputs @ inputs[start : start + count] for start in starts]
    else:
        outputs = _rows(gradient).t()
        ends = stride[0] * (height - 1) + 1, stride[1] * (width - 1) + 1
        products = [
            outputs @ _rows(x[..., row : row + ends[0] : stride[0], column : column + ends[1] : stride[1]])
            for row, column in offsets
        ]
    return torch.stack(products, dim=-1).reshape(*products[0].shape, *window)


def _grow(maps: Tensor, *, before: Pair, after: Pair) -> Tensor:
    """Maps with cells of zeros above and left, below and right of them."""
    (top, left), (bottom, right) = before, after
    return F.pad(maps, (left, right, top, bottom)) if any((*before, *after)) else maps


def _rows(maps: Tensor) -> Tensor:
    """[B * h * w, C] of maps [B, C, h, w]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
