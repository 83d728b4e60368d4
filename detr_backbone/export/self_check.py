"""An exported file against the model that it was made from, on batches that differ in all that a graph may freeze."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list

SCALES = (1, 2, 4, 8)
DETECTIONS = {"pred_logits", "pred_boxes"}


def smallest_scale(model: nn.Module, *, unit: int, in_channels: int) -> int:
    """Return the least scale of `check_batches` at which the model takes every batch.

    Networks refuse images that are too small for them.

    Raises:
        ValueError: the model takes them at no scale.
    """
    for scale in SCALES:
        try:
            with torch.inference_mode():
                model([torch.zeros(in_channels, *_smallest(unit * scale))])
        except ValueError:
            if scale == SCALES[-1]:
                raise
        else:
            return scale
    raise AssertionError  # the loop returns or raises


def check_batches(
    *, unit: int, in_channels: int, others: Sequence[tuple[int, int, int]] = ()
) -> Iterator[tuple[str, NestedTensor]]:
    """Yield batches with what each of them is.

    Between them: one image and several, odd sides and sides that strides divide, wide and tall, with and without
    padding, padding beyond the largest image, levels of few cells.

    Args:
        unit: pixels per cell of the coarsest level, times the scale.
        in_channels: C of the images.
        others: numbers and sizes of images (B, H, W) to try too.
    """
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Tensor:
        return torch.randn(in_channels, height, width, generator=generator)

    odd, even = (4 * unit + 5, 4 * unit + 19), (3 * unit, 5 * unit)
    yield f"one image, {odd[0]} x {odd[1]}", nested_tensor_from_tensor_list([image(*odd)])
    yield f"one image, {_smallest(unit)[0]} x {_smallest(unit)[1]}", _one(image(*_smallest(unit)))
    yield f"two images, {even[0]} x {even[1]}", nested_tensor_from_tensor_list([image(*even), image(*even)])
    padded = [(3 * unit + 1, 4 * unit + 3), odd, (5 * unit, 2 * unit), odd]
    yield (
        f"four images of three sizes, padded to {_span(padded)}",
        nested_tensor_from_tensor_list([image(*size) for size in padded]),
    )
    tall = (5 * unit - 1, 2 * unit + 7)
    within = nested_tensor_from_tensor_list([image(*tall), image(*even)])
    yield f"two images, padded to {_span([tall, even])}", within
    yield (
        "one image in a larger batch",
        NestedTensor(within.tensors[:1].clone(), within.mask[:1].clone(), sizes=within.sizes[:1]),
    )
    for count, height, width in others:
        name = f"{count} of {height} x {width}, which torch.export took for impossible"
        yield name, nested_tensor_from_tensor_list([image(height, width) for _ in range(count)])


def largest_differences(
    reference: nn.Module,
    exported: nn.Module,
    *,
    unit: int,
    in_channels: int,
    others: Sequence[tuple[int, int, int]] = (),
) -> dict[str, float]:
    """Return for each batch of `check_batches` the largest difference of `exported` from `reference` in any output.

    A difference is that of two values divided by the larger of 1 and the output's largest value. NaN counts as infinite
    and so does another shape, mask or size. Detections of an image are compared as a set: proposals of equal score come
    in no particular order.
    """
    differences = {}
    for name, batch in check_batches(unit=unit, in_channels=in_channels, others=others):
        with torch.inference_mode():
            expected, got = reference(batch), exported(batch)
        if isinstance(got, Mapping) and got.keys() >= DETECTIONS:
            differences[name] = _difference_of_sets(*(_as_vectors(outputs, expected) for outputs in (expected, got)))
        else:
            levels = tensors_of(got)
            differences[name] = max(
                _difference(tensor, levels.get(key)) for key, tensor in tensors_of(expected).items()
            )
    return differences


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """Return every tensor of a model's outputs, masks as numbers, by name."""
    if isinstance(outputs, Tensor):
        return {"": outputs}
    if isinstance(outputs, NestedTensor):
        return {"tensors": outputs.tensors, "mask": outputs.mask.float()}
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return {f"{key}.{inner}": tensor for key, value in items for inner, tensor in tensors_of(value).items()}


def _difference(expected: Tensor, got: Tensor | None) -> float:
    if got is None or got.shape != expected.shape:
        return float("inf")
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    return difference if difference == difference else float("inf")  # noqa: PLR0124 - NaN differs from itself


def _as_vectors(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """Return the detections [B, Q, K + 4], logits divided by the larger of 1 and the reference's largest."""
    logits = outputs["pred_logits"] / reference["pred_logits"].abs().max().clamp(min=1)
    return torch.cat([logits, outputs["pred_boxes"]], dim=2)


def _difference_of_sets(expected: Tensor, got: Tensor) -> float:
    """Return how far any detection of either is from the nearest one of the other."""
    if got.shape != expected.shape or not got.isfinite().all():
        return float("inf")
    distances = torch.cdist(expected, got, p=float("inf"))
    return float(torch.maximum(distances.amin(dim=1), distances.amin(dim=2)).max())


def _smallest(unit: int) -> Size:
    return unit + 1, 2 * unit - 1


def _one(image: Tensor) -> NestedTensor:
    return NestedTensor(image[None], None)


def _span(sizes: list[Size]) -> str:
    return f"{max(h for h, _ in sizes)} x {max(w for _, w in sizes)}"
