"""Gradients of a convolution are the same by both ways to compute them, and the way fits the processor."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone.weight_gradient import convolve


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture
def planes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """On a processor without AVX-512; whether each map that weights had their gradient from was in planes."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    seen: list[bool] = []
    compute = torch.nn.grad.conv2d_weight

    def watched(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.is_contiguous())
        return compute(x, *args)

    monkeypatch.setattr(torch.nn.grad, "conv2d_weight", watched)
    return seen


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_are_those_of_the_plain_convolution(
    planes: list[bool], kernel: tuple[int, int], stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    leaves = [channels_last(2, 5, 17, 14), channels_last(7, 5, *kernel), torch.randn(7)]
    geometry: dict[str, Any] = {"stride": (stride,) * 2, "padding": (2, 1), "dilation": (dilation,) * 2}
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    wanted = [leaf.double().requires_grad_() for leaf in leaves]
    output, expected = convolve(*given, **geometry), F.conv2d(*wanted, **geometry)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    output.backward(gradient.float())
    expected.backward(gradient)

    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums of up to 45 products
    for leaf, reference in zip(given, wanted, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    assert planes == [True]


def test_what_needs_no_gradient_gets_none(planes: list[bool]) -> None:
    x, weight = channels_last(1, 3, 8, 8), channels_last(4, 3, 3, 3).requires_grad_()
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    convolve(x, weight, torch.zeros(4), **geometry).sum().backward()

    assert x.grad is None
    assert planes == [True]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, weight: (x.contiguous(), weight),
        lambda x, weight: (x, weight[:, :, 1:2, 1:2]),
        lambda x, weight: (x.double(), weight.double()),
        lambda x, weight: (x, weight.detach()),
    ],
    ids=["maps in planes", "window of one cell", "float64", "weights that do not train"],
)
def test_what_is_fast_as_it_is_stays(planes: list[bool], change: Any) -> None:
    x, weight = change(channels_last(2, 5, 9, 8).requires_grad_(), channels_last(7, 5, 3, 3).requires_grad_())
    convolve(x, weight, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1)).sum().backward()

    assert planes == []


def test_processors_with_avx_512_need_no_copies(planes: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    weight = channels_last(7, 5, 3, 3).requires_grad_()
    convolve(channels_last(2, 5, 9, 8), weight, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1)).sum().backward()

    assert planes == []
    assert weight.grad is not None


def test_second_derivatives_are_those_of_the_plain_convolution(planes: list[bool]) -> None:
    torch.manual_seed(0)
    x, weight = channels_last(1, 2, 6, 5), channels_last(3, 2, 3, 3)
    penalties = []
    for function in (convolve, F.conv2d):
        leaf = weight.clone().requires_grad_()
        output = function(x, leaf, None, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(leaf.grad)

    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)
    assert planes
