"""Outputs of a network as maps [B, C, h, w], whatever order of axes the network computes in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Size, valid_sizes
from detr_backbone.networks.dry_run import PROBE, on_meta

_MOST_PREFIX_TOKENS = 16  # class and register tokens; fewer than the cells of any map that is looked at


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an output holds a map: its stride in pixels per cell, its channels, and the order of its axes.

    Args:
        stride: pixels per cell.
        channels: C.
        axes: "NCHW"; "NHWC", as Swin computes; or "NLC", cells as a sequence in rows, as ViT computes.
        prefix: entries of the sequence before the first cell, such as the class token; "NLC" only.
    """

    stride: int
    channels: int
    axes: Literal["NCHW", "NHWC", "NLC"]
    prefix: int = 0


def layout_of(shape: Sequence[int], image: Size) -> Layout | None:
    """The layout of an output of this shape for images of a size whose sides differ; None if it is no map of them.

    >>> layout_of((1, 64, 64, 80), (256, 320))
    Layout(stride=4, channels=64, axes='NCHW', prefix=0)
    >>> layout_of((1, 8, 10, 768), (256, 320)), layout_of((1, 1 + 16 * 20, 192), (256, 320))
    (Layout(stride=32, channels=768, axes='NHWC', prefix=0), Layout(stride=16, channels=192, axes='NLC', prefix=1))
    >>> layout_of((1, 1000), (256, 320)), layout_of((1, 512, 1, 1), (256, 320))
    (None, None)
    """
    height, width = image
    if len(shape) == 4:
        if stride := _stride((shape[2], shape[3]), image):
            return Layout(stride=stride, channels=shape[1], axes="NCHW")
        if stride := _stride((shape[1], shape[2]), image):
            return Layout(stride=stride, channels=shape[3], axes="NHWC")
    if len(shape) == 3:
        for stride in (1, 2, 4, 8, 16, 32, 64):
            prefix = shape[1] - (height // stride) * (width // stride)
            if 0 <= prefix <= _MOST_PREFIX_TOKENS:
                return Layout(stride=stride, channels=shape[2], axes="NLC", prefix=prefix)
    return None


def as_map(output: Tensor, layout: Layout, image: Size) -> Tensor:
    """An output as [B, C, h, w], without a copy; its gradient comes to the network in the output's memory format.

    Args:
        output: of this layout.
        layout: as `layout_of` gives it.
        image: (H, W) of the images; with tokens, a multiple of the stride.

    >>> import torch
    >>> tokens = torch.tensor([[[-1.0], [0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]])
    >>> as_map(tokens, Layout(stride=16, channels=1, axes="NLC", prefix=1), (32, 48))
    tensor([[[[0., 1., 2.],
              [3., 4., 5.]]]])
    """
    if layout.axes == "NHWC":
        output = output.permute(0, 3, 1, 2)
    if layout.axes == "NLC":
        cells = (image[0] // layout.stride, image[1] // layout.stride)
        output = output[:, layout.prefix :].transpose(1, 2).reshape(len(output), layout.channels, *cells)
    return _taking_gradients_like_itself(output)


def _taking_gradients_like_itself(maps: Tensor) -> Tensor:
    """Maps whose gradient, should it come in planes to channels side by side, is copied once, on its way in.

    Gradients are added up in the memory format of the first, and every sum of two formats takes ten times as long.
    """
    side_by_side = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    if maps.requires_grad and side_by_side and not torch.compiler.is_compiling():
        maps = maps.view_as(maps)  # a hook on the output itself would see the sum
        register: Any = maps.register_hook
        register(partial(Tensor.contiguous, memory_format=torch.channels_last))
    return maps


def _stride(cells: Size, image: Size) -> int:
    """Pixels per cell, 0 if it is no whole number or not the same for both axes."""
    if not all(cells) or any(side % cell for side, cell in zip(image, cells, strict=True)):
        return 0
    stride = image[0] // cells[0]
    return stride if stride == image[1] // cells[1] else 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What passes through a network show of its geometry."""

    layouts: dict[str, Layout]
    """Of each named output: stride, channels, order of the axes."""
    input_strides: dict[str, int]
    """Pixels per cell of what each inner layer takes, by path."""
    rounds_up: bool
    """Whether an output has ceil(side / stride) cells for images of any size."""

    @property
    def channels(self) -> dict[str, int]:
        return {name: layout.channels for name, layout in self.layouts.items()}

    @property
    def strides(self) -> dict[str, int]:
        """Pixels per cell of each named output."""
        return {name: layout.stride for name, layout in self.layouts.items()}

    @property
    def coarsest(self) -> int:
        """The largest stride anywhere in the network."""
        return max(*self.strides.values(), *self.input_strides.values())


def measure(body: nn.Module, *, prefix_tokens: int = 0) -> Measured:
    """Channels and strides of a network that maps [B, C, H, W] to a dict of feature maps, without computing anything.

    The passes run on the meta device: shapes without numbers.

    Args:
        body: the network.
        prefix_tokens: entries before the first cell where an output is a sequence of cells; timm's models say so.

    Raises:
        ConfigError: there is no convolution, the network does not take an image of 256 x 320 pixels, or an output is
            not a map whose sides are the image's divided by a whole stride.
    """
    input_strides: dict[str, int] = {}

    def remember(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and (layout := layout_of(inputs[0].shape, PROBE)):
            input_strides[path] = layout.stride

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(partial(remember, path)) for path, module in body.named_modules() if path
    ]
    try:
        outputs = on_meta(body)
    finally:
        for handle in handles:
            handle.remove()
    layouts = {}
    for name, output in outputs.items():
        layout = layout_of(output.shape, PROBE) if isinstance(output, Tensor) else None
        if layout is None or layout.prefix not in (0, prefix_tokens):
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"output {name!r} must be a feature map with a whole stride, got {got} for an image of "
                f"{PROBE[0]} x {PROBE[1]} pixels; return another layer"
            )
        layouts[name] = layout
    return Measured(layouts=layouts, input_strides=input_strides, rounds_up=_rounds_up(body, layouts))


def _rounds_up(body: nn.Module, layouts: Mapping[str, Layout]) -> bool:
    if any(layout.axes == "NLC" for layout in layouts.values()):
        return False
    odd = (PROBE[0] - 31, PROBE[1] - 31)
    try:
        outputs = on_meta(body, odd)
    except ConfigError:
        return False
    return all(
        tuple(as_map(outputs[name], layout, odd).shape[-2:]) == valid_sizes([odd], layout.stride)[0]
        for name, layout in layouts.items()
    )
