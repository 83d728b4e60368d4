"""Exact padding: why an image's features never depend on who shares its batch.

A batch pads its smaller images with zeros, but the zeros do not last: the first bias makes the padding non-zero, and
every window larger than one cell carries it across the border into the image. `ExactPadding` zeroes the padded cells
again before each such window, which is what the window finds beyond the border of an image that stands alone. The valid
cells of a level follow by ceiling division, as they do for the image alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import current_thread
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor, Size, valid_sizes, zero_beyond

Padding: TypeAlias = Literal["exact", "zeros"]

# Layers whose output at a cell depends on nothing but that cell, once their window (if any) finds zeros in the padding.
# A max-pool finds no value beyond an image's border; after a ReLU, as in every ResNet, a zero comes to the same.
# Whether a layer that depends on the order of axes is used that way (LayerNorm, Linear, Upsample), `find_leak` tries.
_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_CELL_BY_CELL = (
    *(FrozenBatchNorm2d, nn.LayerNorm, nn.Linear, nn.Identity, nn.Sequential, nn.Dropout, nn.Dropout2d, nn.Upsample),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.Mish, nn.GELU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
)


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


def refuse_leaky_layers(body: nn.Module, *, all_run: bool) -> None:
    """Refuse a network with a layer of torch's that is not known to keep padding out of the image.

    Args:
        body: the network.
        all_run: whether it holds no layer that its outputs do not need; otherwise only norms are looked at.

    Raises:
        ConfigError: such as for a normalisation over the whole map; the message names the layer.
    """
    for path, module in body.named_modules():
        statistics = isinstance(module, _NormBase | nn.GroupNorm)
        leaf = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
        known = isinstance(module, _CELL_BY_CELL) or (isinstance(module, _WINDOWED) and _pads_with_zeros(module))
        if statistics or (all_run and leaf and not known):
            why = "takes its statistics from padded cells too" if statistics else "is not known to keep padding out"
            raise ConfigError(f"`padding` must be 'zeros' for this network, got 'exact': {path} ({module}) {why}")


class ExactPadding:
    """Zeroes the padded cells before every layer of a network whose window is larger than one cell.

    torch's own layers are known or refused here. The code of others, and between layers, is not seen: `find_leak` runs
    it. A part of the network that is computed a second time is exact within `again`; see `checkpoint_layers`.

    Args:
        body: the network; its convolutions and pools get a hook that does nothing outside `around`.
        input_strides: pixels per cell of what each layer takes, by path, as `measure` gives them.
    """

    def __init__(self, body: nn.Module, input_strides: Mapping[str, int]) -> None:
        # Keyed by thread: a server may run one network in several threads at once.
        self._levels: dict[int, _Levels | None] = {}
        for path, module in body.named_modules():
            if isinstance(module, _WINDOWED) and module.kernel_size not in (1, (1, 1)) and path in input_strides:
                module.register_forward_pre_hook(partial(self._before_window, input_strides[path]))

    def around(self, images: NestedTensor) -> AbstractContextManager[None]:
        """Within this context, a pass of the network over `images.tensors` is exact."""
        return _Within(self._levels, _Levels(images) if images.is_padded else None)

    def again(self) -> AbstractContextManager[None]:
        """The context that this thread is in now, for a part of the pass that is computed a second time, anywhere."""
        return _Within(self._levels, self._levels.get(current_thread()))

    def is_watched(self, body: nn.Module) -> bool:
        """Whether a layer of the network has a hook of someone else, who may count on the whole batch."""
        return any(
            module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or any(getattr(hook, "func", None) != self._before_window for hook in module._forward_pre_hooks.values())
            for module in body.modules()
        )

    def _before_window(self, stride: int, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        levels = self._levels.get(current_thread())
        if levels is None:
            return None
        (features,) = inputs
        # The image may be the caller's own memory, and another layer may have saved the features for its backward pass.
        in_place = stride > 1 and not torch.is_grad_enabled()
        return (levels.zero_padded_cells(features, stride, in_place=in_place),)


class _Within:
    """A context in which a thread has these levels; it can be entered again and again."""

    def __init__(self, running: "dict[int, _Levels | None]", levels: "_Levels | None") -> None:
        self._running = running
        self._levels = levels

    def __enter__(self) -> None:
        self._running[current_thread()] = self._levels

    def __exit__(self, *_: object) -> None:
        del self._running[current_thread()]


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
        return torch.where(mask[:, None], 0.0, features)  # masked_fill would not keep the memory format
    if features.device.type != "cpu":  # one kernel for the batch
        return features.masked_fill_(mask[:, None], 0)
    return zero_beyond(features, sizes)


def _pads_with_zeros(window: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether the window finds zeros, or nothing at all, beyond the border, as it does in zeroed padding."""
    if isinstance(window, nn.Conv2d):
        return window.padding_mode == "zeros"
    return isinstance(window, nn.MaxPool2d) or window.count_include_pad or window.padding in (0, (0, 0))
