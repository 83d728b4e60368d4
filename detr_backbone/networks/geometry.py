"""Strides and channels of a network's layers, and its outputs as maps [B, C, h, w], whatever order of axes it uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Size, valid_sizes
from detr_backbone.networks.dry_run import PROBE, DryRun

_MOST_PREFIX_TOKENS = 16  # class and register tokens; fewer than the cells of any map that is looked at
_TOKEN_STRIDES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64)
_PROBES: tuple[Size, ...] = (PROBE, (448, 672), (512, 768))  # the second for patches of 14 pixels


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """Layout of a map in an output: its stride in pixels per cell, its channels, and the order of its axes.

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


def layout_of(shape: Sequence[int], image: Size) -> MapLayout | None:
    """Return the layout of an output of this shape for images whose sides differ; None if it is no map of them.

    >>> layout_of((1, 64, 64, 80), (256, 320))
    MapLayout(stride=4, channels=64, axes='NCHW', prefix=0)
    >>> layout_of((1, 8, 10, 768), (256, 320))
    MapLayout(stride=32, channels=768, axes='NHWC', prefix=0)
    >>> layout_of((1, 1 + 16 * 20, 192), (256, 320))
    MapLayout(stride=16, channels=192, axes='NLC', prefix=1)
    >>> layout_of((1, 1000), (256, 320)), layout_of((1, 512, 1, 1), (256, 320))
    (None, None)
    """
    height, width = image
    if len(shape) == 4:
        if stride := _stride((shape[2], shape[3]), image):
            return MapLayout(stride=stride, channels=shape[1], axes="NCHW")
        if stride := _stride((shape[1], shape[2]), image):
            return MapLayout(stride=stride, channels=shape[3], axes="NHWC")
    if len(shape) == 3:
        for stride in _TOKEN_STRIDES:
            if height % stride or width % stride:
                continue
            prefix = shape[1] - (height // stride) * (width // stride)
            if 0 <= prefix <= _MOST_PREFIX_TOKENS:
                return MapLayout(stride=stride, channels=shape[2], axes="NLC", prefix=prefix)
    return None


def as_map(output: Tensor, layout: MapLayout, image: Size, *, channels_last: bool = False) -> Tensor:
    """Return an output as [B, C, h, w], without a copy; its gradient reaches the network in its memory format.

    Args:
        output: of this layout.
        layout: as `layout_of` gives it.
        image: (H, W) of the images; with tokens, a multiple of the stride.
        channels_last: copy a map in NCHW, in which convolutions over few cells compute, to torch.channels_last.

    >>> import torch
    >>> tokens = torch.tensor([[[-1.0], [0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]])
    >>> as_map(tokens, MapLayout(stride=16, channels=1, axes="NLC", prefix=1), (32, 48))
    tensor([[[[0., 1., 2.],
              [3., 4., 5.]]]])
    """
    if layout.axes == "NHWC":
        output = output.permute(0, 3, 1, 2)
    if layout.axes == "NLC":
        cells = (image[0] // layout.stride, image[1] // layout.stride)
        output = output[:, layout.prefix :].transpose(1, 2).reshape(output.shape[0], layout.channels, *cells)
    output = _with_gradients_in_its_format(output)
    if channels_last and layout.axes == "NCHW" and not torch.compiler.is_compiling():
        output = output.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as torch.func.vmap can do it too
    return output


def _with_gradients_in_its_format(maps: Tensor) -> Tensor:
    """Return maps whose gradient, should it come in another memory format, is copied once to theirs on its way in.

    Gradients are added up in the memory format of the first, and every sum of two formats takes ten times as long.
    """
    if torch.compiler.is_compiling() or not maps.requires_grad:
        return maps
    known = (torch.contiguous_format, torch.channels_last)
    formats = [one for one in known if maps.is_contiguous(memory_format=one)]
    if len(formats) == 1:  # none for tokens behind others, both for a single cell
        maps = maps.view_as(maps)  # a hook on the output itself would see the sum
        register: Any = maps.register_hook
        register(partial(Tensor.contiguous, memory_format=formats[0]))
    return maps


def _stride(cells: Size, image: Size) -> int:
    """Pixels per cell, 0 if it is no whole number or not the same for both axes."""
    if not all(cells) or any(side % cell for side, cell in zip(image, cells, strict=True)):
        return 0
    stride = image[0] // cells[0]
    return stride if stride == image[1] // cells[1] else 0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Strides and channels of a network's layers, as dry runs show them.

    Attributes:
        layouts: of each output asked for: stride, channels, order of the axes.
        input_strides: pixels per cell of what each inner layer takes, by path, for those that run before the last
            output is there, and always take maps of one whole stride.
        without_stride: paths of the layers that take 4-dimensional maps of no whole stride, or of several.
        divisor: sides of a batch must be multiples of it; 1 where an output has ceil(side / stride) cells for images
            of any size.
    """

    layouts: tuple[MapLayout, ...]
    input_strides: dict[str, int]
    without_stride: frozenset[str]
    divisor: int

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(layout.channels for layout in self.layouts)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(layout.stride for layout in self.layouts)

    @property
    def coarsest(self) -> int:
        """The largest stride anywhere in the network."""
        return max(*self.strides, *self.input_strides.values())


def probe(network: nn.Module) -> DryRun:
    """Return a dry run of a network for the first image size that it takes: 256 x 320, 448 x 672 or 512 x 768 pixels.

    If it takes none, the run of the first says why; it may be for a head only, after the layers that give maps.
    """
    first = DryRun(network, _PROBES[0])
    runs = (DryRun(network, size) for size in _PROBES[1:])
    return first if first.error is None else next((run for run in runs if run.error is None), first)


def measure(network: nn.Module, dry_run: DryRun, paths: Sequence[str]) -> Geometry:
    """Return channels and strides of some layers of a network, without computing anything.

    Args:
        network: maps [B, C, H, W]; `num_prefix_tokens` says where an output is a sequence how many entries stand before
            its first cell, as timm's models do.
        dry_run: of the network, as `probe` makes it.
        paths: of the layers.

    Raises:
        ConfigError: the network does not take an image of the dry run's size, or a layer's output is not a map whose
            sides are the image's divided by a whole stride.
    """
    prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
    layouts = tuple(_layout(dry_run, path, prefix_tokens) for path in paths)
    last = max(dry_run.reached(path).end for path in paths)
    strides: dict[str, int] = {}
    without: set[str] = set()
    for path, call in dry_run.calls.items():
        maps = [layout_of(shape, dry_run.size) for shape in call.input_shapes]
        measured = {layout.stride for layout in maps if layout is not None}
        if call.start > last:
            continue
        if len(measured) == 1 and None not in maps:
            strides[path] = measured.pop()
        elif any(len(shape) == 4 for shape in call.input_shapes):
            without.add(path)
    geometry = Geometry(layouts=layouts, input_strides=strides, without_stride=frozenset(without), divisor=1)
    return replace(geometry, divisor=_divisor(network, geometry, dry_run, paths))


def _layout(dry_run: DryRun, path: str, prefix_tokens: int) -> MapLayout:
    shape = dry_run.reached(path).output_shape
    layout = None if shape is None else layout_of(shape, dry_run.size)
    if layout is None or layout.prefix not in (0, prefix_tokens):
        got = "no tensor" if shape is None else list(shape)
        height, width = dry_run.size
        raise ConfigError(
            f"`return_layers` must name layers that give a feature map with a whole stride, got {got} of {path!r} for "
            f"an image of {height} x {width} pixels; return another layer"
        )
    return layout


def _divisor(network: nn.Module, geometry: Geometry, dry_run: DryRun, paths: Sequence[str]) -> int:
    if _rounds_up(network, geometry, dry_run, paths):
        return 1
    coarsest = geometry.coarsest
    for divisor in (coarsest, 7 * coarsest, 8 * coarsest):  # the last two for windows of 7 or 8 cells
        size = (3 * divisor, 5 * divisor)
        run = DryRun(network, size)
        if all(path in run.calls and run.calls[path].end for path in paths):
            return divisor
    return coarsest


def _rounds_up(network: nn.Module, geometry: Geometry, dry_run: DryRun, paths: Sequence[str]) -> bool:
    if any(layout.axes == "NLC" for layout in geometry.layouts):
        return False
    size = (dry_run.size[0] - 31, dry_run.size[1] - 31)
    odd = DryRun(network, size)
    for path, layout in zip(paths, geometry.layouts, strict=True):
        call = odd.calls.get(path)
        if call is None or not call.end or call.output_shape is None:
            return False
        axes = (1, 2) if layout.axes == "NHWC" else (2, 3)
        if tuple(call.output_shape[axis] for axis in axes) != valid_sizes([size], layout.stride)[0]:
            return False
    return True
