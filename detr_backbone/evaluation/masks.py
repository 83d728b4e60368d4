"""Predicted masks in COCO's compressed form, checked before any C code reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from detr_backbone.coco.segmentations import EncodedMask, decoded_counts
from detr_backbone.coco.typed_arrays import FloatArray
from detr_backbone.errors import EvaluationError


def encoded_masks(
    masks: Tensor | Sequence[Any], *, count: int, size: tuple[int, int], where: str
) -> tuple[list[EncodedMask], FloatArray]:
    """Return the masks, compressed, and the boxes around them, float64 [M, 4], xywh in pixels.

    Args:
        masks: bool [M, h, w], or M compressed masks with `counts` as bytes or text.
        count: M.
        size: (h, w) of the image.
        where: what errors call them.

    Raises:
        EvaluationError: there are fewer or more, one is of another size, or its runs do not fill it.
    """
    expected = [count, *size]
    if isinstance(masks, Tensor):
        if list(masks.shape) != expected or masks.dtype != torch.bool:
            raise EvaluationError(
                f"masks do not fit | where: {where} | got {list(masks.shape)} of {masks.dtype} expected {expected} of "
                "torch.bool, in pixels of the original image"
            )
        encoded = [rle.encode(np.asfortranarray(mask.numpy().view(np.uint8))) for mask in masks.detach().cpu()]
    else:
        if len(masks) != count:
            raise EvaluationError(f"lengths do not fit | where: {where} | got {len(masks)} expected {count}")
        encoded = [_check(mask, size, f"{where} index={index}") for index, mask in enumerate(masks)]
    boxes = np.array([rle.toBbox(mask) for mask in encoded], dtype=np.float64).reshape(-1, 4)
    return encoded, boxes


def _check(mask: Any, size: tuple[int, int], where: str) -> EncodedMask:
    if not isinstance(mask, Mapping) or list(mask.get("size", ())) != list(size):
        got = mask.get("size") if isinstance(mask, Mapping) else type(mask).__name__
        raise EvaluationError(f"mask is of another size | where: {where} key=size | got {got} expected {list(size)}")
    counts = mask.get("counts")
    text = counts.decode("latin-1") if isinstance(counts, bytes) else str(counts)
    runs = decoded_counts(text) if isinstance(counts, (bytes, str)) else None
    if runs is None or sum(runs) != size[0] * size[1]:
        got = "no compressed runs" if runs is None else f"runs of {sum(runs)} pixels together"
        raise EvaluationError(
            f"mask is not filled | where: {where} key=counts | got {got} expected {size[0] * size[1]} pixels"
        )
    return {"size": list(size), "counts": text.encode()}
