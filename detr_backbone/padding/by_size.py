"""The images of a padded batch one after the other, where that is less work than the batch with its padding.

Exact padding makes an image's features those that it has alone, so computing each image alone gives the same, and no
cell of padding is computed at all. A processor gains nothing from a batch of large images; small ones keep it busy only
together, and a GPU wants the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr_backbone.nested_tensor import NestedTensor, Size, size_of, valid_sizes, zero_beyond

# What a further pass costs, in pixels of work. Measured for ResNet-18 and ResNet-50, forward and training step, float32
# and bf16 (Zen 4, two cores): a batch of four padded to 400 x 544 with this much padding per image takes 1.17 to 1.34
# times as long as its images; of eight padded to 224 x 224, with a fifth of it, 0.63 to 0.79 times.
_PIXELS_OF_A_PASS = 50_000


def is_faster_image_by_image(images: NestedTensor) -> bool:
    """Whether the padding of a batch is more work than a pass for each of its images."""
    if torch.compiler.is_compiling() or images.tensors.device.type != "cpu":
        return False
    batch, _, height, width = images.tensors.shape
    return batch * (height * width - _PIXELS_OF_A_PASS) >= sum(h * w for h, w in images.sizes)


def each_image(images: NestedTensor) -> Iterator[NestedTensor]:
    """Every image as a batch of its own, without padding."""
    for image, (h, w) in zip(images.tensors, images.sizes, strict=True):
        yield NestedTensor(image[None, :, :h, :w], None)


def together(
    alone: Sequence[Mapping[str, NestedTensor]], images: NestedTensor, strides: Sequence[int]
) -> dict[str, NestedTensor]:
    """The levels of each image as levels of the batch, with zeros in the padded cells.

    Args:
        alone: for each image its levels [1, C, h, w] by name.
        images: the batch [B, C, H, W].
        strides: pixels per cell of each level.
    """
    apply: Any = _Together.apply
    levels = {}
    for name, stride in zip(alone[0], strides, strict=True):
        mask = images.mask[:, ::stride, ::stride]
        maps = [levels_of_image[name].tensors for levels_of_image in alone]
        levels[name] = NestedTensor(apply(mask.shape[1:], *maps), mask, sizes=valid_sizes(images.sizes, stride))
    return levels


class _Together(torch.autograd.Function):
    """Maps [1, C, h, w] in the upper left corners of [B, C, H, W], with every value and every zero written once."""

    @staticmethod
    def forward(size: Size, *maps: Tensor) -> Tensor:
        first = maps[0]
        side_by_side = first.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if side_by_side else torch.contiguous_format
        batch = torch.empty(
            (len(maps), first.shape[1], *size), dtype=first.dtype, device=first.device, memory_format=memory_format
        )
        for cells, (alone,) in zip(batch, maps, strict=True):
            cells[:, : alone.shape[1], : alone.shape[2]] = alone
        return zero_beyond(batch, [size_of(alone) for alone in maps])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sizes = [size_of(alone) for alone in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient[index : index + 1, :, :h, :w] for index, (h, w) in enumerate(ctx.sizes))
