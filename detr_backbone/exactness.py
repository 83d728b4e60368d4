"""Proof by trial that exact padding is exact: what a network gives for images alone, and for the same in one batch.

A list of layers cannot speak for the code between them, such as a mean over the map inside of a block's forward. The
trial runs that code. It replaces what a fresh network has as zeros or ones - biases, scales, statistics - by random
numbers, so that padding that gets through shows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.input_channels import first_convolution
from detr_backbone.maps import as_map, layout_of
from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list

Levels = Mapping[str, NestedTensor]

_SIZES: tuple[Size, ...] = ((33, 50), (96, 128))
"""The first has odd sides at every stride up to 32 or so, the second has not: what depends on parity shows too."""
_TOLERANCE = 1e-4
"""Of the largest feature: float32 rounds some 1e-6 of it, and padding that gets through changes far more."""


def find_leak(forward: Callable[[NestedTensor], Levels], body: nn.Module) -> str | None:
    """Where in a network padding gets into an image, for an error; None if it does not.

    Args:
        forward: a batch -> its levels, as the backbone computes them.
        body: the network that `forward` runs; its state is as before when the trial is over.
    """
    _, convolution = first_convolution(body)
    device = convolution.weight.device
    if device.type == "meta":  # nothing is computed there; the layers themselves have been looked at
        return None
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(convolution.in_channels, *size, generator=generator).to(device) for size in _SIZES]
    alone, together = (nested_tensor_from_tensor_list(batch) for batch in (images[:1], images))
    with _random_state(body, generator), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if _equal(forward(alone), forward(together)):
            return None
        return _first_difference(forward, body, alone, together)


def _equal(alone: Levels, together: Levels) -> bool:
    return all(
        _same(level.tensors[0, :, :h, :w], together[name].tensors[0, :, :h, :w])
        for name, level in alone.items()
        for h, w in level.sizes
    )


def _same(alone: Tensor, together: Tensor) -> bool:
    difference, scale = (alone - together).abs().max(), alone.abs().max()
    return bool(difference <= _TOLERANCE * scale)


def _first_difference(
    forward: Callable[[NestedTensor], Levels], body: nn.Module, alone: NestedTensor, together: NestedTensor
) -> str:
    """The first layer to return that gives the image's own cells another value in the batch."""
    modules = dict(body.named_modules())
    expected, got = (_outputs(forward, body, batch, alone.sizes[0]) for batch in (alone, together))
    for path, output in expected.items():
        if path not in got or output.shape != got[path].shape or not _same(output, got[path]):
            return f"{path} ({type(modules[path]).__name__})"
    return "the code between its layers"


def _outputs(
    forward: Callable[[NestedTensor], Levels], body: nn.Module, batch: NestedTensor, size: Size
) -> dict[str, Tensor]:
    """The first image's cells in each layer's output, by path, in the order in which the layers return."""
    outputs: dict[str, Tensor] = {}
    padded: list[Size] = []

    def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
        padded.append((inputs[0].shape[-2], inputs[0].shape[-1]))

    def keep(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and path not in outputs:
            outputs[path] = _cells_of(output[:1], size, padded[0]).clone()

    handles = [body.register_forward_pre_hook(note)]
    handles += [module.register_forward_hook(partial(keep, path)) for path, module in body.named_modules() if path]
    try:
        forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _cells_of(output: Tensor, size: Size, padded: Size) -> Tensor:
    """The cells of an image of `size` in a map of a batch of `padded` pixels; all of what is no such map."""
    layout = layout_of(output.shape, padded)
    if layout is None:
        return output
    h, w = (-(-side // layout.stride) for side in size)
    return as_map(output, layout, padded)[:, :, :h, :w]


@contextmanager
def _random_state(body: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """In float32 and in eval mode, with random numbers in place of vectors and of what is zero throughout."""
    modes = {module: module.training for module in body.modules()}
    tensors = [tensor for tensor in [*body.parameters(), *body.buffers()] if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        body.eval()
        for tensor in tensors:
            if tensor.numel() == max(tensor.shape, default=1) or not tensor.any():
                drawn = torch.rand(tensor.shape, generator=generator) * 0.8 + 0.2  # variances and scales are positive
                tensor.data = drawn.to(tensor.device)
            else:
                tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
        for module, mode in modes.items():
            module.training = mode
