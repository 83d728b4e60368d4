"""A small COCO dataset drawn from a seed: coloured shapes on clouds, for training and tests without other data.

    python -m detr_backbone.coco.shapes FOLDER --train 2800 --val 200 --seed 0

FOLDER then holds train/*.png, val/*.png and annotations/instances_{train,val}.json. Shapes never hide each other, so
that each polygon, its area and its box are exactly those of what can be seen; boxes may overlap.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw

from detr_backbone.coco.annotations import read_json
from detr_backbone.coco.typed_arrays import FloatArray
from detr_backbone.errors import AnnotationError, ConfigError, DataError

CLASSES = ("ellipse", "rectangle", "triangle", "star")
_OUTLINES = {
    # corners, radius of every other corner, rotated at random
    "ellipse": (48, 1.0, False),
    "rectangle": (4, 1.0, False),
    "triangle": (3, 1.0, True),
    "star": (10, 0.45, True),
    "hexagon": (6, 1.0, True),
    "cross": (8, 0.35, True),
}
_SIDES = (0.17, 0.55)  # of an object's larger side, as a fraction of the image
_EMPTY = 0.04  # fraction of images without objects
_SHARPNESS = 4  # drawn cells per pixel and side, averaged in the end
_CONTRAST = 110  # least distance between the colours of object and background, in RGB
_TRIES = 20  # positions that are tried for an object before it is left out


def draw_shapes(
    folder: Path | str,
    *,
    train: int = 2800,
    val: int = 200,
    seed: int = 0,
    image_size: int = 128,
    max_objects: int = 4,
    classes: tuple[str, ...] = CLASSES,
) -> None:
    """Draw the dataset, or leave it if the same one has been drawn before.

    The same arguments give the same bytes under the same versions of NumPy and Pillow. Every image has random numbers
    of its own, so that asking for more images leaves the first ones as they are.

    Args:
        folder: where to; it appears only when it is complete.
        train: training images.
        val: validation images.
        seed: 0 or more.
        image_size: height and width in pixels; objects grow with it, from about a sixth to half of it.
        max_objects: most objects in an image; one image in 25 has none.
        classes: the shapes; there are also hexagon and cross.

    Raises:
        ConfigError: a number is out of range, or a shape does not exist.
        DataError: the folder holds something else.
        AnnotationError: the folder holds annotations that cannot be read.
    """
    numbers = {"train": train, "val": val, "seed": seed, "image_size": image_size, "max_objects": max_objects}
    for (key, value), least in zip(numbers.items(), (1, 1, 0, 32, 1), strict=True):
        if value < least:
            raise ConfigError(f"`{key}` must be at least {least}, got {value}")
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= _OUTLINES.keys():
        raise ConfigError(f"`classes` must be different ones of {list(_OUTLINES)}, got {list(classes)}")
    arguments = {**numbers, **({} if classes == CLASSES else {"classes": list(classes)})}
    folder = Path(folder)
    if _is_drawn(folder, arguments):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        drawn = Path(unfinished) / "shapes"
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            _draw_split(drawn, split, count, (seed, number), arguments)
        drawn.rename(folder)


def main(arguments: list[str] | None = None) -> None:
    """Draw as a command line asks, by default that of this process."""
    parser = ArgumentParser(prog="python -m detr_backbone.coco.shapes", allow_abbrev=False)
    parser.add_function_arguments(draw_shapes, as_positional=True)
    given = parser.parse_args(arguments).as_dict()
    try:
        draw_shapes(**given)
        print(f"{given['train']} images to train on, {given['val']} to evaluate: {given['folder']}")
    except (AnnotationError, ConfigError, DataError) as error:
        parser.error(str(error))


def _is_drawn(folder: Path, arguments: dict[str, Any]) -> bool:
    """Return whether this very dataset is there; other files are an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / "annotations" / "instances_val.json"
    content = read_json(path) if path.is_file() else None
    got = content.get("info") if isinstance(content, dict) else "other files"
    if got != _info(arguments):
        raise DataError(
            f"folder holds something else | where: folder={folder} | got {got} expected {_info(arguments)} | "
            "fix: choose another folder, or remove this one"
        )
    return True


def _info(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the `info` of the annotation files: the arguments they were drawn with."""
    return {"description": "shapes drawn by detr_backbone.coco.shapes", "arguments": arguments}


def _draw_split(folder: Path, split: str, count: int, seed: tuple[int, int], arguments: dict[str, Any]) -> None:
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size, classes = arguments["image_size"], arguments.get("classes", CLASSES)
    for image_id in range(1, count + 1):
        rng = np.random.default_rng((*seed, image_id))
        image, objects = _draw_image(rng, size, arguments["max_objects"], classes)
        name = f"{image_id:06d}.png"
        image.save(folder / split / name, compress_level=3)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        annotations += [
            {"id": len(annotations) + number, "image_id": image_id, **_annotation(label, polygon)}
            for number, (label, polygon) in enumerate(objects, start=1)
        ]
    content = {
        "info": _info(arguments),
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _draw_image(
    rng: np.random.Generator, size: int, max_objects: int, classes: Sequence[str] = CLASSES
) -> tuple[Image.Image, list[tuple[int, FloatArray]]]:
    """Return an image and the label and polygon [P, 2] of each object in it, x before y, in pixels."""
    clouds = rng.uniform(0, 255, 3) + rng.uniform(-40, 40, (5, 5, 3))
    background = Image.fromarray(clouds.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    canvas = background.resize((size * _SHARPNESS,) * 2, Image.Resampling.NEAREST)
    taken = Image.new("1", canvas.size)
    objects: list[tuple[int, FloatArray]] = []
    wanted = 0 if rng.random() < _EMPTY else int(rng.integers(1, max_objects, endpoint=True))
    for _ in range(wanted * _TRIES):
        if len(objects) == wanted:
            break
        label = int(rng.integers(len(classes)))
        polygon = _put_in_image(rng, _outline(rng, classes[label]), size)
        cells = [(float(x), float(y)) for x, y in polygon * _SHARPNESS - 0.5]
        shape = Image.new("1", canvas.size)
        ImageDraw.Draw(shape).polygon(cells, fill=1)
        if not (np.asarray(shape) & np.asarray(taken)).any():
            taken.paste(1, mask=shape)
            colour = _colour(rng, np.asarray(background)[_middle(polygon)])
            canvas.paste(colour, mask=shape)
            objects.append((label, polygon))
    pixels = np.asarray(canvas.reduce(_SHARPNESS)) + rng.normal(0, 4, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def _outline(rng: np.random.Generator, name: str) -> FloatArray:
    """Return the corners [P, 2] of a shape of any size, rotated and stretched at random."""
    corners, inner, rotated = _OUTLINES[name]
    turn = rng.uniform(0, 2 * math.pi) if rotated else math.pi / 4
    angles = turn + np.arange(corners) * (2 * math.pi / corners)
    radius = np.where(np.arange(corners) % 2, inner, 1.0)
    stretch = rng.permutation([1.0, rng.uniform(0.5, 1.0)])
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]
    return outline * stretch


def _put_in_image(rng: np.random.Generator, outline: FloatArray, size: int) -> FloatArray:
    """Return the outline at a random size and position in the image, rounded to hundredths of a pixel."""
    outline = outline - outline.min(axis=0)
    outline = outline * (size * rng.uniform(*_SIDES) / outline.max())
    room = size - outline.max(axis=0)
    return np.round(outline + rng.uniform(0, 1, 2) * room, 2).clip(0, size)


def _middle(polygon: FloatArray) -> tuple[int, int]:
    """Return row and column of the pixel in the middle."""
    column, row = polygon.mean(axis=0)
    return int(row), int(column)


def _colour(rng: np.random.Generator, background: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    while True:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        if math.dist((red, green, blue), background.tolist()) >= _CONTRAST:
            return red, green, blue


def _annotation(label: int, polygon: FloatArray) -> dict[str, Any]:
    """Return the COCO entry of an object, with the area inside its polygon (shoelace formula)."""
    x, y = polygon.T
    left, top, right, bottom = x.min(), y.min(), x.max(), y.max()
    return {
        "category_id": label + 1,
        "bbox": [round(float(value), 2) for value in (left, top, right - left, bottom - top)],
        "area": round(abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2, 4),
        "segmentation": [polygon.flatten().tolist()],
        "iscrowd": 0,
    }


if __name__ == "__main__":
    main()
