"""Image files as RGB pictures, the same way for training, evaluation and prediction."""

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from detr_backbone.coco.findings import Finding
from detr_backbone.nested_tensor import Size

MAX_PIXELS = 89_478_485
"""Pixels of the largest picture that is decoded: a quarter of a GiB as RGB. Pillow warns above the same number."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")
"""What is decoded; among Pillow's other formats is one that runs an external program."""
MIN_SIDE = 16
"""A picture with a shorter side, in pixels, is reported: half a cell of the coarsest level of a backbone."""
MAX_ASPECT = 10
"""A picture that is longer than this many times its shorter side is reported."""


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
        DataError: the file is missing, damaged, cut off, no image of `FORMATS`, or of more than `MAX_PIXELS` pixels.
        AnnotationError: the picture has `size` in neither orientation.
    """
    picture, findings = examine_image(path, size=size, image_id=image_id)
    if picture is None:
        raise findings[-1].error
    return picture


def examine_image(
    path: Path | str, *, size: Size | None = None, image_id: int | None = None
) -> tuple[Image.Image | None, list[Finding]]:
    """The picture that `read_image` gives, and everything worth knowing about its file.

    Where it gives none, the last finding is the reason.
    """
    where = f"file={path}" if image_id is None else f"file={path} image_id={image_id}"
    findings: list[Finding] = []
    limit = f"at most {MAX_PIXELS}"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                got = f"{stored.width} x {stored.height} pixels"
                return None, [Finding("picture_too_large", where, got, limit)]
            stored.load()
            picture, rotation = _oriented(stored, size, where)
            findings += rotation
            if picture is None:
                return None, findings
            findings += _described(stored, where)
            return _to_rgb(picture), findings
    except Image.DecompressionBombError as error:
        return None, [Finding("picture_too_large", where, str(error), limit)]
    except Exception as error:  # on damaged bytes, decoders raise almost anything
        return None, [*findings, Finding("picture_unreadable", where, f"{type(error).__name__}: {error}")]


def _oriented(stored: Image.Image, size: Size | None, where: str) -> tuple[Image.Image | None, list[Finding]]:
    """The picture in the orientation that has the stated size, preferably upright."""
    upright = ImageOps.exif_transpose(stored)
    rotation = stored.getexif().get(ExifTags.Base.Orientation, 1)
    for picture, reading in ((upright, "turned upright"), (stored, "left as it is stored, as the stated size says")):
        if size is None or (picture.height, picture.width) == size:
            found = [Finding("picture_rotated", where, f"orientation {rotation}, {reading}")]
            return picture, found if rotation in range(2, 9) else []
    expected = f"{(upright.height, upright.width)}"
    return None, [Finding("picture_size", f"{where} key=height, width", str(size), expected)]


def _described(stored: Image.Image, where: str) -> list[Finding]:
    """What about a file's mode and shape deserves to be told."""
    findings = []
    if stored.mode.startswith("I"):
        findings.append(Finding("picture_16_bit", where, stored.mode))
    elif stored.has_transparency_data:
        findings.append(Finding("picture_alpha", where, stored.mode))
    elif stored.mode != "RGB":
        findings.append(Finding("picture_mode", where, stored.mode))
    if min(stored.size) < MIN_SIDE or max(stored.size) > MAX_ASPECT * min(stored.size):
        expected = f"{MIN_SIDE} pixels or more, and no side longer than {MAX_ASPECT} times the other"
        findings.append(Finding("picture_shape", where, f"{stored.width} x {stored.height}", expected))
    return findings


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()} .. {values.max()}, expected 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("grey values in floating point, expected 8 or 16 bits")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
