"""Images of different sizes as one padded batch, and the mask that says where the padding is.

The mask is made once, when a batch is collated, and follows the features through every later stage: attention must not
look at padding, and position encodings must not count it.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Size: TypeAlias = tuple[int, int]


class NestedTensor:
    """A padded batch with its mask: `tensors` [B, C, H, W] and `mask` [B, H, W], True on padding.

    Every image stands in the top left corner of its slot. Its valid height and width are kept as plain integers, so
    that asking whether anything is padded never waits for a device.

    Args:
        tensors: the batch [B, C, H, W], of any dtype and device; what the padded cells hold is unspecified.
        mask: bool [B, H, W] on the same device, True on padding; None where nothing is padded.
        sizes: valid (h, w) of each image, 1 <= h <= H and 1 <= w <= W. Left out, they are read from `mask` when they
            are first asked for; that waits for the device once.

    Raises:
        TypeError: `mask` is not a bool tensor.
        ValueError: shapes or sizes do not fit each other, or an image has no valid cell.

    >>> batch = nested_tensor_from_tensor_list([torch.zeros(3, 4, 6), torch.zeros(3, 5, 2)])
    >>> batch.tensors.shape, batch.mask.shape, batch.sizes, batch.is_padded
    (torch.Size([2, 3, 5, 6]), torch.Size([2, 5, 6]), ((4, 6), (5, 2)), True)
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None, *, sizes: Sequence[Size] | None = None) -> None:
        if tensors.ndim != 4:
            raise ValueError(f"`tensors` must be [B, C, H, W], got {list(tensors.shape)}")
        expected = [tensors.shape[0], *tensors.shape[-2:]]
        if mask is None:
            if sizes is not None:
                raise ValueError("`mask` must be given where `sizes` are, got None")
            mask = torch.zeros(expected, dtype=torch.bool, device=tensors.device)
            sizes = [(expected[1], expected[2])] * expected[0]
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be bool, True on padding, got {mask.dtype}")
        if list(mask.shape) != expected:
            raise ValueError(
                f"`mask` must be [B, H, W] = {expected} to fit `tensors` {list(tensors.shape)}, got {list(mask.shape)}"
            )
        if mask.device != tensors.device:
            raise ValueError(f"`mask` must be on the device of `tensors`, {tensors.device}, got {mask.device}")
        self.tensors = tensors
        self.mask = mask
        self._sizes = None if sizes is None else _checked_sizes(sizes, expected)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Valid (h, w) of each image.

        Raises:
            ValueError: the mask is not a rectangle in the top left corner, or leaves an image without a valid cell.
        """
        if self._sizes is None:
            self._sizes = _sizes_from_mask(self.mask)
        return self._sizes

    @property
    def is_padded(self) -> bool:
        """Whether any image is smaller than the batch; always True while torch compiles.

        A compiled graph must serve every batch of its shape, so it does what padding asks for, padded or not.
        """
        if torch.compiler.is_compiling():
            return True
        full = tuple(self.tensors.shape[-2:])
        return any(size != full for size in self.sizes)

    def decompose(self) -> tuple[Tensor, Tensor]:
        """The pair (tensors, mask)."""
        return self.tensors, self.mask

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "NestedTensor":
        """The same batch on another device."""
        tensors = self.tensors.to(device, non_blocking=non_blocking)
        return NestedTensor(tensors, self.mask.to(device, non_blocking=non_blocking), sizes=self._sizes)

    def pin_memory(self) -> "NestedTensor":
        """The same batch in page-locked memory; called by a DataLoader with `pin_memory=True`."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory(), sizes=self._sizes)

    def __len__(self) -> int:
        return self.tensors.shape[0]

    def __repr__(self) -> str:
        sizes = "not read yet" if self._sizes is None else str(list(self._sizes))
        shape, dtype, device = list(self.tensors.shape), self.tensors.dtype, self.tensors.device
        return f"NestedTensor({shape}, {dtype}, device={str(device)!r}, sizes={sizes})"


def nested_tensor_from_tensor_list(tensors: Sequence[Tensor] | Tensor) -> NestedTensor:
    """Images of any sizes as one batch, padded with zeros at the bottom and on the right.

    Args:
        tensors: images [C, h, w], all of one floating dtype, device and channel count; or a batch [B, C, H, W], which
            is taken as not padded.

    Raises:
        TypeError: an entry is not a floating tensor of the first entry's dtype; the message names its index.
        ValueError: no images, or an entry's shape, channels or device do not fit; the message names its index.
    """
    if isinstance(tensors, Tensor):
        if tensors.ndim != 4:
            raise ValueError(f"a batch must be [B, C, H, W], got {list(tensors.shape)}; pass one image as a list")
        if not tensors.is_floating_point():
            raise TypeError(f"images must be floating point, normalised, got {tensors.dtype}")
        if 0 in tensors.shape:
            raise ValueError(f"a batch must hold at least one cell, got {list(tensors.shape)}")
        return NestedTensor(tensors, None)
    _check_images(tensors)
    sizes = [(image.shape[1], image.shape[2]) for image in tensors]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    batch = tensors[0].new_empty(len(tensors), tensors[0].shape[0], height, width)
    mask = torch.ones(len(tensors), height, width, dtype=torch.bool, device=batch.device)
    for index, (image, (h, w)) in enumerate(zip(tensors, sizes, strict=True)):
        batch[index, :, :h, :w].copy_(image)
        batch[index, :, h:] = batch[index, :, :h, w:] = 0
        mask[index, :h, :w] = False
    return NestedTensor(batch, mask, sizes=sizes)


def as_nested_tensor(images: NestedTensor | Sequence[Tensor] | Tensor) -> NestedTensor:
    """What a backbone or a detector takes as images, as a NestedTensor: one already, a list of images, or a batch."""
    return images if isinstance(images, NestedTensor) else nested_tensor_from_tensor_list(images)


def _check_images(tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, Sequence) or isinstance(tensors, str):
        raise TypeError(f"images must be a list of tensors or a tensor [B, C, H, W], got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("images must hold at least one tensor, got an empty list")
    for index, image in enumerate(tensors):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{index}] must be a tensor [C, h, w], got {type(image).__name__}")
        if image.ndim != 3:
            raise ValueError(f"images[{index}] must be [C, h, w], got {list(image.shape)}")
        if 0 in image.shape:
            raise ValueError(f"images[{index}] must hold at least one cell, got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"images[{index}] must be floating point, normalised, got {image.dtype}")
        for what, got, expected in (
            ("dtype", image.dtype, tensors[0].dtype),
            ("device", image.device, tensors[0].device),
            ("channels", image.shape[0], tensors[0].shape[0]),
        ):
            if got != expected:
                error = TypeError if what == "dtype" else ValueError
                raise error(f"images[{index}] must have the {what} of images[0], {expected}, got {got}")


def _checked_sizes(sizes: Sequence[Size], expected: Sequence[int]) -> tuple[Size, ...]:
    batch, height, width = expected
    if len(sizes) != batch:
        raise ValueError(f"`sizes` must hold one (h, w) for each of {batch} images, got {len(sizes)}")
    for index, (h, w) in enumerate(sizes):
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(f"`sizes[{index}]` must lie within (1, 1) and ({height}, {width}), got ({h}, {w})")
    return tuple((h, w) for h, w in sizes)


def _sizes_from_mask(mask: Tensor) -> tuple[Size, ...]:
    valid = ~mask
    height, width = valid.any(dim=2).sum(dim=1), valid.any(dim=1).sum(dim=1)
    rows = torch.arange(mask.shape[1], device=mask.device)
    columns = torch.arange(mask.shape[2], device=mask.device)
    rectangle = (rows[:, None] < height[:, None, None]) & (columns < width[:, None, None])
    fits = (rectangle == valid).flatten(1).all(dim=1).tolist()
    sizes = list(zip(height.tolist(), width.tolist(), strict=True))
    for index, (size, fit) in enumerate(zip(sizes, fits, strict=True)):
        if not fit:
            raise ValueError(
                f"`mask[{index}]` must leave one rectangle in the top left corner valid, got another shape"
            )
        if 0 in size:
            raise ValueError(f"`mask[{index}]` must leave at least one cell valid, got padding only")
    return tuple(sizes)


def valid_sizes(sizes: Sequence[Size], stride: int) -> tuple[Size, ...]:
    """Valid (h, w) of each image in cells of `stride` pixels, by ceiling division.

    >>> valid_sizes([(97, 131), (64, 32)], stride=32)
    ((4, 5), (2, 1))
    """
    return tuple((-(-h // stride), -(-w // stride)) for h, w in sizes)


def zero_beyond(maps: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Maps [B, C, H, W] with zeros, in place, beyond each one's own (h, w).

    Writing only the padded cells costs next to nothing.
    """
    for cells, (h, w) in zip(maps, sizes, strict=True):
        cells[:, h:].zero_()
        cells[:, :h, w:].zero_()
    return maps


def pad_to_multiple(images: NestedTensor, divisor: int) -> NestedTensor:
    """The batch with sides that `divisor` divides, padded at the bottom and on the right; itself where they are.

    >>> batch = NestedTensor(torch.ones(1, 3, 33, 64), None)
    >>> pad_to_multiple(batch, 32)
    NestedTensor([1, 3, 64, 64], torch.float32, device='cpu', sizes=[(33, 64)])
    """
    height, width = images.tensors.shape[-2:]
    missing = (0, -width % divisor, 0, -height % divisor)
    if not any(missing):
        return images
    sizes = None if torch.compiler.is_compiling() else images.sizes  # see `feature_level`
    return NestedTensor(F.pad(images.tensors, missing), F.pad(images.mask, missing, value=True), sizes=sizes)


def size_of(images: Tensor) -> Size:
    """(H, W) of a batch [B, C, H, W]."""
    return images.shape[-2], images.shape[-1]
