"""The rules for the content of a COCO file, checked column by column so that a million annotations take seconds.

Every part of the file becomes a table with a row for each of its entries, in the order of the file, and a list of
findings; a value that breaks a rule is 0, "" or -1 in the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detr_backbone.coco.annotation_rules import (
    AnnotationTable,
    Entries,
    Record,
    Where,
    entries_with_ids,
    examine_annotations,
)
from detr_backbone.coco.findings import Finding, Findings, findings_of
from detr_backbone.coco.segmentations import Packer
from detr_backbone.coco.typed_arrays import IntArray, integers, is_file_name, repeated

_LISTS = ("images", "annotations", "categories")
_FEDERATED = frozenset({"neg_category_ids", "not_exhaustive_category_ids", "pos_category_ids"})
"""Keys by which images of LVIS and Open Images state the categories that were annotated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageTable:
    """The images: `ids` [I], `names`, and `sizes` [I, 2] as (h, w)."""

    ids: IntArray
    names: Sequence[str]
    sizes: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """A whole file: its faults, and its tables, which are empty for a list that is missing."""

    source: str
    findings: Sequence[Findings]
    images: ImageTable
    categories: Mapping[int, str]
    annotations: AnnotationTable


def examine_content(content: Any, *, source: str, packer: Packer | None = None) -> Content:
    """Return the tables of a parsed file and all its faults; segmentations only with a packer."""
    findings = _examine_structure(content, source)
    lists = content if isinstance(content, Mapping) else {}
    images, categories, annotations = (
        entries if isinstance(entries := lists.get(key), list) else []
        for key in ("images", "categories", "annotations")
    )
    image_entries = entries_with_ids(images, "images", source)
    category_entries = entries_with_ids(categories, "categories", source)
    image_findings, image_table = examine_images(image_entries, source)
    category_findings, names = examine_categories(category_entries, source)
    annotation_findings, table = examine_annotations(
        annotations,
        images=image_entries,
        image_sizes=image_table.sizes,
        categories=category_entries,
        source=source,
        packer=packer,
    )
    return Content(
        source=source,
        findings=[*findings, *image_findings, *category_findings, *annotation_findings],
        images=image_table,
        categories=names,
        annotations=table,
    )


def examine_images(entries: Entries, source: str) -> tuple[list[Findings], ImageTable]:
    """Return faults and table of the images."""
    findings, records, ids, _ = entries
    findings = [*findings]
    names = [record.get("file_name") for record in records]
    named = np.array([is_file_name(name) for name in names], dtype=np.bool_)
    again, first = repeated(ids)

    def where(row: int) -> str:
        return f"file={source} image_id={ids[row]}"

    findings += findings_of("file_name_malformed", ~named, lambda i: (f"{where(i)} key=file_name", repr(names[i])))
    sides = []
    for key in ("height", "width"):
        more, side = _examine_side(records, key, where)
        findings += more
        sides.append(side)
    sizes = np.stack(sides, axis=1)
    sizes[(sizes == 0).any(axis=1)] = 0
    federated = np.array([not _FEDERATED.isdisjoint(record) for record in records], dtype=np.bool_)
    findings += findings_of(
        "federated", federated, lambda i: (where(i), f"the keys {sorted(_FEDERATED.intersection(records[i]))}")
    )
    findings += findings_of("duplicate_image", again, lambda i: (where(i), f"{names[first[i]]!r} and {names[i]!r}"))
    usable = [str(name) if ok else "" for name, ok in zip(names, named.tolist(), strict=True)]
    return findings, ImageTable(ids=ids, names=usable, sizes=sizes)


def examine_categories(entries: Entries, source: str) -> tuple[list[Findings], dict[int, str]]:
    """Return faults of the categories, and the name of each category id."""
    findings, records, ids, _ = entries
    findings = [*findings]
    names = [record.get("name") for record in records]
    nameless = np.array([not isinstance(name, str) or not name for name in names], dtype=np.bool_)
    again, first = repeated(ids)

    def where(row: int) -> str:
        return f"file={source} category_id={ids[row]}"

    findings += findings_of("category_name_malformed", nameless, lambda i: (f"{where(i)} key=name", repr(names[i])))
    by_number = np.array([isinstance(name, str) and name.isdecimal() for name in names], dtype=np.bool_)
    findings += findings_of("category_named_by_number", by_number, lambda i: (where(i), repr(names[i])))
    findings += findings_of("duplicate_category", again, lambda i: (where(i), f"{names[first[i]]!r} and {names[i]!r}"))
    return findings, {number: str(names[row]) for number, row in sorted(zip(ids.tolist(), first.tolist(), strict=True))}


def more_boxes_than_queries(boxes: IntArray, image_ids: Sequence[int], num_queries: int, where: str) -> list[Findings]:
    """Return the images with more boxes than a detector can detect.

    Args:
        boxes: int64 [I], the number of boxes to train on in each image.
        image_ids: the id of each.
        num_queries: of the detector.
        where: the annotation file, as findings give it.
    """
    return findings_of(
        "more_boxes_than_queries",
        boxes > num_queries,
        lambda i: (f"{where} image_id={image_ids[i]}", f"{boxes[i]} boxes", f"{num_queries} at most"),
    )


def _examine_side(records: Sequence[Record], key: str, where: Where) -> tuple[list[Findings], IntArray]:
    """Return the height or width of each image, 0 for an invalid one."""
    values = [record.get(key) for record in records]
    sides, bad = integers(values)
    findings = findings_of(
        "image_size_malformed",
        bad | (sides < 1),
        lambda i: (f"{where(i)} key={key}", repr(values[i]), "a positive integer"),
    )
    return findings, sides.clip(0)


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
