"""Convolution, sum and ReLU as one primitive of oneDNN, which ONNX Runtime, OpenVINO and torch.compile use too.

torch has them as operators of its compiler only, which it may change. So each kind of convolution is compared with the
public operators, once in a process, and primitives that are missing, fail or differ are not used.
"""

import logging
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A sum in another order moves a result by a few units in the last of 24 or 8 bits; a step left out, by half of it.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


class Kind(NamedTuple):
    """What a primitive is chosen by; sides are (vertical, horizontal)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype

    def output_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape [B, C, h, w] of the output for an input of a shape."""
        sides = zip(shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return (
            shape[0],
            self.out_channels,
            *(
                (side + 2 * pad - dilation * (size - 1) - 1) // stride + 1
                for side, size, stride, pad, dilation in sides
            ),
        )


def kind_of(convolution: nn.Conv2d) -> Kind | None:
    """Return the kind of a convolution; None if there are no primitives for it."""
    padding, dtype = convolution.padding, convolution.weight.dtype
    if convolution.padding_mode != "zeros" or isinstance(padding, str) or dtype not in _TOLERANCE:
        return None
    return Kind(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        padding,
        convolution.dilation,
        convolution.groups,
        dtype,
    )


def conv_relu(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return relu(conv(x)), in torch.channels_last like the input [B, C, H, W]."""
    geometry = (kind.padding, kind.stride, kind.dilation, kind.groups)
    operator: Any = torch.ops.mkldnn._convolution_pointwise.default
    return cast(Tensor, operator(x, weight, bias, *geometry, "relu", [], ""))


def conv_add_relu(
    kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, *, overwrite: bool
) -> Tensor:
    """Return relu(conv(x) + other).

    Args:
        kind: of the convolution.
        x: its input [B, C, H, W], in torch.channels_last.
        weight: its weight.
        bias: its bias, if it has one.
        other: of the output's shape, dtype and memory format.
        overwrite: write the result over `other`, which saves memory that would have to be allocated.
    """
    geometry = (kind.padding, kind.stride, kind.dilation, kind.groups)
    operators: Any = torch.ops.mkldnn
    if overwrite:
        inplace = operators._convolution_pointwise_.binary
        return cast(Tensor, inplace(other, x, weight, bias, *geometry, "add", 1.0, "relu", [], ""))
    binary = operators._convolution_pointwise.binary
    return cast(Tensor, binary(x, other, weight, bias, *geometry, "add", 1.0, "relu", [], ""))


def is_usable(kind: Kind, *, adds: bool = False) -> bool:
    """Return whether `conv_relu`, or `conv_add_relu`, runs here and gives what the public operators give."""
    return bool(torch.backends.mkldnn.enabled) and _has_operators() and _is_equal(kind, adds=adds)


@cache
def _has_operators() -> bool:
    operators = torch.ops.mkldnn
    exist = hasattr(operators, "_convolution_pointwise") and hasattr(operators, "_convolution_pointwise_")
    if not exist:
        logger.info("this build of torch has no fused convolutions: sums and ReLUs run as operators of their own")
    return exist


@cache
def _is_equal(kind: Kind, *, adds: bool) -> bool:
    try:
        difference = _largest_difference(kind, adds=adds)
    except Exception as error:  # whatever an operator without a promise raises
        _warn(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
        return False
    if not difference <= _TOLERANCE[kind.dtype]:
        _warn("they differ from the public operators")
        return False
    return True


@cache
def _warn(reason: str) -> None:
    logger.warning("fused convolutions are not used, which takes longer and changes no result: %s", reason)


def _largest_difference(kind: Kind, *, adds: bool) -> float:
    """Return the largest difference from the public operators, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).sub_(0.5).to(kind.dtype)

    # A map of a few cells, of odd sides.
    sides = [
        max(dilation * (size - 1) + 1 + cells * stride - 2 * pad, 1)
        for cells, size, stride, pad, dilation in zip(
            (4, 6), kind.kernel_size, kind.stride, kind.padding, kind.dilation, strict=True
        )
    ]
    weight = draw(kind.out_channels, kind.in_channels // kind.groups, *kind.kernel_size)
    bias = draw(kind.out_channels)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = draw(2, kind.in_channels, *sides).to(memory_format=torch.channels_last)
        weight = weight.to(memory_format=torch.channels_last)
        convolved = F.conv2d(x, weight, bias, kind.stride, kind.padding, kind.dilation, kind.groups)
        if adds:
            other = torch.empty_like(convolved).copy_(draw(*convolved.shape) * convolved.abs().max())
            convolved = convolved + other
            results = [
                conv_add_relu(kind, x, weight, bias, other, overwrite=False),
                conv_add_relu(kind, x, weight, bias, other, overwrite=True),
            ]
        else:
            results = [conv_relu(kind, x, weight, bias)]
        expected = torch.relu(convolved)
        return float(max((result - expected).abs().max() for result in results) / expected.abs().max())
