"""What must hold in the content of a COCO file, checked column by column so that a million annotations take seconds.

Every part of the file becomes a table with a row for each of its entries, in the order of the file, and a list of
findings; where a value breaks a rule, its place in the table holds 0, "" or -1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from detr_backbone.coco.columns import Bools, Floats, four_numbers, integers, is_file_name, numbers, places_of, repeated
from detr_backbone.coco.findings import Finding, Findings, Rows, found
from detr_backbone.coco.segmentations import Packer, Segmentations, examine_segmentations

Record: TypeAlias = Mapping[str, Any]

_LISTS = ("images", "annotations", "categories")
MOVED_TOLERANCE = 0.01
"""Pixels by which a box may reach outside its image without being counted: what rounding leaves."""
MOVED_PIXELS = 2
MOVED_SHARE = 0.01
"""More than this share of boxes that clipping moves by more than MOVED_PIXELS tells of wrong sizes or formats."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageTable:
    """The images: `ids` [I], `names`, and `sizes` [I, 2] as (h, w)."""

    ids: Rows
    names: Sequence[str]
    sizes: Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Clipped:
    """Boxes [N, 4] as xyxy within their images, and what had to be done for that.

    Attributes:
        boxes: float64 [N, 4].
        outside: the box shares nothing with its image.
        without_area: its width or height is 0.
        moved: float64 [N], by how many pixels a side was moved, 0 for boxes outside.
    """

    boxes: Floats
    outside: Bools
    without_area: Bools
    moved: Floats

    @property
    def is_target(self) -> Bools:
        """Whether anything is left of a box [N] to be found."""
        return ~self.outside & ~self.without_area


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotationTable:
    """The annotations: `images` and `categories` are rows of the other tables, -1 for unknown ones.

    `boxes` [N, 4] are xywh in pixels as in the file; `has_box` [N] says where they, and what clipping makes
    of them, can be relied on.
    """

    ids: Rows
    images: Rows
    categories: Rows
    boxes: Floats
    clipped: Clipped
    has_box: Bools
    areas: Floats
    is_crowd: Bools
    segmentations: Segmentations | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """A whole file: what is wrong with it, and its tables, which are empty where it has no such list."""

    source: str
    findings: Sequence[Findings]
    images: ImageTable
    categories: Mapping[int, str]
    annotations: AnnotationTable


def clip(boxes: Floats, sizes: Rows) -> Clipped:
    """Clip boxes [N, 4] as xywh to images of `sizes` [N, 2] as (h, w)."""
    with np.errstate(over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.tile(sizes[:, ::-1], 2)
    has_sides = (boxes[:, 2:] > 0).all(axis=1)
    outside = has_sides & ((corners[:, :2] >= limits[:, :2]) | (corners[:, 2:] <= 0)).any(axis=1)
    inside = corners.clip(0, limits)
    moved = np.where(outside, 0, np.abs(inside - corners).max(axis=1, initial=0))
    without_area = ~outside & ~(inside[:, 2:] > inside[:, :2]).all(axis=1)
    return Clipped(boxes=inside, outside=outside, without_area=without_area, moved=moved)


def examine_content(content: Any, *, source: str, packer: Packer | None = None) -> Content:
    """The tables of a parsed file, and everything that is wrong with it; segmentations only with a packer."""
    findings = _examine_structure(content, source)
    lists = content if isinstance(content, Mapping) else {}
    images, categories, annotations = (
        entries if isinstance(entries := lists.get(key), list) else []
        for key in ("images", "categories", "annotations")
    )
    image_findings, image_table = examine_images(images, source)
    category_findings, names = examine_categories(categories, source)
    annotation_findings, table = examine_annotations(annotations, image_table, sorted(names), source, packer)
    return Content(
        source=source,
        findings=[*findings, *image_findings, *category_findings, *annotation_findings],
        images=image_table,
        categories=names,
        annotations=table,
    )


def examine_images(entries: Sequence[Any], source: str) -> tuple[list[Findings], ImageTable]:
    """The table of the images."""
    findings, records, ids = _with_ids(entries, "images", source)
    names = [record.get("file_name") for record in records]
    named = np.array([is_file_name(name) for name in names], dtype=np.bool_)
    again, first = repeated(ids)

    def where(row: int) -> str:
        return f"file={source} image_id={ids[row]}"

    findings += found("file_name_malformed", ~named, lambda i: (f"{where(i)} key=file_name", repr(names[i])))
    sides = []
    for key in ("height", "width"):
        values = [record.get(key) for record in records]
        side, bad = integers(values)
        findings += found(
            "image_size_malformed",
            bad | (side < 1),
            lambda i, key=key, values=values: (f"{where(i)} key={key}", repr(values[i]), "a positive integer"),
        )
        sides.append(side.clip(0))
    sizes = np.stack(sides, axis=1)
    sizes[(sizes == 0).any(axis=1)] = 0
    findings += found("duplicate_image", again, lambda i: (where(i), f"{names[first[i]]!r} and {names[i]!r}"))
    usable = [str(name) if ok else "" for name, ok in zip(names, named.tolist(), strict=True)]
    return findings, ImageTable(ids=ids, names=usable, sizes=sizes)


def examine_categories(entries: Sequence[Any], source: str) -> tuple[list[Findings], dict[int, str]]:
    """Name of each category id."""
    findings, records, ids = _with_ids(entries, "categories", source)
    names = [record.get("name") for record in records]
    nameless = np.array([not isinstance(name, str) or not name for name in names], dtype=np.bool_)
    again, first = repeated(ids)

    def where(row: int) -> str:
        return f"file={source} category_id={ids[row]}"

    findings += found("category_name_malformed", nameless, lambda i: (f"{where(i)} key=name", repr(names[i])))
    findings += found("duplicate_category", again, lambda i: (where(i), f"{names[first[i]]!r} and {names[i]!r}"))
    return findings, {number: str(names[row]) for row, number in reversed(list(enumerate(ids.tolist())))}


def examine_annotations(
    entries: Sequence[Any], images: ImageTable, category_ids: Sequence[int], source: str, packer: Packer | None
) -> tuple[list[Findings], AnnotationTable]:
    """The table of the annotations; `category_ids` ascend."""
    findings, records, ids = _with_ids(entries, "annotations", source)

    def where(row: int, key: str) -> str:
        return f"file={source} ann_id={ids[row]} key={key}"

    rows = []
    for key, kind, known in (
        ("image_id", "unknown_image", images.ids),
        ("category_id", "unknown_category", np.array(category_ids, dtype=np.int64)),
    ):
        values = [record.get(key) for record in records]
        given, bad = integers(values)
        findings += found(
            "reference_malformed",
            bad,
            lambda i, key=key, values=values: (where(i, key), repr(values[i]), "an integer"),
        )
        places = places_of(given, known)
        unknown = ~bad & (places < 0)
        expected = f"one of {len(known)} ids that the file lists; so have {unknown.sum()} of {len(records)} annotations"
        findings += found(
            kind,
            unknown,
            lambda i, key=key, given=given, expected=expected: (where(i, key), str(given[i]), expected),
        )
        rows.append(np.where(bad, -1, places))
    image_rows, category_rows = rows
    findings += found("duplicate_annotation", repeated(ids)[0], lambda i: (where(i, "").removesuffix(" key="),))

    raw = [record.get("bbox") for record in records]
    boxes, malformed = four_numbers(raw)
    negative = ~malformed & (boxes[:, 2:] < 0).any(axis=1)
    findings += found("box_malformed", malformed, lambda i: (where(i, "bbox"), repr(raw[i]), "four numbers x, y, w, h"))
    findings += found("box_negative", negative, lambda i: (where(i, "bbox"), repr(raw[i]), "x, y, w, h"))
    with np.errstate(over="ignore"):
        areas, bad = numbers([record.get("area", 0) for record in records])
        has_area = np.fromiter(("area" in record for record in records), np.bool_, len(records))
        areas = np.where(has_area, areas, boxes[:, 2] * boxes[:, 3])
    bad |= ~malformed & ~negative & ~(np.isfinite(areas) & (areas >= 0))
    findings += found(
        "area_malformed",
        bad,
        lambda i: (where(i, "area"), repr(records[i].get("area", areas[i])), "a number >= 0"),
    )
    flags = [record.get("iscrowd", 0) for record in records]
    crowd = np.fromiter((flag in (0, 1) and bool(flag) for flag in flags), np.bool_, len(flags))
    unclear = np.fromiter((flag not in (0, 1) for flag in flags), np.bool_, len(flags))
    findings += found("crowd_malformed", unclear, lambda i: (where(i, "iscrowd"), repr(flags[i]), "0 or 1"))

    sizes = np.concatenate([images.sizes, [[0, 0]]])[image_rows]
    has_box = ~malformed & ~negative & (sizes[:, 0] > 0)
    image_ids = np.append(images.ids, 0)[image_rows]
    clipped = clip(boxes, sizes)
    findings += _examine_geometry(
        boxes, sizes, clipped, has_box, lambda i: f"file={source} image_id={image_ids[i]} ann_id={ids[i]} key=bbox"
    )
    segmentations = None
    if packer is not None:
        values = [packer.pack(record.get("segmentation")) for record in records]
        more, segmentations = examine_segmentations(values, packer, sizes, lambda i: where(i, "segmentation"))
        findings += more
    return findings, AnnotationTable(
        ids=ids,
        images=image_rows,
        categories=category_rows,
        boxes=boxes,
        clipped=clipped,
        has_box=has_box,
        areas=areas,
        is_crowd=crowd,
        segmentations=segmentations,
    )


def _examine_structure(content: Any, source: str) -> list[Findings]:
    def finding(where: str, got: str, expected: str = "") -> Findings:
        return Findings(
            kind="structure", count=1, examples=(Finding("structure", f"file={source}{where}", got, expected),)
        )

    if not isinstance(content, Mapping):
        return [finding("", type(content).__name__, "an object")]
    if missing := [key for key in _LISTS if key not in content]:
        return [finding(f" key={', '.join(missing)}", f"the keys {list(content)}", f"{', '.join(_LISTS)}")]
    for key in _LISTS:
        if not isinstance(content[key], list):
            return [finding(f" key={key}", type(content[key]).__name__, "a list")]
    return [] if content["categories"] else [finding(" key=categories", "[]", "at least one")]


def _examine_geometry(
    boxes: Floats, sizes: Rows, clipped: Clipped, has_box: Bools, place: Callable[[int], str]
) -> list[Findings]:
    def word(row: int) -> tuple[str, ...]:
        return place(row), str(boxes[row].tolist()), f"within {sizes[row, 1]} x {sizes[row, 0]}"

    far = has_box & (clipped.moved > MOVED_PIXELS)
    return [
        *found("box_outside", has_box & clipped.outside, word),
        *found("box_partly_outside", has_box & (clipped.moved > MOVED_TOLERANCE), word),
        *found("boxes_moved", far if far.sum() > MOVED_SHARE * len(far) else far & False, word),
        *found("box_without_area", has_box & clipped.without_area, word),
    ]


def _with_ids(entries: Sequence[Any], key: str, source: str) -> tuple[list[Findings], list[Record], Rows]:
    """The entries that are objects with an integer id, and their ids."""
    raw = [entry.get("id") if isinstance(entry, dict | Mapping) else None for entry in entries]
    ids, bad = integers(raw)
    findings = found(
        "id_malformed",
        bad,
        lambda i: (
            f"file={source} key={key}.id index={i}",
            repr(raw[i]) if isinstance(entries[i], Mapping) else type(entries[i]).__name__,
            "an integer",
        ),
    )
    if bad.any():
        entries = [entry for entry, is_bad in zip(entries, bad.tolist(), strict=True) if not is_bad]
    return findings, list(entries), ids[~bad]
