"""Image files read as RGB, in the same way for training, evaluation and prediction."""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from detr_backbone.coco.findings import Finding
from detr_backbone.nested_tensor import Size

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded: a quarter of a GiB as RGB. Pillow warns above the same number."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")
"""Formats that are always decoded; among Pillow's other formats is one that runs an external program."""
MIN_SIDE = 16
"""An image with a shorter side, in pixels, is reported: half a cell of the coarsest level of a backbone."""
MAX_ASPECT = 10
"""An image that is longer than this many times its shorter side is reported."""


def read_image(path: Path | str, *, size: Size | None = None, image_id: int | None = None) -> Image.Image:
    """Return an image as 8-bit RGB, upright as its EXIF tag says.

    16-bit grey is scaled by 1/257, so that white stays white; an alpha channel is dropped; of several frames the first
    one is read.

    Args:
        path: the file.
        size: the (h, w) that annotations state. Annotations may have been drawn on the image as it is stored, before
            the EXIF rotation: if only that orientation has this size, the image stays as it is stored.
        image_id: of the image, for errors.

    Raises:
        DataError: the file is missing, damaged, cut off, no image of `FORMATS`, or of more than `MAX_PIXELS` pixels.
        AnnotationError: the image has `size` in neither orientation.
    """
    image, findings = examine_image(path, size=size, image_id=image_id)
    if image is None:
        raise findings[-1].error
    return image


def examine_image(
    path: Path | str, *, size: Size | None = None, image_id: int | None = None
) -> tuple[Image.Image | None, list[Finding]]:
    """Return the image that `read_image` gives, and all findings about its file.

    If there is no image, the last finding is the reason.
    """
    where = f"file={path}" if image_id is None else f"file={path} image_id={image_id}"
    findings: list[Finding] = []
    limit = f"at most {MAX_PIXELS}"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=readable_formats()) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                got = f"{stored.width} x {stored.height} pixels"
                return None, [Finding("picture_too_large", where, got, limit)]
            stored.load()
            image, rotation = _orient(stored, size, where)
            findings += rotation
            if image is None:
                return None, findings
            findings += _examine_mode_and_shape(stored, where)
            return to_rgb(image), findings
    except Image.DecompressionBombError as error:
        return None, [Finding("picture_too_large", where, str(error), limit)]
    except UnidentifiedImageError:
        return None, [*findings, Finding("picture_unreadable", where, _unidentified(Path(path)))]
    except Exception as error:  # on damaged bytes, decoders raise almost anything
        return None, [*findings, Finding("picture_unreadable", where, f"{type(error).__name__}: {error}")]


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Return the formats that are decoded here: `FORMATS`, AVIF and HEIF where there is a decoder.

    Pillow reads AVIF from version 11.3 on; `pip install pillow-heif` adds HEIF, the format of iPhones.
    """
    more = ["AVIF"] if features.check("avif") else []
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        more.append("HEIF")
    return (*FORMATS, *more)


def _unidentified(path: Path) -> str:
    """Return why no decoder takes a file, and what would."""
    ending = path.suffix.lower()
    if ending in (".heic", ".heif") and "HEIF" not in readable_formats():
        return "HEIF, which needs pip install pillow-heif"
    if ending == ".avif" and "AVIF" not in readable_formats():
        return "AVIF, which needs Pillow 11.3 or later"
    return f"no picture in one of the formats {', '.join(readable_formats())}"


def _orient(stored: Image.Image, size: Size | None, where: str) -> tuple[Image.Image | None, list[Finding]]:
    """Return the image in the orientation that has the stated size, preferably upright."""
    upright = ImageOps.exif_transpose(stored)
    rotation = stored.getexif().get(ExifTags.Base.Orientation, 1)
    for image, reading in ((upright, "turned upright"), (stored, "left as it is stored, as the stated size says")):
        if size is None or (image.height, image.width) == size:
            rotated = [Finding("picture_rotated", where, f"orientation {rotation}, {reading}")]
            return image, rotated if rotation in range(2, 9) else []
    expected = f"{(upright.height, upright.width)}"
    return None, [Finding("picture_size", f"{where} key=height, width", str(size), expected)]


def _examine_mode_and_shape(stored: Image.Image, where: str) -> list[Finding]:
    """Return the findings about the mode and the shape of a file."""
    findings = []
    frames = getattr(stored, "n_frames", 1)
    if frames > 1:
        findings.append(Finding("picture_animated", where, f"{frames} frames"))
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, 16-bit grey scaled by 1/257.

    Raises:
        ValueError: grey values need more than 16 bits, or are floating-point numbers.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()} .. {values.max()}, expected 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey values in floating point, expected 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")
