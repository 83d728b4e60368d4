"""The images of a padded batch in passes of equal size, without padding, and their levels as levels of the batch.

There are two reasons. A network that looks at the whole map, such as one with squeeze and excitation or with attention,
is exact in no other way. And on a processor, padding can be more work than a pass of its own for every size; a GPU
wants the batch. Where torch compiles, this stays outside of its graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.nested_tensor import NestedTensor, Size, size_of, zero_beyond

# What a further pass costs, in pixels of work. Measured for ResNet-18 and ResNet-50, forward and training step, float32
# and bf16 (Zen 4, two cores): a batch of four padded to 400 x 544 with this much padding per image takes 1.17 to 1.34
# times as long as its images; of eight padded to 224 x 224, with a fifth of it, 0.63 to 0.79 times.
_PIXELS_OF_A_PASS = 50_000


@dataclass(frozen=True, kw_only=True)
class SizeGroup:
    """Images of a batch that share a pass.

    Attributes:
        indices: of the images in the batch, ascending.
        images: they themselves [G, C, h, w]; padded only where the divisor asks it of each image alone too.
    """

    indices: tuple[int, ...]
    images: NestedTensor


def is_faster_by_size(images: NestedTensor, body: nn.Module) -> bool:
    """Return whether the padding of a batch is more work than a pass for each size of image in it.

    Never for a network whose parameters are sharded: all processes must make the same passes.
    """
    if torch.compiler.is_compiling() or images.device.type != "cpu" or is_sharded(body):
        return False
    batch, _, height, width = images.tensors.shape
    own = sum(h * w for h, w in images.sizes)
    return batch * height * width >= own + len(set(images.sizes)) * _PIXELS_OF_A_PASS


def is_sharded(body: nn.Module) -> bool:
    """Return whether a pass gathers parameters from other processes, as under `fully_shard`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in body.parameters())


@torch.compiler.disable(recursive=False, reason="compile without fullgraph: images of several sizes run one by one")  # type: ignore[untyped-decorator, no-untyped-call]
def run_by_size(
    run: Callable[[NestedTensor], Mapping[str, NestedTensor]],
    images: NestedTensor,
    strides: Sequence[int],
    divisor: int,
) -> dict[str, NestedTensor]:
    """Return the levels of a padded batch from a pass for each size of image.

    Args:
        run: a batch -> its levels [G, C, h, w] by name, finest first.
        images: the batch [B, C, H, W].
        strides: pixels per cell of each level.
        divisor: images are of one size if they are once their sides are padded to multiples of it.
    """
    groups = group_by_size(images, divisor)
    return merge_levels(groups, [run(group.images) for group in groups], images, strides)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def group_by_size(images: NestedTensor, divisor: int) -> list[SizeGroup]:
    """Return the images of a batch in groups whose sides are equal once they are padded to multiples of `divisor`."""
    indices: dict[Size, list[int]] = {}
    for index, (h, w) in enumerate(images.sizes):
        indices.setdefault((-(-h // divisor), -(-w // divisor)), []).append(index)
    return [SizeGroup(indices=tuple(group), images=_cut(images, group)) for group in indices.values()]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def merge_levels(
    groups: Sequence[SizeGroup],
    levels: Sequence[Mapping[str, NestedTensor]],
    images: NestedTensor,
    strides: Sequence[int],
) -> dict[str, NestedTensor]:
    """Return the levels of all groups as levels of the batch, with zeros in the padded cells.

    Args:
        groups: as `group_by_size` gives them.
        levels: of each group its levels [G, C, h, w] by name.
        images: the batch [B, C, H, W].
        strides: pixels per cell of each level.
    """
    apply: Any = _PasteIntoBatch.apply
    indices = [group.indices for group in groups]
    merged = {}
    for name, stride in zip(levels[0], strides, strict=True):
        mask, sizes = images.at_stride(stride)
        maps = [levels_of_group[name].tensors for levels_of_group in levels]
        merged[name] = NestedTensor(apply(mask.shape, indices, *maps), mask, sizes=sizes)
    return merged


def _cut(images: NestedTensor, indices: Sequence[int]) -> NestedTensor:
    sizes = [images.sizes[index] for index in indices]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    tensors = images.tensors[_as_index(indices), :, :height, :width]
    if len(set(sizes)) == 1:
        return NestedTensor(tensors, None)
    # What the padded cells of a batch hold is unspecified, and an image alone is padded with zeros.
    mask = images.mask[_as_index(indices), :height, :width]
    return NestedTensor(zero_beyond(tensors.clone(), sizes), mask, sizes=sizes)


def _as_index(indices: Sequence[int]) -> Any:
    """Return neighbours as a slice, which is a view."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else list(indices)


class _PasteIntoBatch(torch.autograd.Function):
    """Maps [G, C, h, w] in the upper left corners of their images in [B, C, H, W]; every value is written once."""

    @staticmethod
    def forward(shape: Sequence[int], indices: Sequence[Sequence[int]], *maps: Tensor) -> Tensor:
        first = maps[0]
        channels_last = first.is_contiguous(memory_format=torch.channels_last)
        batch = torch.empty(
            (shape[0], first.shape[1], *shape[1:]),
            dtype=first.dtype,
            device=first.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        sizes: list[Size] = [(0, 0)] * shape[0]
        for group, cells in zip(indices, maps, strict=True):
            batch[_as_index(group), :, : cells.shape[2], : cells.shape[3]] = cells
            for index in group:
                sizes[index] = size_of(cells)
        return zero_beyond(batch, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.indices, *maps = inputs
        ctx.sizes = [size_of(cells) for cells in maps]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups = zip(ctx.indices, ctx.sizes, strict=True)
        return None, None, *(gradient[_as_index(group), :, :h, :w] for group, (h, w) in groups)
