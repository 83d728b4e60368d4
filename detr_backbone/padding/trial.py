"""Self-test at construction: what a backbone gives for images alone, and for the same images in one batch.

A list of layers cannot speak for the code between them, such as a mean over the map inside of a block's forward. The
self-test runs that code. It replaces what a fresh network has as zeros or ones - biases, scales, statistics - by random
numbers, so that padding that gets through shows, and computes in float64, so that rounding does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detr_backbone.errors import ConfigError
from detr_backbone.folding import FoldedConv2d
from detr_backbone.forward_pass import evaluating, hooked, is_watched
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.layer_getter.strategies import OpenedModule
from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list, pad_to_multiple, size_of
from detr_backbone.networks.geometry import as_map, layout_of
from detr_backbone.networks.input_channels import first_convolution
from detr_backbone.padding.exact import zero_inputs

Levels = Mapping[str, NestedTensor]
State = dict[str, Tensor]

_TOLERANCE = 1e-6
"""Of the largest feature: float64 rounds less than 1e-12 of it, and padding that gets through changes some per cent."""
_LAYERS_OF_RESNET = (
    *(nn.Sequential, nn.Conv2d, FoldedConv2d, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d),
    *(nn.AdaptiveAvgPool2d, nn.Linear),  # the head, which no backbone runs
)


class Leak(NamedTuple):
    """The reason why a backbone is not exact, and if that is a forward that fails."""

    reason: str
    fails: bool


def is_plain_resnet(network: nn.Module) -> bool:
    """Return whether a network is a ResNet of torchvision as it is built: known to be exact, without a self-test."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    known = (ResNet, BasicBlock, Bottleneck, *_LAYERS_OF_RESNET)
    as_built = all(
        type(module) in known and "forward" not in vars(module) and getattr(module, "padding_mode", "zeros") == "zeros"
        for module in network.modules()
    )
    return type(network) is ResNet and as_built and not is_watched(network, own=(zero_inputs,))


def draw_sensitive_weights(backbone: nn.Module) -> State | None:
    """Return a state on the CPU, in float64, of which every number shows in the outputs.

    A fresh network has zeros and ones in vectors, and matrices small enough to hide what passes through a few of them.
    None if there is no such state: a buffer of integers, such as a table of indices, is on the meta device.
    """
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if tensor.is_floating_point():
            state[name] = _draw_like(tensor, generator)
        elif tensor.is_meta:
            return None
        else:
            state[name] = tensor.detach().cpu().clone()
    return state


def find_leak(backbone: nn.Module, body: nn.Module, state: State, divisor: int) -> Leak | None:
    """Return the layer where padding shows, or what the network fails at; None if every image is exact.

    Args:
        backbone: maps a NestedTensor to its levels; it stays as it is.
        body: the network inside of it.
        state: as `draw_sensitive_weights` gives it.
        divisor: sides of a batch are padded to multiples of it.
    """
    with _evaluation_in_float64(backbone):
        for sizes in _sizes(divisor):
            images = _draw_images(body, sizes)
            try:
                batch = _run(backbone, state, images, divisor)
                alone = [_run(backbone, state, [image], divisor) for image in images]
            except Exception as error:  # such as for a convolution over something else than a map of the batch
                pixels = " and ".join(f"{h} x {w}" for h, w in sizes)
                return Leak(f"the network fails for images of {pixels} pixels: {error}", fails=True)
            for index, levels in enumerate(alone):
                if not _equal(levels, batch, index):
                    got = _outputs(backbone, body, state, images, divisor)[index]
                    (expected,) = _outputs(backbone, body, state, images[index : index + 1], divisor)
                    where = _first_difference(body, expected, got)
                    return Leak(f"padding gets into the image, first seen in the output of {where}", fails=False)
    return None


def refuse_hidden_batch_statistics(backbone: nn.Module, body: nn.Module, state: State, divisor: int) -> None:
    """Refuse a network whose norms take statistics from the batch, though their classes do not say so.

    Args:
        backbone: see `find_leak`.
        body: the network inside of it.
        state: see `find_leak`; a network that is refused has changed it.
        divisor: see `find_leak`.

    Raises:
        ConfigError: a forward in training changes a buffer, or images of one size depend on each other.
    """
    (size, *_), *_ = _sizes(divisor)
    images = _draw_images(body, (size, size))
    with _evaluation_in_float64(backbone), torch.random.fork_rng([]):
        batch = _run(backbone, state, images, divisor)
        alone = [_run(backbone, state, [image], divisor) for image in images]
        if not all(_equal(levels, batch, index) for index, levels in enumerate(alone)):
            raise ConfigError(
                "`padding` must be 'zeros' for this network, got 'exact': images of one size depend on each other"
            )
        before = {name: tensor.clone() for name, tensor in state.items()}
        backbone.train()
        _run(backbone, state, images, divisor)
    for name in dict(backbone.named_buffers()):
        if name in before and not torch.equal(before[name], state[name]):
            raise ConfigError(
                f"`padding` must be 'zeros' for this network, got 'exact': {name} changes in training, so it holds "
                "statistics of the batch"
            )


def _sizes(divisor: int) -> list[tuple[Size, ...]]:
    """Return pairs of image sizes: odd sides at most strides up to 32, whole ones, and odd sides of the batch."""
    if divisor <= 32:
        return [((33, 50), (96, 80)), ((64, 96), (96, 128)), ((33, 17), (19, 35))]
    return [((divisor // 2 + 1, divisor), (divisor, 2 * divisor)), ((divisor, divisor), (2 * divisor, divisor))]


def _draw_images(body: nn.Module, sizes: Sequence[Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = first_convolution(body)[1].in_channels
    return [torch.randn(channels, *size, generator=generator, device="cpu", dtype=torch.float64) for size in sizes]


def _run(backbone: nn.Module, state: State, images: Sequence[Tensor], divisor: int) -> Levels:
    """Return the levels of a batch of images."""
    batch = pad_to_multiple(nested_tensor_from_tensor_list(images), divisor)
    levels: Levels = torch.func.functional_call(backbone, state, (batch,))
    return levels


def _outputs(
    backbone: nn.Module, body: nn.Module, state: State, images: Sequence[Tensor], divisor: int
) -> list[dict[str, Tensor]]:
    """Return of each image its cells in each layer's output, in the order in which layers return."""
    outputs: list[dict[str, Tensor]] = [{} for _ in images]
    padded: list[Size] = []

    def note(_: str, __: nn.Module, inputs: tuple[Any, ...]) -> None:
        padded.append(size_of(inputs[0]))

    def keep(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim in (3, 4) and len(output) == len(images):
            for index, image in enumerate(images):
                if path not in outputs[index]:
                    cells = _cells_of(output[index : index + 1], size_of(image), padded[-1])
                    outputs[index][path] = cells.clone()

    layers = {path: module for path, module in body.named_modules() if path and not isinstance(module, OpenedModule)}
    with hooked({"": body}, before=note), hooked(layers, after=keep):
        _run(backbone, state, images, divisor)
    return outputs


def _equal(alone: Levels, batch: Levels, index: int) -> bool:
    return all(
        _same(level.tensors[0, :, :h, :w], batch[name].tensors[index, :, :h, :w])
        for name, level in alone.items()
        for h, w in level.sizes
    )


def _same(alone: Tensor, together: Tensor) -> bool:
    difference, scale = (alone - together).abs().max(), alone.abs().max()
    return bool(difference <= _TOLERANCE * scale)


def _first_difference(body: nn.Module, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Return the first layer to return that gives the image's own cells another value in the batch."""
    modules = dict(body.named_modules())
    for path, output in expected.items():
        if path in got and output.shape == got[path].shape and not _same(output, got[path]):
            return f"{path} ({type(modules[path]).__name__})"
    return "the code between its layers"


def _cells_of(output: Tensor, size: Size, padded: Size) -> Tensor:
    """Return the cells of an image of `size` in a map of a batch of `padded` pixels; all of what is no such map."""
    layout = layout_of(output.shape, padded)
    if layout is None:
        return output
    h, w = (-(-side // layout.stride) for side in size)
    return as_map(output, layout, padded)[:, :, :h, :w]


@contextmanager
def _evaluation_in_float64(backbone: nn.Module) -> Iterator[None]:
    with evaluating(backbone), torch.no_grad(), torch.autocast("cpu", enabled=False), GroupsTogether():
        yield


class GroupsTogether(TorchFunctionMode):
    """Computes convolutions of many groups in 3 dimensions, the first of one cell.

    In 2 dimensions a CPU computes float64 one group after the other, which takes up to 15 times as long on small maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.conv2d or kwargs or not _has_groups_on_small_map(*args):
            return func(*args, **(kwargs or {}))
        x, weight, bias, stride, padding, dilation, groups = args
        x, weight = x.contiguous().unsqueeze(2), weight.contiguous().unsqueeze(2)
        return F.conv3d(x, weight, bias, (1, *stride), (0, *padding), (1, *dilation), groups).squeeze(2)


def _has_groups_on_small_map(x: Tensor, *arguments: Any) -> bool:
    """Return whether arguments, as nn.Conv2d gives them, are of a convolution of groups over at most 256 cells."""
    if len(arguments) != 6 or not all(isinstance(pair, tuple) for pair in arguments[2:5]):
        return False
    return arguments[5] > 1 and x.ndim == 4 and x.dtype == torch.float64 and x.shape[2] * x.shape[3] <= 256


def _draw_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor of this shape by which a layer's output is about as large as its input."""
    if tensor.numel() == max(tensor.shape, default=1):
        drawn = torch.rand(tensor.shape, generator=generator, device="cpu", dtype=torch.float64)
        return drawn * 0.8 + 0.2  # as variances and scales are: positive, around one half
    if not tensor.is_meta:
        tensor = tensor.detach().to("cpu", torch.float64)
    if tensor.is_meta or not tensor.any():
        tensor = torch.randn(tensor.shape, generator=generator, device="cpu", dtype=torch.float64)
    fan_in = tensor[0].numel()
    return tensor * (2 / fan_in / tensor.square().mean()).sqrt()  # for ReLU: arXiv 1502.01852, section 2.2
