"""Exact padding: why an image's features never depend on who shares its batch.

A batch pads its smaller images with zeros, but the zeros do not last: the first bias makes the padding non-zero, and
every window larger than one cell carries it across the border into the image. `ExactPadding` zeroes the padded cells
again before each such window, which is what the window finds beyond the border of an image that stands alone. The valid
cells of a level follow by ceiling division, as they do for the image alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detr_backbone.errors import ConfigError
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.meta import PROBE, run_on_meta
from detr_backbone.nested_tensor import NestedTensor, Size
from detr_backbone.threads import current_thread

Padding: TypeAlias = Literal["exact", "zeros"]

# Layers whose output at a cell depends on nothing but that cell, once their window (if any) finds zeros in the padding.
# A max-pool finds no value beyond an image's border; after a ReLU, as in every ResNet, a zero comes to the same.
_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_CELL_BY_CELL = (FrozenBatchNorm2d, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)


def valid_sizes(sizes: Sequence[Size], stride: int) -> tuple[Size, ...]:
    """Valid (h, w) of each image in cells of `stride` pixels, by ceiling division.

    >>> valid_sizes([(97, 131), (64, 32)], stride=32)
    ((4, 5), (2, 1))
    """
    return tuple((-(-h // stride), -(-w // stride)) for h, w in sizes)


def feature_level(tensors: Tensor, images: NestedTensor, *, stride: int, padding: Padding) -> NestedTensor:
    """A feature map as a level of its image batch: with the mask, and in exact mode with zeros in the padded cells.

    Args:
        tensors: features [B, C, h, w] of `images`.
        images: the batch [B, C, H, W] that they were computed from.
        stride: pixels per cell, h = ceil(H / stride).
        padding: "exact" takes the mask by ceiling division and zeroes the padded cells; "zeros" resizes the mask to the
            nearest pixel and leaves the cells as they are (facebookresearch/detr, models/backbone.py).

    Raises:
        ValueError: in exact mode, the map does not have ceil(H / stride) by ceil(W / stride) cells.
    """
    if padding == "zeros":
        mask = F.interpolate(images.mask[None].float(), size=tensors.shape[-2:]).to(torch.bool)[0]
        return NestedTensor(tensors, mask)
    mask = images.mask[:, ::stride, ::stride]
    # A compiled graph must not be specialised on the sizes.
    sizes = None if torch.compiler.is_compiling() else valid_sizes(images.sizes, stride)
    level = NestedTensor(tensors, mask, sizes=sizes)
    if level.is_padded:
        level.tensors = _zero_padded_cells(tensors, mask, sizes, in_place=not torch.is_grad_enabled())
    return level


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one pass through a network shows of its geometry."""

    channels: dict[str, int]
    strides: dict[str, int]
    """Pixels per cell of each named output."""
    input_strides: dict[str, int]
    """Pixels per cell of what each inner layer takes, by path."""


def measure(body: nn.Module) -> Measured:
    """Channels and strides of a network that maps [B, C, H, W] to a dict of feature maps, without computing anything.

    The pass runs on the meta device: shapes without numbers.

    Raises:
        ConfigError: there is no convolution, or an output is not a map whose side is the image's divided by a whole
            stride.
    """
    input_strides: dict[str, int] = {}

    def remember(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].ndim == 4 and PROBE % inputs[0].shape[-1] == 0:
            input_strides[path] = PROBE // inputs[0].shape[-1]

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(partial(remember, path))
        for path, module in body.named_modules()
        if not list(module.children())
    ]
    try:
        outputs: dict[str, Tensor] = run_on_meta(body)
    finally:
        for handle in handles:
            handle.remove()
    for name, output in outputs.items():
        if output.ndim != 4 or PROBE % output.shape[-1]:
            raise ConfigError(
                f"output {name!r} must be a feature map with a whole stride, got {list(output.shape)} for an image of "
                f"{PROBE} x {PROBE} pixels; return another layer"
            )
    return Measured(
        channels={name: output.shape[1] for name, output in outputs.items()},
        strides={name: PROBE // output.shape[-1] for name, output in outputs.items()},
        input_strides=input_strides,
    )


class ExactPadding:
    """Zeroes the padded cells before every layer of a network whose window is larger than one cell.

    Every layer is looked at, code between layers is not: it must work cell by cell. A part of the network that is
    computed a second time outside `around`, as activation checkpointing does, is not exact then.

    Args:
        body: the network; its convolutions and pools get a hook that does nothing outside `around`.
        input_strides: pixels per cell of what each layer takes, by path, as `measure` gives them.

    Raises:
        ConfigError: a layer is not known to keep padding out, such as a normalisation over the whole map.
    """

    def __init__(self, body: nn.Module, input_strides: Mapping[str, int]) -> None:
        # Keyed by thread: a server may run one network in several threads at once.
        self._levels: dict[int, _Levels] = {}
        for path, module in body.named_modules():
            if any(True for _ in module.children()) or isinstance(module, _CELL_BY_CELL):
                continue
            if not isinstance(module, _WINDOWED) or not _pads_with_zeros(module):
                raise ConfigError(
                    f"`padding` must be 'zeros' for this network, got 'exact': {path} ({module}) is not known to keep "
                    "padding out of the image"
                )
            if module.kernel_size not in (1, (1, 1)):
                if path not in input_strides:
                    raise ConfigError(f"`padding` must be 'zeros' for this network, got 'exact': {path} has no stride")
                module.register_forward_pre_hook(partial(self._before_window, input_strides[path]))

    @contextmanager
    def around(self, images: NestedTensor) -> Iterator[None]:
        """Within this context, a pass of the network over `images.tensors` is exact."""
        if not images.is_padded:
            yield
            return
        thread = current_thread()
        self._levels[thread] = _Levels(images)
        try:
            yield
        finally:
            del self._levels[thread]

    def _before_window(self, stride: int, window: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        levels = self._levels.get(current_thread())
        if levels is None:
            return None
        (features,) = inputs
        # The image may be the caller's own memory, and what takes part in a backward pass must stay as it is.
        learns = features.requires_grad or any(parameter.requires_grad for parameter in window.parameters())
        in_place = stride > 1 and not (learns and torch.is_grad_enabled())
        return (levels.zero_padded_cells(features, stride, in_place=in_place),)


class _Levels:
    """The masks of one batch at every stride that its pass meets, each made once."""

    def __init__(self, images: NestedTensor) -> None:
        self._images = images
        self._made: dict[int, tuple[Tensor, tuple[Size, ...] | None]] = {}

    def zero_padded_cells(self, features: Tensor, stride: int, *, in_place: bool) -> Tensor:
        if stride not in self._made:
            sizes = None if torch.compiler.is_compiling() else valid_sizes(self._images.sizes, stride)
            self._made[stride] = (self._images.mask[:, ::stride, ::stride], sizes)
        return _zero_padded_cells(features, *self._made[stride], in_place=in_place)


def _zero_padded_cells(features: Tensor, mask: Tensor, sizes: Sequence[Size] | None, *, in_place: bool) -> Tensor:
    if not in_place or sizes is None:
        return features.masked_fill(mask[:, None], 0)
    if features.device.type != "cpu":  # one kernel for the batch
        return features.masked_fill_(mask[:, None], 0)
    for image, (h, w) in zip(features, sizes, strict=True):  # writing only the padded cells costs next to nothing
        image[:, h:].zero_()
        image[:, :h, w:].zero_()
    return features


def _pads_with_zeros(window: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether the window finds zeros, or nothing at all, beyond the border, as it does in zeroed padding."""
    if isinstance(window, nn.Conv2d):
        return window.padding_mode == "zeros"
    return not window.ceil_mode and (isinstance(window, nn.MaxPool2d) or window.count_include_pad)
