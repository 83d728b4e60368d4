"""What must hold in the content of a COCO file, checked column by column so that a million annotations take seconds.

Every part of the file becomes a table with a row for each of its entries, in the order of the file, and a list of
findings; where a value breaks a rule, its place in the table holds 0, "" or -1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from detr_backbone.coco.boxes import MOVED_PIXELS, MOVED_SHARE, MOVED_TOLERANCE, Clipped, clip
from detr_backbone.coco.columns import Bools, Floats, four_numbers, integers, is_file_name, numbers, places_of, repeated
from detr_backbone.coco.findings import Finding, Findings, Rows, found, shortened
from detr_backbone.coco.segmentations import Packer, Segmentations, examine_segmentations

Record: TypeAlias = Mapping[str, Any]
Place: TypeAlias = Callable[[int], str]  # what findings call the record of a row

_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageTable:
    """The images: `ids` [I], `names`, and `sizes` [I, 2] as (h, w)."""

    ids: Rows
    names: Sequence[str]
    sizes: Rows


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
        more, side = _examine_side(records, key, where)
        findings += more
        sides.append(side)
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
    return findings, {number: str(names[row]) for number, row in sorted(zip(ids.tolist(), first.tolist(), strict=True))}


def examine_annotations(
    entries: Sequence[Any], images: ImageTable, category_ids: Sequence[int], source: str, packer: Packer | None
) -> tuple[list[Findings], AnnotationTable]:
    """The table of the annotations; `category_ids` ascend."""
    findings, records, ids = _with_ids(entries, "annotations", source)

    def where(row: int) -> str:
        return f"file={source} ann_id={ids[row]}"

    image_findings, image_rows = _examine_reference(records, "image_id", images.ids, where)
    category_findings, category_rows = _examine_reference(records, "category_id", np.array(category_ids, int), where)
    box_findings, boxes, whole = _examine_boxes(records, where)
    area_findings, areas = _examine_areas(records, boxes, whole, where)
    crowd_findings, crowd = _examine_crowds(records, where)
    findings += image_findings + category_findings
    findings += found("duplicate_annotation", repeated(ids)[0], lambda i: (where(i),))
    findings += box_findings + area_findings + crowd_findings

    sizes = np.concatenate([images.sizes, [[0, 0]]])[image_rows]
    has_box = whole & (sizes[:, 0] > 0)
    image_ids = np.append(images.ids, 0)[image_rows]
    clipped = clip(boxes, sizes)
    findings += _examine_geometry(
        boxes, sizes, clipped, has_box, lambda i: f"file={source} image_id={image_ids[i]} ann_id={ids[i]} key=bbox"
    )
    segmentations = None
    if packer is not None:
        values = [packer.pack(record.get("segmentation")) for record in records]
        more, segmentations = examine_segmentations(values, packer, sizes, where)
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


def _examine_side(records: Sequence[Record], key: str, where: Place) -> tuple[list[Findings], Rows]:
    """Height or width of each image, 0 where it is none."""
    values = [record.get(key) for record in records]
    sides, bad = integers(values)
    findings = found(
        "image_size_malformed",
        bad | (sides < 1),
        lambda i: (f"{where(i)} key={key}", repr(values[i]), "a positive integer"),
    )
    return findings, sides.clip(0)


def _examine_reference(records: Sequence[Record], key: str, known: Rows, where: Place) -> tuple[list[Findings], Rows]:
    """The row of `known` that each annotation belongs to, -1 for none."""
    values = [record.get(key) for record in records]
    given, bad = integers(values)
    rows = np.where(bad, -1, places_of(given, known))
    unknown = ~bad & (rows < 0)
    expected = f"one of {len(known)} ids that the file lists; so have {unknown.sum()} of {len(records)} annotations"
    return [
        *found("reference_malformed", bad, lambda i: (f"{where(i)} key={key}", repr(values[i]), "an integer")),
        *found(
            f"unknown_{key.removesuffix('_id')}", unknown, lambda i: (f"{where(i)} key={key}", str(given[i]), expected)
        ),
    ], rows


def _examine_boxes(records: Sequence[Record], where: Place) -> tuple[list[Findings], Floats, Bools]:
    """Boxes [N, 4] as xywh, and whether each of them is one."""
    raw = [record.get("bbox") for record in records]
    boxes, malformed = four_numbers(raw)
    negative = ~malformed & (boxes[:, 2:] < 0).any(axis=1)

    def word(row: int) -> tuple[str, ...]:
        sides = " with w, h >= 0" if negative[row] else ""
        return f"{where(row)} key=bbox", shortened(raw[row]), f"four numbers x, y, w, h{sides}"

    findings = [*found("box_malformed", malformed, word), *found("box_negative", negative, word)]
    return findings, boxes, ~malformed & ~negative


def _examine_areas(
    records: Sequence[Record], boxes: Floats, whole: Bools, where: Place
) -> tuple[list[Findings], Floats]:
    """The area of each annotation, that of its box where the file gives none."""
    areas, bad = numbers([record.get("area", 0) for record in records])
    given = np.fromiter(("area" in record for record in records), np.bool_, len(records))
    with np.errstate(over="ignore"):
        areas = np.where(given, areas, boxes[:, 2] * boxes[:, 3])
    bad |= whole & ~(np.isfinite(areas) & (areas >= 0))
    findings = found(
        "area_malformed",
        bad,
        lambda i: (f"{where(i)} key=area", shortened(records[i].get("area", float(areas[i]))), "a number >= 0"),
    )
    return findings, areas


def _examine_crowds(records: Sequence[Record], where: Place) -> tuple[list[Findings], Bools]:
    """Whether each annotation is a crowd."""
    flags = [record.get("iscrowd", 0) for record in records]
    crowd = np.fromiter((flag in (0, 1) and bool(flag) for flag in flags), np.bool_, len(flags))
    unclear = np.fromiter((flag not in (0, 1) for flag in flags), np.bool_, len(flags))
    return found(
        "crowd_malformed", unclear, lambda i: (f"{where(i)} key=iscrowd", shortened(flags[i]), "0 or 1")
    ), crowd


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


def _examine_geometry(boxes: Floats, sizes: Rows, clipped: Clipped, has_box: Bools, where: Place) -> list[Findings]:
    def word(row: int) -> tuple[str, ...]:
        return where(row), str(boxes[row].tolist()), f"within {sizes[row, 1]} x {sizes[row, 0]}"

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


def more_boxes_than_queries(boxes: Rows, image_ids: Sequence[int], num_queries: int, where: str) -> list[Findings]:
    """The images of which a detector with so many queries cannot learn every box.

    Args:
        boxes: int64 [I], boxes to train on in each image.
        image_ids: the id of each.
        num_queries: of the detector.
        where: the annotation file, as findings name it.
    """
    return found(
        "more_boxes_than_queries",
        boxes > num_queries,
        lambda i: (f"{where} image_id={image_ids[i]}", f"{boxes[i]} boxes", f"{num_queries} at most"),
    )
