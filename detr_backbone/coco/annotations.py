"""A COCO annotation file, checked from end to end and packed into arrays.

Every later part may rely on what is checked here: ids are integers and unique, every annotation belongs to an image and
a category of the same file, every box is four finite numbers. Arrays instead of dicts, because the pages of an array
stay shared between the workers of a DataLoader, while counting the references of a dict's values copies them.

Source: https://cocodataset.org/#format-data
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from detr_backbone.errors import AnnotationError

Record: TypeAlias = Mapping[str, Any]
_Checked: TypeAlias = Iterator[tuple[str, Record]]  # where a record stands in the file, and the record

_LISTS = ("images", "annotations", "categories")
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?\bInfinity\b|\bNaN\b)')


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoAnnotations:
    """What a detector needs from a COCO file: I images in the order of their ids, K classes, N annotations by image.

    Attributes:
        source: the file, as errors name it.
        image_ids: int64 [I], ascending.
        file_names: str [I].
        sizes: int64 [I, 2], the (h, w) that the file states.
        category_ids: the category id of each label 0 .. K - 1, ascending.
        category_names: the name of each label; a name that several categories share gets its id added.
        annotation_ids: int64 [N].
        image_index: int64 [N], ascending: the place of the annotation's image in `image_ids`.
        labels: int64 [N], 0 .. K - 1.
        boxes: float64 [N, 4] as in the file, xywh in pixels, neither side negative.
        areas: float64 [N], the file's `area`, or that of the box where the file gives none.
        is_crowd: bool [N].
        part: which images of the file these are, in words; empty for all of them.
    """

    source: str
    image_ids: npt.NDArray[np.int64]
    file_names: npt.NDArray[np.str_]
    sizes: npt.NDArray[np.int64]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    annotation_ids: npt.NDArray[np.int64]
    image_index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    is_crowd: npt.NDArray[np.bool_]
    part: str = ""


def load_annotations(path: Path | str) -> CocoAnnotations:
    """The checked content of a COCO annotation file.

    Raises:
        AnnotationError: the file cannot be read, is no JSON, or contradicts itself or the COCO format.
    """
    return parse_annotations(read_json(path), source=str(path))


def read_json(path: Path | str) -> Any:
    """What a UTF-8 JSON file holds, with or without a byte order mark; NaN and Infinity are no JSON.

    Raises:
        AnnotationError: naming the file, and the line and column where it stops being JSON.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"file cannot be read as UTF-8 text | where: file={path} | got {error}") from error

    def refuse(constant: str) -> NoReturn:
        start = next(match.start(1) for match in _STRING_OR_CONSTANT.finditer(text) if match[1])
        raise json.JSONDecodeError(f"{constant} is not a number", text, start)

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        where = f"file={path} line={error.lineno} column={error.colno}"
        raise AnnotationError(f"file is not JSON | where: {where} | got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"file is not usable JSON | where: file={path} | got {error}") from error


def parse_annotations(content: Any, *, source: str) -> CocoAnnotations:
    """The same from a parsed file; `source` is what errors call it.

    Raises:
        AnnotationError: the content contradicts itself or the COCO format.
    """
    _check_lists(content, source)
    names, sizes = parse_images(content["images"], source)
    categories = parse_categories(content["categories"], source)
    image_ids, category_ids = sorted(names), sorted(categories)
    _check_references(content["annotations"], "image_id", names, source)
    _check_references(content["annotations"], "category_id", categories, source)
    places = {image_id: place for place, image_id in enumerate(image_ids)}
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    rows = sorted(
        (
            (places[record["image_id"]], record["id"], labels[record["category_id"]], *_box_area_crowd(record, where))
            for where, record in _records(content["annotations"], "annotations", "ann_id", source)
        ),
        key=lambda row: row[0],
    )
    place, annotation_id, label, box, area, crowd = zip(*rows, strict=True) if rows else [()] * 6
    shared = Counter(categories.values())
    return CocoAnnotations(
        source=source,
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=np.array([names[image_id] for image_id in image_ids], dtype=np.str_),
        sizes=np.array([sizes[image_id] for image_id in image_ids], dtype=np.int64).reshape(-1, 2),
        category_ids=tuple(category_ids),
        category_names=tuple(
            categories[i] if shared[categories[i]] == 1 else f"{categories[i]} (id {i})" for i in category_ids
        ),
        annotation_ids=np.array(annotation_id, dtype=np.int64),
        image_index=np.array(place, dtype=np.int64),
        labels=np.array(label, dtype=np.int64),
        boxes=np.array(box, dtype=np.float64).reshape(-1, 4),
        areas=np.array(area, dtype=np.float64),
        is_crowd=np.array(crowd, dtype=np.bool_),
    )


def parse_images(images: Sequence[Any], source: str) -> tuple[dict[int, str], dict[int, tuple[int, int]]]:
    """File name and stated (h, w) of each image id."""
    names: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for where, record in _records(images, "images", "image_id", source):
        name = record.get("file_name")
        if not _is_file_name(name):
            raise AnnotationError(f"image has no file name | where: {where} key=file_name | got {name!r}")
        for key in ("height", "width"):
            if not _is_integer(side := record.get(key)) or side < 1:
                raise AnnotationError(
                    f"image has no size | where: {where} key={key} | got {side!r} expected a positive integer"
                )
        if record["id"] in names:
            raise AnnotationError(f"image id is used twice | where: {where} | got {names[record['id']]!r} and {name!r}")
        names[record["id"]], sizes[record["id"]] = name, (record["height"], record["width"])
    return names, sizes


def parse_categories(categories: Sequence[Any], source: str) -> dict[int, str]:
    """Name of each category id."""
    names: dict[int, str] = {}
    for where, record in _records(categories, "categories", "category_id", source):
        name = record.get("name")
        if not isinstance(name, str) or not name:
            raise AnnotationError(f"category has no name | where: {where} key=name | got {name!r}")
        if record["id"] in names:
            raise AnnotationError(
                f"category id is used twice | where: {where} | got {names[record['id']]!r} and {name!r}"
            )
        names[record["id"]] = name
    if not names:
        raise AnnotationError(f"file has no categories | where: file={source} key=categories | got []")
    return names


def _check_lists(content: Any, source: str) -> None:
    if not isinstance(content, Mapping):
        got = type(content).__name__
        raise AnnotationError(f"file is not a COCO dataset | where: file={source} | got {got} expected an object")
    if missing := [key for key in _LISTS if key not in content]:
        raise AnnotationError(
            f"file lacks top-level keys | where: file={source} key={', '.join(missing)} | got {sorted(content)}"
        )
    for key in _LISTS:
        if not isinstance(content[key], list):
            got = type(content[key]).__name__
            raise AnnotationError(f"`{key}` is not a list | where: file={source} key={key} | got {got}")


def _records(records: Sequence[Any], key: str, id_name: str, source: str) -> _Checked:
    for index, record in enumerate(records):
        if not isinstance(record, Mapping) or not _is_integer(record.get("id")):
            got = repr(record.get("id")) if isinstance(record, Mapping) else type(record).__name__
            where = f"file={source} key={key}.id index={index}"
            raise AnnotationError(f"entry has no integer id | where: {where} | got {got}")
        yield f"file={source} {id_name}={record['id']}", record


def _check_references(annotations: Sequence[Any], key: str, known: Mapping[int, str], source: str) -> None:
    """Refuse annotations of images or categories that the file does not list, telling how many there are."""
    seen: set[int] = set()
    unknown = []
    for where, record in _records(annotations, "annotations", "ann_id", source):
        value = record.get(key)
        if not _is_integer(value):
            raise AnnotationError(
                f"annotation has no {key} | where: {where} key={key} | got {value!r} expected an integer"
            )
        if record["id"] in seen:
            raise AnnotationError(f"annotation id is used twice | where: {where} | fix: renumber the annotations")
        seen.add(record["id"])
        if value not in known:
            unknown.append((where, value))
    if unknown:
        where, value = unknown[0]
        raise AnnotationError(
            f"annotation of an unknown {key} | where: {where} key={key} | got {value} expected one of {len(known)} ids "
            f"that the file lists; so have {len(unknown)} of {len(annotations)} annotations"
        )


def _box_area_crowd(record: Record, where: str) -> tuple[list[float], float, bool]:
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise AnnotationError(
            f"box is malformed | where: {where} key=bbox | got {box!r} expected four numbers x, y, w, h"
        )
    if box[2] < 0 or box[3] < 0:
        raise AnnotationError(f"box has a negative side | where: {where} key=bbox | got {box} expected x, y, w, h")
    area = record.get("area", box[2] * box[3])
    if not _is_finite(area) or area < 0:
        raise AnnotationError(f"area is not a size | where: {where} key=area | got {area!r} expected a number >= 0")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise AnnotationError(f"iscrowd is not a flag | where: {where} key=iscrowd | got {crowd!r} expected 0 or 1")
    return box, area, bool(crowd)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_file_name(value: Any) -> TypeGuard[str]:
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
