"""Gradients of a convolution are the same by both ways to compute them, and the way fits the processor."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone import weight_gradient
from detr_backbone.weight_gradient import convolve

GEOMETRY: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """On a processor without AVX-512; the shapes of the weight gradients that were computed as matrix products."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    seen: list[tuple[int, ...]] = []
    compute = weight_gradient._weight_gradient

    def watched(*args: Any) -> Tensor:
        gradient = compute(*args)
        seen.append(tuple(gradient.shape))
        return gradient

    monkeypatch.setattr(weight_gradient, "_weight_gradient", watched)
    return seen


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(2, 1), (0, 0)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_are_those_of_the_plain_convolution(
    products: list[Any], kernel: tuple[int, int], stride: int, padding: tuple[int, int], dilation: int
) -> None:
    torch.manual_seed(0)
    channels = 128 if kernel == (1, 1) else 32
    leaves = [channels_last(2, channels, 11, 13), channels_last(channels + 1, channels, *kernel)]
    leaves.append(torch.randn(channels + 1))
    geometry: dict[str, Any] = {"stride": (stride,) * 2, "padding": padding, "dilation": (dilation,) * 2}
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    wanted = [leaf.double().requires_grad_() for leaf in leaves]
    output, expected = convolve(*given, **geometry), F.conv2d(*wanted, **geometry)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    output.backward(gradient.float())
    expected.backward(gradient)

    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums of up to 288 products
    for leaf, reference in zip(given, wanted, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    assert products == [tuple(leaves[1].shape)]


def test_what_needs_no_gradient_gets_none(products: list[Any]) -> None:
    x, weight = channels_last(1, 32, 8, 8), channels_last(32, 32, 3, 3).requires_grad_()
    convolve(x, weight, torch.zeros(32), **GEOMETRY).sum().backward()

    assert x.grad is None
    assert len(products) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x, weight: (x.contiguous(), weight),
        lambda x, weight: (x, weight[:, :, 1:2, 1:2]),
        lambda x, weight: (x[:, :31].contiguous(memory_format=torch.channels_last), weight[:, :31]),
        lambda x, weight: (x, weight[:31]),
        lambda x, weight: (x.double(), weight.double()),
        lambda x, weight: (x, weight.detach()),
    ],
    ids=["planes", "64 channels for one cell", "31 inputs", "31 outputs", "float64", "weights that do not train"],
)
def test_what_is_fast_as_it_is_stays(products: list[Any], change: Any) -> None:
    x, weight = change(channels_last(2, 64, 9, 8).requires_grad_(), channels_last(64, 64, 3, 3).requires_grad_())
    convolve(x, weight, None, **GEOMETRY).sum().backward()

    assert products == []


def test_processors_with_avx_512_are_left_alone(products: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    weight = channels_last(32, 32, 3, 3).requires_grad_()
    convolve(channels_last(2, 32, 9, 8), weight, None, **GEOMETRY).sum().backward()

    assert products == []
    assert weight.grad is not None


def test_second_derivatives_are_those_of_the_plain_convolution(products: list[Any]) -> None:
    torch.manual_seed(0)
    x, weight = channels_last(1, 32, 6, 5), channels_last(32, 32, 3, 3)
    penalties = []
    for dtype in (torch.float32, torch.float64):
        leaf, maps = weight.to(dtype, copy=True).requires_grad_(), x.to(dtype, copy=True).requires_grad_()
        output = convolve(maps, leaf, None, **GEOMETRY)
        gradients = torch.autograd.grad(output.square().mean(), (maps, leaf), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()  # type: ignore[union-attr]
        penalties += [(leaf.grad.double(), maps.grad.double())]

    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)
    assert products
