"""Images of different sizes as one padded batch, and the mask that says where the padding is.

The mask is made once, when a batch is collated, and follows the features through every later stage: attention must not
look at padding, and position encodings must not count it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from detr_backbone.batch_checks import check_images, check_sizes, check_values, sizes_from_mask

Size: TypeAlias = tuple[int, int]


class Batch(Protocol):
    """A padded batch of any DETR: `tensors` [B, C, H, W] and `mask` [B, H, W], True on padding."""

    @property
    def tensors(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...


Images: TypeAlias = Batch | Sequence[Tensor] | Tensor
"""What a backbone takes: a padded batch with its mask; images [C, h, w] of any sizes; or a batch [B, C, H, W]."""


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
        has_mask = mask is not None
        if mask is None:
            if sizes is not None:
                raise ValueError("`mask` must be given where `sizes` are, got None")
            mask = torch.zeros(expected, dtype=torch.bool, device=tensors.device)
            # A list of B entries would specialise a graph to this batch size.
            sizes = None if torch.compiler.is_compiling() else [(expected[1], expected[2])] * expected[0]
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
        self._has_mask = has_mask
        self._sizes: tuple[Size, ...] | None = None if sizes is None else check_sizes(sizes, expected)

    @property
    def mask(self) -> Tensor:
        """Bool [B, H, W], True on padding. Assign another one instead of writing to it: sizes are read once."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask = mask
        self._has_mask = True
        self._sizes = None
        self._strided: dict[int, tuple[Tensor, tuple[Size, ...] | None]] = {}

    @property
    def device(self) -> torch.device:
        return self.tensors.device

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Valid (h, w) of each image.

        Raises:
            ValueError: the mask is not a rectangle in the top left corner, or leaves an image without a valid cell.
        """
        if self._sizes is None:
            self._sizes = sizes_from_mask(self.mask)
        return self._sizes

    @property
    def is_padded(self) -> bool:
        """True if any image is smaller than the batch; while torch compiles, if a mask was given.

        A compiled graph must serve every batch of its shape, so it does what a mask asks for, padded or not.
        """
        if torch.compiler.is_compiling():
            return self._has_mask
        full = tuple(self.tensors.shape[-2:])
        return any(size != full for size in self.sizes)

    def at_stride(self, stride: int) -> tuple[Tensor, tuple[Size, ...] | None]:
        """Return how the batch looks in cells of `stride` pixels, made once for each stride.

        Returns:
            The mask [B, ceil(H / stride), ceil(W / stride)], True on padding: a cell is valid if its first pixel is.
            The valid (h, w) of each image in cells; None while torch compiles or exports, since a graph must not be
            specialised on them.

        >>> batch = nested_tensor_from_tensor_list([torch.zeros(3, 97, 131), torch.zeros(3, 64, 32)])
        >>> mask, sizes = batch.at_stride(32)
        >>> mask.shape, sizes
        (torch.Size([2, 4, 5]), ((4, 5), (2, 1)))
        """
        if stride not in self._strided:
            sizes = None if torch.compiler.is_compiling() else valid_sizes(self.sizes, stride)
            self._strided[stride] = (self.mask[:, ::stride, ::stride], sizes)
        return self._strided[stride]

    def decompose(self) -> tuple[Tensor, Tensor]:
        """Return the pair (tensors, mask)."""
        return self.tensors, self.mask

    def to(self, target: torch.device | torch.dtype | str | int, non_blocking: bool = False) -> "NestedTensor":
        """Return the batch on another device, or with `tensors` of another dtype: a mask stays bool."""
        tensors = self.tensors.to(target, non_blocking=non_blocking)
        return self._with(tensors, self.mask.to(tensors.device, non_blocking=non_blocking))

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that another CUDA stream uses the batch, as `Tensor.record_stream` does."""
        self.tensors.record_stream(stream)
        self.mask.record_stream(stream)

    def pin_memory(self) -> "NestedTensor":
        """Return the batch in page-locked memory; called by a DataLoader with `pin_memory=True`."""
        return self._with(self.tensors.pin_memory(), self.mask.pin_memory())

    def _with(self, tensors: Tensor, mask: Tensor) -> "NestedTensor":
        """Return the batch with other tensors that hold the same."""
        batch = NestedTensor(tensors, mask, sizes=self._sizes)
        batch._has_mask = self._has_mask
        return batch

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
            is taken as not padded. They are normalised as the network's weights expect: for torchvision's, RGB in
            0 .. 1 minus mean (0.485, 0.456, 0.406), divided by std (0.229, 0.224, 0.225).

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
    check_images(tensors)
    sizes = [(image.shape[1], image.shape[2]) for image in tensors]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    batch = tensors[0].new_empty(len(tensors), tensors[0].shape[0], height, width)
    for padded, image, (h, w) in zip(batch, tensors, sizes, strict=True):
        padded[:, :h, :w].copy_(image)
    return NestedTensor(zero_beyond(batch, sizes), _mask_of(batch, sizes), sizes=sizes)


def as_nested_tensor(images: Images, sizes: Sequence[Size] | None = None) -> NestedTensor:
    """Return what a backbone or a detector takes as images as a NestedTensor.

    Args:
        images: a NestedTensor, of this package or of any other; a list of images [C, h, w]; or a batch [B, C, H, W].
        sizes: valid (h, w) of each image of a batch [B, C, H, W] that was padded at the bottom and on the right by
            somebody else; left out, the whole batch is valid.

    Raises:
        TypeError, ValueError: as `nested_tensor_from_tensor_list`; or `sizes` are given with anything but a batch; or
            images that are no NestedTensor yet and lie on the CPU are not finite, or in 0 .. 255.
    """
    if isinstance(images, NestedTensor) and sizes is None:
        return images
    if sizes is not None:
        if not isinstance(images, Tensor):
            raise ValueError(
                f"`sizes` must be left out for anything but a batch [B, C, H, W], got {type(images).__name__}"
            )
        whole = nested_tensor_from_tensor_list(images)
        check_values(images)
        return NestedTensor(images, _mask_of(images, check_sizes(sizes, whole.mask.shape)), sizes=sizes)
    if isinstance(images, Tensor | Sequence) or not (hasattr(images, "tensors") and hasattr(images, "mask")):
        batch = nested_tensor_from_tensor_list(cast(Sequence[Tensor], images))
        check_values(cast(Sequence[Tensor], images))
        return batch
    return NestedTensor(images.tensors, images.mask)


def valid_sizes(sizes: Sequence[Size], stride: int) -> tuple[Size, ...]:
    """Valid (h, w) of each image in cells of `stride` pixels, by ceiling division.

    >>> valid_sizes([(97, 131), (64, 32)], stride=32)
    ((4, 5), (2, 1))
    """
    # Not -(-h // stride): ONNX divides towards zero.
    return tuple(((h + stride - 1) // stride, (w + stride - 1) // stride) for h, w in sizes)


def zero_beyond(maps: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Zero maps [B, C, H, W] in place beyond each one's own (h, w), and return them.

    Writing only the padded cells costs next to nothing.
    """
    for cells, (h, w) in zip(maps, sizes, strict=True):
        cells[:, h:].zero_()
        cells[:, :h, w:].zero_()
    return maps


def pad_to_multiple(images: NestedTensor, divisor: int) -> NestedTensor:
    """Return the batch with sides that `divisor` divides, padded at the bottom and on the right; itself where they are.

    >>> batch = NestedTensor(torch.ones(1, 3, 33, 64), None)
    >>> pad_to_multiple(batch, 32)
    NestedTensor([1, 3, 64, 64], torch.float32, device='cpu', sizes=[(33, 64)])
    """
    height, width = images.tensors.shape[-2:]
    below, right = ((side + divisor - 1) // divisor * divisor - side for side in (height, width))
    # A graph that is exported must not serve the multiples alone, or all sizes but these.
    if divisor == 1 or not (torch.compiler.is_exporting() or below or right):
        return images
    sizes = None if torch.compiler.is_compiling() else images.sizes  # a graph must not be specialised on them
    missing = (0, right, 0, below)
    return NestedTensor(F.pad(images.tensors, missing), F.pad(images.mask, missing, value=True), sizes=sizes)


def size_of(images: Tensor) -> Size:
    """(H, W) of a batch [B, C, H, W]."""
    return images.shape[-2], images.shape[-1]


def _mask_of(tensors: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Return the mask [B, H, W] of a batch [B, C, H, W], True beyond each image's (h, w)."""
    mask = torch.ones(tensors.shape[0], *size_of(tensors), dtype=torch.bool, device=tensors.device)
    for padding, (h, w) in zip(mask, sizes, strict=True):
        padding[:h, :w] = False
    return mask


def _flatten(batch: NestedTensor) -> tuple[list[Tensor], None]:
    return [batch.tensors, batch.mask], None  # a graph that knew the sizes would serve no others


def _unflatten(leaves: Iterable[Any], _: None) -> NestedTensor:
    batch = object.__new__(NestedTensor)  # nothing is checked: leaves may stand for tensors
    batch.tensors, batch.mask = leaves
    return batch


# For torch.export, torch.func and DistributedDataParallel this is a container of two tensors.
pytree.register_pytree_node(
    NestedTensor, _flatten, _unflatten, serialized_type_name="detr_backbone.nested_tensor.NestedTensor"
)
