"""Proof by trial that exact padding is exact: what a network gives for images alone, and for the same in one batch.

A list of layers cannot speak for the code between them, such as a mean over the map inside of a block's forward. The
trial runs that code. It replaces what a fresh network has as zeros or ones - biases, scales, statistics - by random
numbers, so that padding that gets through shows, and computes in float64, so that rounding does not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.forward_pass import evaluating
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list
from detr_backbone.networks.geometry import as_map, layout_of
from detr_backbone.networks.input_channels import first_convolution

Levels = Mapping[str, NestedTensor]

_SIZES: tuple[Size, ...] = ((33, 50), (96, 80))
"""The first has odd sides at most strides up to 32, the second even ones: what depends on parity shows too."""
_TOLERANCE = 1e-6
"""Of the largest feature: float64 rounds less than 1e-12 of it, and padding that gets through changes some per cent."""
_LAYERS_OF_RESNET = (
    *(nn.Sequential, nn.Conv2d, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d),
    *(nn.AdaptiveAvgPool2d, nn.Linear),  # the head, which no backbone runs
)


def is_plain_resnet(network: nn.Module) -> bool:
    """Whether a network is a ResNet of torchvision as it is built: known to be exact, so that no trial is needed."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    known = (ResNet, BasicBlock, Bottleneck, *_LAYERS_OF_RESNET)
    return type(network) is ResNet and all(type(module) in known for module in network.modules())


def find_leak(forward: Callable[[NestedTensor], Levels], body: nn.Module) -> str | None:
    """Why a network is not exact, for an error: the layer where padding shows, or what it fails at; None if it is.

    Args:
        forward: a batch -> its levels, as the backbone computes them.
        body: the network that `forward` runs; its state is as before when the trial is over.
    """
    _, convolution = first_convolution(body)
    if convolution.weight.is_meta:  # nothing can be computed; the layers themselves have been looked at
        return None
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(convolution.in_channels, *size, generator=generator, device="cpu").double() for size in _SIZES
    ]
    alone, together = (nested_tensor_from_tensor_list(batch) for batch in (images[:1], images))
    with _random_state(body, generator), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            (levels, expected), (levels_together, got) = (_run(forward, body, batch) for batch in (alone, together))
        except Exception as error:  # such as for a convolution over something else than a map of the batch
            return f"it fails for images of {_SIZES[0]} and {_SIZES[1]} pixels: {error}"
    if _equal(levels, levels_together):
        return None
    where = _first_difference(body, expected, got)
    return f"padding gets into the image, first seen in the output of {where}"


def _equal(alone: Levels, together: Levels) -> bool:
    return all(
        _same(level.tensors[0, :, :h, :w], together[name].tensors[0, :, :h, :w])
        for name, level in alone.items()
        for h, w in level.sizes
    )


def _same(alone: Tensor, together: Tensor) -> bool:
    difference, scale = (alone - together).abs().max(), alone.abs().max()
    return bool(difference <= _TOLERANCE * scale)


def _first_difference(body: nn.Module, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """The first layer to return that gives the image's own cells another value in the batch."""
    modules = dict(body.named_modules())
    for path, output in expected.items():
        if path in got and output.shape == got[path].shape and not _same(output, got[path]):
            return f"{path} ({type(modules[path]).__name__})"
    return "the code between its layers"


def _run(
    forward: Callable[[NestedTensor], Levels], body: nn.Module, batch: NestedTensor
) -> tuple[Levels, dict[str, Tensor]]:
    """The levels, and the first image's cells in each layer's output, in the order in which the layers return."""
    outputs: dict[str, Tensor] = {}
    padded: list[Size] = []

    def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
        padded.append((inputs[0].shape[-2], inputs[0].shape[-1]))

    def keep(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4) and path not in outputs:
            outputs[path] = _cells_of(output[:1], batch.sizes[0], padded[0]).clone()

    handles = [body.register_forward_pre_hook(note)]
    handles += [module.register_forward_hook(partial(keep, path)) for path, module in body.named_modules() if path]
    try:
        return forward(batch), outputs
    finally:
        for handle in handles:
            handle.remove()


def _cells_of(output: Tensor, size: Size, padded: Size) -> Tensor:
    """The cells of an image of `size` in a map of a batch of `padded` pixels; all of what is no such map."""
    layout = layout_of(output.shape, padded)
    if layout is None:
        return output
    h, w = (-(-side // layout.stride) for side in size)
    return as_map(output, layout, padded)[:, :, :h, :w]


@contextmanager
def _random_state(body: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """On the CPU, in float64 and in eval mode, with numbers of which every one shows in the outputs."""
    tensors = [tensor for tensor in [*body.parameters(), *body.buffers()] if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = _telling(tensor.data, generator)
        with evaluating(body):
            yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def _telling(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of this shape by which a layer's output is about as large as its input.

    A fresh network has zeros and ones in vectors, and matrices small enough to hide what passes through a few of them.
    """
    if tensor.numel() == max(tensor.shape, default=1):
        drawn = torch.rand(tensor.shape, generator=generator, device="cpu")
        return (drawn * 0.8 + 0.2).double()  # as variances and scales are: positive, around one half
    tensor = tensor.to("cpu", torch.float64)
    if not tensor.any():
        tensor = torch.randn(tensor.shape, generator=generator, device="cpu").double()
    fan_in = tensor[0].numel()
    return tensor * (2 / fan_in / tensor.square().mean()).sqrt()  # for ReLU: arXiv 1502.01852, section 2.2
