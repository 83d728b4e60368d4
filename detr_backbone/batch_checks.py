"""What a batch of images must be, checked before anything is computed from it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BRIGHTEST = 16.0  # of images without negative values, well above 1 and well below 255


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
                hint = "; this looks like [h, w, C]: permute(2, 0, 1)" if image.shape[2] in (1, 3, 4) else ""
                raise error(f"images[{index}] must have the {what} of images[0], {expected}, got {got}{hint}")


def check_values(images: Sequence[Tensor] | Tensor) -> None:
    """Refuse NaN, infinity and what looks like 0 .. 255, on the CPU, where looking at all values waits for nothing.

    Normalised images lie within about -3 .. 3, and images of mean 0 without a scale, as of Caffe's models, are negative
    somewhere. What is never negative and goes beyond 16 has kept the range of 8 bits.

    Raises:
        ValueError: naming the image.
    """
    if torch.compiler.is_compiling():
        return
    for index, image in enumerate(images):
        if image.device.type != "cpu":
            return
        low, high = (value.item() for value in image.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"images[{index}] must be finite, got values from {low} to {high}")
        if low >= 0 and high > _BRIGHTEST:
            raise ValueError(
                f"images[{index}] must be normalised, within about -3 to 3, got {low:.3g} to {high:.3g}: divide by "
                "255, subtract the mean and divide by the standard deviation that the weights were trained with"
            )


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
