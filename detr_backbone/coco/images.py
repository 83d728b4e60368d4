"""Image files as RGB pictures, the same way for training, evaluation and prediction."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detr_backbone.errors import AnnotationError, DataError
from detr_backbone.nested_tensor import Size

MAX_PIXELS = 89_478_485
"""Pixels of the largest picture that is decoded: a quarter of a GiB as RGB. Pillow warns above the same number."""


def read_image(path: Path | str, *, size: Size | None = None, image_id: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF tag says.

    16-bit grey is scaled by 1/257, so that white stays white; an alpha channel is dropped; of several frames the first
    one is read.

    Args:
        path: the file.
        size: the (h, w) that annotations state. Annotations may have been drawn on the picture as it is stored, before
            the EXIF rotation: where only that orientation has this size, the picture stays as it is stored.
        image_id: what errors call the picture, beside its path.

    Raises:
        DataError: the file is missing, damaged, cut off, no image, or of more than `MAX_PIXELS` pixels.
        AnnotationError: the picture has `size` in neither orientation.
    """
    where = f"file={path}" if image_id is None else f"file={path} image_id={image_id}"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as stored:
            if stored.width * stored.height <= MAX_PIXELS:
                return _to_rgb(_oriented(stored, size, where))
            got = f"{stored.width} x {stored.height} pixels"
    except (AnnotationError, DataError):
        raise
    except Image.DecompressionBombError as error:
        got = str(error)
    except Exception as error:  # on damaged bytes, decoders raise almost anything
        raise DataError(f"picture cannot be read | where: {where} | got {type(error).__name__}: {error}") from error
    raise DataError(
        f"picture is too large | where: {where} | got {got} expected at most {MAX_PIXELS} | fix: downscale it"
    )


def _oriented(stored: Image.Image, size: Size | None, where: str) -> Image.Image:
    stored.load()
    upright = ImageOps.exif_transpose(stored)
    for picture in (upright, stored):
        if size is None or (picture.height, picture.width) == size:
            return picture
    raise AnnotationError(
        f"stated size is not that of the picture | where: {where} key=height, width | "
        f"got {size} expected {(upright.height, upright.width)}"
    )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()} .. {values.max()}, expected 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("grey values in floating point, expected 8 or 16 bits")
    return picture.convert("RGB")
