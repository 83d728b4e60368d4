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
        as_products = of_weight and not torch.is_grad_enabled()  # enabled, for the gradient of a gradient
        others = {"transposed": False, "output_padding": (0, 0), "groups": 1}
        of_x_and_weight = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *ctx.geometry, **others, output_mask=(of_x, of_weight and not as_products, False)
        )
        return (
            of_x_and_weight[0],
            _weight_gradient(x, gradient, weight, ctx.geometry) if as_products else of_x_and_weight[1],
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def _weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
    """The gradient of weights [O, C, k, l], from maps [B, C, h, w] and the gradient [B, O, p, q] of the output."""
    stride, padding, dilation = geometry
    height, width = gradient.shape[-2:]
    x = _grow(x, before=padding, after=padding)
    cells = [(i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3])]
    result = torch.empty_like(weight)
    if stride == (1, 1):
        # In a grid as large as the padded maps, all inputs under a cell of the window lie equally far from the outputs.
        gradient = _grow(gradient, before=(0, 0), after=(x.shape[-2] - height, x.shape[-1] - width))
        inputs, starts = _rows(x), [i * dilation[0] * x.shape[-1] + j * dilation[1] for i, j in cells]
        count = len(inputs) - starts[-1]  # what is left out is padding
        outputs = _rows(gradient)[:count].t()
        for (i, j), start in zip(cells, starts, strict=True):
            torch.mm(outputs, inputs[start : start + count], out=result[..., i, j])
    else:
        outputs = _rows(gradient).t()
        for i, j in cells:
            rows, columns = (
                slice(first, first + step * (size - 1) + 1, step)
                for first, step, size in zip((i * dilation[0], j * dilation[1]), stride, (height, width), strict=True)
            )
            torch.mm(outputs, _rows(x[..., rows, columns]), out=result[..., i, j])
    return result


def _grow(maps: Tensor, *, before: Pair, after: Pair) -> Tensor:
    """Maps with cells of zeros above and left, below and right of them."""
    (top, left), (bottom, right) = before, after
    return F.pad(maps, (left, right, top, bottom)) if any((*before, *after)) else maps


def _rows(maps: Tensor) -> Tensor:
    """[B * h * w, C] of maps [B, C, h, w]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
