"""What a batch of images must be, checked before anything is computed from it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_images(tensors: Sequence[Tensor]) -> None:
    """Refuse what is not a list of floating images [C, h, w] of one dtype, device and number of channels.

    Raises:
        TypeError: an entry is not a floating tensor of the first entry's dtype; the message names its index.
        ValueError: no images, or an entry's shape, channels or device do not fit; the message names its index.
    """
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


def check_sizes(sizes: Sequence[tuple[int, int]], expected: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return valid sizes (h, w) as a tuple, if they fit a batch of (B, H, W) = `expected`.

    Raises:
        ValueError: there are more or fewer, or one is larger than the batch or has no cell.
    """
    batch, height, width = expected
    if len(sizes) != batch:
        raise ValueError(f"`sizes` must hold one (h, w) for each of {batch} images, got {len(sizes)}")
    for index, (h, w) in enumerate(sizes):
        if not (1 <= h <= height and 1 <= w <= width):
            raise ValueError(f"`sizes[{index}]` must lie within (1, 1) and ({height}, {width}), got ({h}, {w})")
    return tuple((h, w) for h, w in sizes)


def sizes_from_mask(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the valid (h, w) of each image of a mask [B, H, W], True on padding; it waits for the device once.

    Raises:
        ValueError: the mask is not a rectangle in the top left corner, or leaves an image without a valid cell.
    """
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
