"""Image files as RGB pictures, the same way for training, evaluation and prediction."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_backbone.coco.images import MAX_PIXELS, read_image
from detr_backbone.errors import AnnotationError, DataError


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def rotated_picture(path: Path) -> Path:
    """Stored 40 high and 100 wide, red on its left; upright, by its EXIF tag, it is 100 high with red on top."""
    picture = Image.new("RGB", (100, 40), "blue")
    picture.paste("red", (0, 0, 50, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("size", [None, (100, 40)])
def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path: Path, size: tuple[int, int] | None) -> None:
    picture = read_image(rotated_picture(tmp_path / "a.png"), size=size)

    assert picture.size == (40, 100)
    assert picture.getpixel((20, 10)) == (255, 0, 0)
    assert picture.getpixel((20, 90)) == (0, 0, 255)


def test_a_picture_stays_as_stored_where_the_annotations_mean_that(tmp_path: Path) -> None:
    picture = read_image(rotated_picture(tmp_path / "a.png"), size=(40, 100))

    assert picture.size == (100, 40)
    assert picture.getpixel((10, 20)) == (255, 0, 0)


def test_a_stated_size_that_fits_neither_way_is_an_error_with_both_sizes(tmp_path: Path) -> None:
    path = rotated_picture(tmp_path / "a.png")

    with pytest.raises(AnnotationError, match=r"a\.png image_id=7 .*got \(10, 40\) expected \(100, 40\)"):
        read_image(path, size=(10, 40), image_id=7)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")

    read = pixels(read_image(tmp_path / "a.png"))

    assert read[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]  # values / 257, rounded
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_common_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    white = Image.new("L", (5, 4), 255).convert("RGB").convert(mode)
    white.save(tmp_path / "a.tiff")

    picture = read_image(tmp_path / "a.tiff")

    assert picture.mode == "RGB"
    assert (pixels(picture) == 255).all()


def test_alpha_is_dropped(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 4), (10, 20, 30, 0)).save(tmp_path / "a.png")

    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    picture = Image.new("P", (5, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "a.png", transparency=b"\x00\x80")

    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("damage", ["half", "two bytes", "web page", "empty", "missing", "folder"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    whole = buffer.getvalue()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        cut = {"half": whole[: len(whole) // 2], "two bytes": whole[:-2], "web page": b"<html>", "empty": b""}
        path.write_bytes(cut[damage])

    with pytest.raises(DataError, match=r"where: file=.*a\.jpg image_id=3 \|"):
        read_image(path, image_id=3)


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_beyond_the_limit_is_refused_from_its_header(tmp_path: Path, side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")  # the pixels, none: decoding could only fail otherwise
    body = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + body)

    with pytest.raises(DataError, match=rf"too large \| where: file=.*a\.png .*at most {MAX_PIXELS}"):
        read_image(tmp_path / "a.png")


def test_grey_in_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 0.5, dtype=np.float32)).save(tmp_path / "a.tiff")

    with pytest.raises(DataError, match="expected 8 or 16 bits"):
        read_image(tmp_path / "a.tiff")
