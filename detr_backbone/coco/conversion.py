"""Datasets in YOLO, Pascal VOC and CVAT layout converted to one COCO file.

hotcoco reads the three formats. Around it, polygons of YOLO become boxes, images without a label file are listed
without boxes, sizes are those of the upright image; rotated boxes and tracks of CVAT are refused, for it ignores the
rotation.

Source: https://docs.ultralytics.com/datasets/detect (YOLO), http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOC, whose
pixels count from 1), https://docs.cvat.ai/docs/manual/advanced/xml_format (CVAT for images 1.1).
"""

import json
import re
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias
from xml.etree import ElementTree

import yaml
from PIL import Image, ImageOps

from detr_backbone.coco.image_files import ENDINGS
from detr_backbone.coco.images import readable_formats
from detr_backbone.errors import AnnotationError, ConfigError, DataError

DatasetLayout: TypeAlias = Literal["yolo", "voc", "cvat"]
_OTHER_NAMES = {"val": "valid"}
"""Of splits, as Roboflow writes them."""


class Converted(NamedTuple):
    """The content of a COCO file, the folder of its images, and what the conversion changed, in words."""

    content: dict[str, Any]
    images: Path
    remarks: Sequence[str]


def convert_dataset(
    folder: Path | str,
    output: Path | str,
    layout: DatasetLayout,
    *,
    split: str | None = None,
    images: Path | str | None = None,
) -> dict[str, Any]:
    """Write a dataset as a COCO file with a manifest beside it, OUTPUT.manifest.json, and return the manifest.

    The image files stay where they are; `file_name` is relative to the manifest's `images`.

    Args:
        folder: of the dataset: with data.yaml (YOLO), with Annotations or XML files (VOC), or with annotations.xml
            (CVAT).
        output: the JSON file to write.
        layout: of the dataset.
        split: of a YOLO dataset, a key of data.yaml, train if left out; of a VOC dataset, a list in ImageSets/Main or a
            folder, all images if left out. The categories are those of all splits.
        images: the folder of the image files, where it is not that of the layout.

    Raises:
        ConfigError: hotcoco is missing, or `split` is given for CVAT.
        DataError: files of the layout are missing, or `output` exists.
        AnnotationError: a file cannot be read, or says what COCO cannot.
    """
    folder, output = Path(folder), Path(output)
    if output.exists():
        raise DataError(f"output exists | where: file={output} | fix: choose another, or remove it")
    try:
        import hotcoco
    except ImportError as error:
        raise ConfigError('`hotcoco` is not installed | fix: pip install "detr_backbone[convert]"') from error
    if layout == "cvat" and split is not None:
        raise ConfigError(f"`split` is that of a YOLO or VOC dataset; an export of CVAT has none, got {split!r}")
    if layout == "yolo" and split is None:
        split = "train"
    readers = {"yolo": _read_yolo, "voc": _read_voc, "cvat": _read_cvat}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            converted = readers[layout](hotcoco.COCO, folder, split, None if images is None else Path(images))
    except (ValueError, OSError, ElementTree.ParseError) as error:
        if isinstance(error, (AnnotationError, DataError)):
            raise
        raise AnnotationError(f"dataset cannot be read as {layout} | where: folder={folder} | got {error}") from error
    manifest = {
        "source": {"folder": str(folder), "layout": layout, "split": split},
        "converter": f"hotcoco {hotcoco.__version__}",
        "images": str(converted.images),
        "counts": {key: len(converted.content[key]) for key in ("images", "annotations", "categories")},
        "remarks": [*converted.remarks, *(str(one.message) for one in caught if one.category is UserWarning)],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(converted.content), encoding="utf-8")
    output.with_suffix(".manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def _read_yolo(coco_class: Any, folder: Path, split: str | None, images: Path | None) -> Converted:
    assert split is not None, "a YOLO dataset has a split by default"
    config_file = _first_existing(folder / "data.yaml", *sorted(folder.glob("*.yaml")), what="data.yaml")
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise AnnotationError(f"file is no YAML | where: file={config_file} | got {error}") from error
    if not isinstance(config, dict) or not config.get("names"):
        raise AnnotationError(f"dataset has no class names | where: file={config_file} key=names | fix: list them")
    names = config["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise AnnotationError(
                f"class names must count from 0 without gaps | where: file={config_file} key=names | got {[*names]}"
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or any(isinstance(name, list | dict) for name in names):
        raise AnnotationError(f"class names must be a list of texts | where: file={config_file} key=names")
    if config.get("nc", len(names)) != len(names):
        raise AnnotationError(
            f"classes must be as many as their names | where: file={config_file} key=nc | got {config['nc']} expected "
            f"{len(names)}"
        )
    if images is None:
        stated = config.get(split) or config.get(_OTHER_NAMES.get(split, split))
        if not isinstance(stated, str):
            found = f"keys {[*map(str, config)]}" if not stated else f"a {type(stated).__name__} expected a folder"
            raise DataError(
                f"dataset has no such split | where: file={config_file} key={split} | got {found} | fix: choose one "
                "that names a folder of images"
            )
        inside = re.sub(r"^(\.\.?/)+", "", stated)  # Roboflow writes ../train/images for train/images
        root = folder / str(config.get("path") or "")
        images = _first_existing(root / stated, folder / stated, folder / inside, what=f"images of {split}")
    if not images.is_dir():
        raise DataError(
            f"images must be in a folder | where: file={images} | got {'a file' if images.exists() else 'none'}"
        )
    parts = images.resolve().parts
    place = max((i for i, part in enumerate(parts) if part == "images"), default=None)
    labels = images.parent / "labels" if place is None else Path(*parts[:place], "labels", *parts[place + 1 :])
    if not labels.is_dir():
        raise DataError(
            f"dataset has no labels | where: folder={labels} | got none for the images in {images} | fix: put "
            "the label files there, or give the folder of the images"
        )
    visible = sorted(path for path in images.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in visible if path.suffix.lower() in ENDINGS]
    remarks = {
        "images without a label file, listed without boxes": 0,
        "polygons, taken as the boxes around them": 0,
        "files that are no images by their endings, left out": sum(
            path.suffix.lower() not in ENDINGS | {".txt", ".cache"} for path in visible
        ),
    }
    with tempfile.TemporaryDirectory() as temporary:
        numbered, texts = Path(temporary, "images"), Path(temporary, "labels")
        numbered.mkdir()
        texts.mkdir()
        # hotcoco reads few ways of writing YAML; the names are put in afterwards.
        (texts / "data.yaml").write_text(f"nc: {len(names)}\nnames: {json.dumps([*map(str, range(len(names)))])}\n")
        for number, path in enumerate(files):
            label = (labels / path.relative_to(images)).with_suffix(".txt")
            remarks["images without a label file, listed without boxes"] += not label.exists()
            lines = label.read_text(encoding="utf-8-sig").splitlines() if label.exists() else []
            boxes = list(_boxes(lines, label, classes=len(names)))
            remarks["polygons, taken as the boxes around them"] += sum(is_polygon for _, is_polygon in boxes)
            (texts / f"{number:09d}.txt").write_text("".join(f"{line}\n" for line, _ in boxes), encoding="utf-8")
            _save_blank(path, numbered / f"{number:09d}.png")
        content = coco_class.from_yolo(str(texts), images_dir=str(numbered)).dataset
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = str(name)
    for record in content["images"]:
        record["file_name"] = files[int(Path(record["file_name"]).stem)].relative_to(images).as_posix()
    return Converted(content, images, [f"{count} {what}" for what, count in remarks.items() if count])


def _boxes(lines: Sequence[str], file: Path, *, classes: int) -> Iterator[tuple[str, bool]]:
    """Yield each line of a label file as class and box, and whether it was a polygon."""
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields and not (fields[0].isdecimal() and int(fields[0]) < classes):
            raise AnnotationError(
                f"class has no name | where: file={file} line={number} | got {fields[0]!r} expected a whole number "
                f"below {classes} | fix: name it in the YAML file, or correct the label"
            )
        try:
            numbers = [float(field) for field in fields[1:]]
        except ValueError as error:
            raise AnnotationError(f"label holds no number | where: file={file} line={number} | got {error}") from error
        if len(fields) > 5 and len(fields) % 2:
            xs, ys = numbers[0::2], numbers[1::2]
            box = ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys))
            yield " ".join([fields[0], *map(repr, box)]), True
        elif len(fields) == 5:
            yield line, False
        elif fields:
            raise AnnotationError(
                f"label is neither a box nor a polygon | where: file={file} line={number} | "
                f"got {len(fields)} fields expected class x y w h, or class x1 y1 x2 y2 x3 y3 ..."
            )


def _save_blank(path: Path, copy: Path) -> None:
    """Write a blank image with the size of an upright one, for the converter reads nothing else of it."""
    try:
        with Image.open(path, formats=readable_formats()) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) in range(5, 9):
                size = ImageOps.exif_transpose(image).size
    except OSError as error:
        raise DataError(
            f"image file cannot be read | where: file={path} | got {error} | fix: replace or remove it"
        ) from error
    Image.new("1", size).save(copy, compress_level=1)


def _read_voc(coco_class: Any, folder: Path, split: str | None, images: Path | None) -> Converted:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    is_listed = split is not None and listing.exists()
    if split is None or is_listed:
        content = coco_class.from_voc(str(folder)).dataset
    else:
        content, folder = _split_folder_of_voc(coco_class, folder, split)
    if not content["images"]:
        raise DataError(
            f"dataset has no annotations | where: folder={folder} | got no XML files in it or in Annotations | "
            "fix: give the folder that holds them, or choose one of its splits"
        )
    if is_listed:
        stems = _listed(listing, {Path(one["file_name"]).stem for one in content["images"]})
        content["images"] = [one for one in content["images"] if Path(one["file_name"]).stem in stems]
        image_ids = {one["id"] for one in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in image_ids]
    crowds = sum(one["iscrowd"] for one in content["annotations"])
    remarks = [f"{crowds} objects marked difficult, taken as crowds"] if crowds else []
    return Converted(content, images or _first_existing(folder / "JPEGImages", folder, what="images"), remarks)


def _listed(listing: Path, stems: Collection[str]) -> set[str]:
    """Return the images of a list of VOC; in lists of one class, 1, 0 or -1 stands behind each."""
    found = set()
    for number, line in enumerate(listing.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name = line.strip()
        readings = (name, re.sub(r"\s+-?[01]$", "", name), Path(name).stem)
        stem = next((reading for reading in readings if reading in stems), None)
        if stem is not None:
            found.add(stem)
        elif name:
            raise DataError(
                f"a listed image has no annotations | where: file={listing} line={number} | got {name!r} expected the "
                "name of an XML file, without its ending | fix: add the file, or remove the line"
            )
    return found


def _split_folder_of_voc(coco_class: Any, folder: Path, split: str) -> tuple[dict[str, Any], Path]:
    """Return a split that has a folder of its own, with the categories of all splits, and that folder."""
    what = f"list ImageSets/Main/{split}.txt, nor a folder, of {split}"
    chosen = _first_existing(folder / split, folder / _OTHER_NAMES.get(split, split), what=what)
    contents = {path: coco_class.from_voc(str(path)).dataset for path in sorted(folder.iterdir()) if path.is_dir()}
    names = sorted({one["name"] for content in contents.values() for one in content["categories"]})
    return _with_categories(contents[chosen], names), chosen


def _read_cvat(coco_class: Any, folder: Path, _split: str | None, images: Path | None) -> Converted:
    file = folder if folder.is_file() else _first_existing(folder / "annotations.xml", what="annotations.xml")
    text = file.read_text(encoding="utf-8")
    for pattern, what in ((r'rotation="(?!0+(\.0*)?")', "rotated boxes"), (r"<track[ >]", "tracks")):
        if match := re.search(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            raise AnnotationError(
                f"COCO has no {what} | where: file={file} line={line} | fix: export polygons, as CVAT for images 1.1"
            )
    content = coco_class.from_cvat(str(file)).dataset
    # hotcoco reads the labels of tasks alone, and takes those that are used of a project or a job
    declared = [one.findtext("name") or "" for one in ElementTree.fromstring(text).iterfind("meta//labels/label")]
    used = [one["name"] for one in content["categories"]]
    content = _with_categories(content, [*declared, *(name for name in used if name not in declared)])
    return Converted(content, images or _first_existing(file.parent / "images", file.parent, what="images"), [])


def _with_categories(content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return a dataset whose categories have these names, under ids from 1 in their order."""
    ids = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
    names_of = {one["id"]: one["name"] for one in content["categories"]}
    return {
        **content,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [one | {"category_id": ids[names_of[one["category_id"]]]} for one in content["annotations"]],
    }


def _first_existing(*paths: Path, what: str) -> Path:
    for path in paths:
        if path.exists():
            return path
    raise DataError(
        f"dataset has no {what} | where: file={paths[0]} | got none | fix: give the folder that holds it, or choose "
        "another layout"
    )
