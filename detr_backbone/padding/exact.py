"""Exact padding: why an image's features never depend on who shares its batch.

A batch pads its smaller images with zeros, but the zeros do not last: the first bias makes the padding non-zero, and
every window larger than one cell carries it across the border into the image. `zero_before_windows` makes a network
zero the padded cells again before each such window, which is what the window finds beyond the border of an image that
stands alone. The valid cells of a level follow by ceiling division, as they do for the image alone. A network for which
that is not enough runs its images by size instead; see `by_size`.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from detr_backbone.errors import ConfigError
from detr_backbone.folding import FoldedConv2d
from detr_backbone.forward_pass import Pass, PerThread
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor, Size, zero_beyond
from detr_backbone.networks.geometry import Geometry

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
    """Return a feature map as a level of its image batch: with its mask, and in exact mode zeros in the padded cells.

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
    if torch.compiler.is_compiling() and not images.is_padded:
        return NestedTensor(tensors, None)
    mask, sizes = images.at_stride(stride)
    level = NestedTensor(tensors, mask, sizes=sizes)
    if level.is_padded:
        level.tensors = _zero_padded_cells(tensors, mask, sizes, in_place=not torch.is_grad_enabled())
    return level


def refuse_batch_statistics(body: nn.Module) -> None:
    """Refuse a network with a norm that takes its statistics from the batch, where no image is independent of another.

    Raises:
        ConfigError: the message names the layer.
    """
    for path, module in body.named_modules():
        # An InstanceNorm that keeps statistics changes them in training, image by image.
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
            raise ConfigError(
                f"`padding` must be 'zeros' for this network, got 'exact': {path} ({module}) takes its statistics from "
                "the batch"
            )


def leaky_layer(body: nn.Module, geometry: Geometry, *, all_run: bool) -> str | None:
    """Return why zeros before every window do not make a network exact, as far as its layers show; None if they may.

    Args:
        body: the network.
        geometry: of the network.
        all_run: whether it holds no layer that its outputs do not need; otherwise only norms and windows are looked at.
    """
    for path, module in body.named_modules():
        is_of_torch = isinstance(module, FoldedConv2d) or type(module).__module__.startswith("torch.nn.")
        leaf = is_of_torch and not any(True for _ in module.children())
        known = isinstance(module, _CELL_BY_CELL) or (isinstance(module, _WINDOWED) and _pads_with_zeros(module))
        if isinstance(module, _NormBase | nn.GroupNorm):
            return f"{path} ({module}) takes its statistics from padded cells too"
        if all_run and leaf and not known:
            return f"{path} ({module}) is not known to keep padding out"
        if _is_window(module) and path in geometry.without_stride:
            return f"{path} ({module}) takes maps whose sides are not the image's divided by one whole stride"
    return None


def zero_before_windows(body: nn.Module, geometry: Geometry, passes: PerThread[Pass]) -> None:
    """Let a network zero the padded cells before every layer whose window is larger than one cell.

    torch's own layers are known, or `leaky_layer` names them. The code of others, and between layers, is not seen:
    `find_leak` runs it.

    Args:
        body: the network; its convolutions and pools get a hook that does nothing outside of a pass over padded images.
        geometry: of the network.
        passes: those of the backbone that runs the network.
    """
    for path, module in body.named_modules():
        if _is_window(module) and path in geometry.input_strides:
            module.window = (geometry.input_strides[path], passes)
            module.register_forward_pre_hook(zero_inputs)


def zero_inputs(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """Return the inputs of a window with zeros in the padded cells of the pass: its forward pre-hook."""
    window: Any = module.window
    stride, passes = window
    running = passes.get()
    if running is None or running.padded is None:
        return None
    (features,) = inputs
    if features.shape[0] != running.padded.mask.shape[0]:
        return None  # such as the heads of an attention: no map of the batch, and the self-test sees what it lets in
    # The image may be the caller's own memory, and another layer may have saved the features for its backward pass.
    in_place = stride > 1 and not torch.is_grad_enabled()
    return (_zero_padded_cells(features, *running.padded.at_stride(stride), in_place=in_place),)


def _zero_padded_cells(features: Tensor, mask: Tensor, sizes: Sequence[Size] | None, *, in_place: bool) -> Tensor:
    if not in_place or sizes is None:
        return torch.where(mask[:, None], 0.0, features)  # masked_fill would not keep the memory format
    if features.device.type != "cpu":  # one kernel for the batch
        return features.masked_fill_(mask[:, None], 0)
    return zero_beyond(features, sizes)


def _is_window(module: nn.Module) -> bool:
    return isinstance(module, _WINDOWED) and module.kernel_size not in (1, (1, 1))


def _pads_with_zeros(window: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Return whether the window takes zeros, or nothing at all, from beyond the border, as from zeroed padding."""
    if isinstance(window, nn.Conv2d):
        return window.padding_mode == "zeros"
    return isinstance(window, nn.MaxPool2d) or window.count_include_pad or window.padding in (0, (0, 0))
