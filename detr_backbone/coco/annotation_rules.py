"""The rules for the annotations of a COCO file, checked column by column.

The table has a row for each annotation, in the order of the file; a value that breaks a rule is 0 or -1 in it.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from detr_backbone.coco.box_clipping import MOVED_FRACTION, MOVED_PIXELS, MOVED_TOLERANCE, Clipped, clip
from detr_backbone.coco.findings import Findings, findings_of, shortened
from detr_backbone.coco.segmentations import Packer, Segmentations, examine_segmentations
from detr_backbone.coco.typed_arrays import (
    BoolArray,
    FloatArray,
    IntArray,
    four_numbers,
    integers,
    numbers,
    repeated,
    row_indices,
)

Record: TypeAlias = Mapping[str, Any]
Where: TypeAlias = Callable[[int], str]
"""Gives the location of the record of a row, as findings state it."""

MIN_AREA_FRACTION = 0.01
"""The least fraction of its box that an annotation's area is expected to be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotationTable:
    """The annotations: `images` and `categories` are rows of the other tables, -1 for unknown ones.

    `boxes` [N, 4] are xywh in pixels as in the file; they and the clipped ones are valid where
    `has_box` [N] is True.
    """

    ids: IntArray
    images: IntArray
    categories: IntArray
    boxes: FloatArray
    clipped: Clipped
    has_box: BoolArray
    areas: FloatArray
    is_crowd: BoolArray
    segmentations: Segmentations | None


def examine_annotations(
    entries: Sequence[Any],
    *,
    images: "Entries",
    image_sizes: IntArray,
    categories: "Entries",
    source: str,
    packer: Packer | None,
) -> tuple[list[Findings], AnnotationTable]:
    """Return faults and table of the annotations.

    Args:
        entries: the list in the file.
        images: the I images.
        image_sizes: int64 [I, 2], (h, w).
        categories: the categories.
        source: the annotation file, as findings give it.
        packer: takes the segmentations; None leaves them out.
    """
    findings, records, ids, _ = entries_with_ids(entries, "annotations", source)

    def where(row: int) -> str:
        return f"file={source} ann_id={ids[row]}"

    image_findings, image_rows = _examine_reference(records, "image_id", images.ids, images.malformed, where)
    category_findings, category_rows = _examine_reference(
        records, "category_id", np.unique(categories.ids), categories.malformed, where
    )
    box_findings, boxes, valid = _examine_boxes(records, where)
    area_findings, areas = _examine_areas(records, boxes, valid, where)
    crowd_findings, crowd = _examine_crowds(records, where)
    findings += image_findings + category_findings
    same_id, _ = repeated(ids)
    findings += findings_of("duplicate_annotation", same_id, lambda i: (where(i),))
    findings += box_findings + area_findings + crowd_findings

    sizes = np.concatenate([image_sizes, [[0, 0]]])[image_rows]
    has_box = valid & (sizes[:, 0] > 0)
    id_of_image = np.append(images.ids, 0)[image_rows]
    clipped = clip(boxes, sizes)
    findings += _examine_geometry(
        boxes, sizes, clipped, has_box, lambda i: f"file={source} image_id={id_of_image[i]} ann_id={ids[i]} key=bbox"
    )
    known = valid & (image_rows >= 0) & (category_rows >= 0) & ~crowd & ~same_id
    findings += _examine_duplicate_boxes(np.stack([image_rows, category_rows]), boxes, known, ids, where)
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


class Entries(NamedTuple):
    """The entries of a list that have an id: its faults, the records, their ids, and the ids that are no integers.

    Ids such as 1.0 and "1" are refused, and yet read as 1, so that what refers to them has no faults as a consequence.
    """

    findings: list[Findings]
    records: list[Record]
    ids: IntArray
    malformed: Set[Any]


def entries_with_ids(entries: Sequence[Any], key: str, source: str) -> Entries:
    """Return the entries that are objects with an id."""
    raw = [entry.get("id") if isinstance(entry, dict | Mapping) else None for entry in entries]
    ids, bad = integers(raw)
    findings = findings_of(
        "id_malformed",
        bad,
        lambda i: (
            f"file={source} key={key}.id index={i}",
            repr(raw[i]) if isinstance(entries[i], Mapping) else type(entries[i]).__name__,
            "an integer",
        ),
    )
    usable = ~bad
    for row in np.flatnonzero(bad).tolist():
        number = raw[row]
        if isinstance(number, float | str) and str(number).removesuffix(".0").isdecimal() and len(str(number)) < 19:
            ids[row], usable[row] = int(str(number).removesuffix(".0")), True
    if not usable.all():
        entries = [entry for entry, is_usable in zip(entries, usable.tolist(), strict=True) if is_usable]
    malformed = {raw[row] for row in np.flatnonzero(bad & usable).tolist()}
    return Entries(findings, list(entries), ids[usable], malformed)


def _examine_reference(
    records: Sequence[Record], key: str, known: IntArray, malformed: Set[Any], where: Where
) -> tuple[list[Findings], IntArray]:
    """Return the index in `known` of the id that each annotation refers to, -1 for none."""
    values = [record.get(key) for record in records]
    given, bad = integers(values)
    for row in np.flatnonzero(bad).tolist() if malformed else ():
        value = values[row]
        if isinstance(value, float | str) and value in malformed:  # the fault is that of the id
            given[row], bad[row] = int(str(value).removesuffix(".0")), False
    rows = np.where(bad, -1, row_indices(given, known))
    unknown = ~bad & (rows < 0)
    expected = f"one of {len(known)} ids that the file lists; so have {unknown.sum()} of {len(records)} annotations"
    return [
        *findings_of("reference_malformed", bad, lambda i: (f"{where(i)} key={key}", repr(values[i]), "an integer")),
        *findings_of(
            f"unknown_{key.removesuffix('_id')}", unknown, lambda i: (f"{where(i)} key={key}", str(given[i]), expected)
        ),
    ], rows


def _examine_boxes(records: Sequence[Record], where: Where) -> tuple[list[Findings], FloatArray, BoolArray]:
    """Return boxes [N, 4] as xywh, and a mask of the valid ones."""
    raw = [record.get("bbox") for record in records]
    boxes, malformed = four_numbers(raw)
    negative = ~malformed & (boxes[:, 2:] < 0).any(axis=1)

    def describe(row: int) -> tuple[str, ...]:
        sides = " with w, h >= 0" if negative[row] else ""
        return f"{where(row)} key=bbox", shortened(raw[row]), f"four numbers x, y, w, h{sides}"

    findings = [
        *findings_of("box_malformed", malformed, describe),
        *findings_of("box_negative", negative, describe),
    ]
    return findings, boxes, ~malformed & ~negative


def _examine_areas(
    records: Sequence[Record], boxes: FloatArray, valid: BoolArray, where: Where
) -> tuple[list[Findings], FloatArray]:
    """Return the area of each annotation, that of its box where the file gives none.

    An area contradicts its box if it is larger, by more than the pixels that a mask's edge may add, or less than a
    hundredth of it; the least in COCO's val2017 is about 0.02.
    """
    areas, bad = numbers([record.get("area", 0) for record in records])
    given = np.fromiter(("area" in record for record in records), np.bool_, len(records))
    with np.errstate(over="ignore"):
        areas = np.where(given, areas, boxes[:, 2] * boxes[:, 3])
    bad |= valid & ~(np.isfinite(areas) & (areas >= 0))
    findings = findings_of(
        "area_malformed",
        bad,
        lambda i: (f"{where(i)} key=area", shortened(records[i].get("area", float(areas[i]))), "a number >= 0"),
    )
    width, height = boxes[:, 2:].T
    with np.errstate(over="ignore"):
        least, most = MIN_AREA_FRACTION * width * height, (width + 2) * (height + 2)
    findings += findings_of(
        "area_mismatch",
        given & valid & ~bad & (width * height > 0) & ((areas < least) | (areas > most)),
        lambda i: (f"{where(i)} key=area", f"{areas[i]:g}", f"{least[i]:.4g} to {most[i]:.4g} for its box"),
    )
    return findings, areas


def _examine_crowds(records: Sequence[Record], where: Where) -> tuple[list[Findings], BoolArray]:
    """Return a mask of the crowds."""
    flags = [record.get("iscrowd", 0) for record in records]
    crowd = np.fromiter((flag in (0, 1) and bool(flag) for flag in flags), np.bool_, len(flags))
    unclear = np.fromiter((flag not in (0, 1) for flag in flags), np.bool_, len(flags))
    marks = [record.get("ignore") for record in records]
    ignored = np.fromiter((mark not in (None, 0) for mark in marks), np.bool_, len(marks)) & ~crowd
    findings = [
        *findings_of("crowd_malformed", unclear, lambda i: (f"{where(i)} key=iscrowd", shortened(flags[i]), "0 or 1")),
        *findings_of("ignore_flag", ignored, lambda i: (f"{where(i)} key=ignore", shortened(marks[i]))),
    ]
    return findings, crowd


def _examine_duplicate_boxes(
    belongs_to: IntArray, boxes: FloatArray, known: BoolArray, ids: IntArray, where: Where
) -> list[Findings]:
    """Return the boxes [N, 4] that equal an earlier one of the same image and category, `belongs_to` [2, N]."""
    # Multiplicative hashing: Knuth, The Art of Computer Programming 3, 6.4. Equal digests are compared in full.
    columns = [*belongs_to, *np.ascontiguousarray(boxes).view(np.int64).T]
    digest = np.zeros(len(boxes), np.int64)
    with np.errstate(over="ignore"):
        for column in columns:
            digest = (digest ^ column) * np.int64(-7046029254386353131)
            digest ^= digest >> 29
    rows = np.flatnonzero(known)
    same_digest, first = repeated(digest[rows])
    candidates, earlier = rows[same_digest], rows[first[same_digest]]
    again = np.zeros(len(boxes), np.bool_)
    again[candidates] = np.all([column[candidates] == column[earlier] for column in columns], axis=0)
    earlier_of = dict(zip(candidates.tolist(), earlier.tolist(), strict=True))
    return findings_of("duplicate_box", again, lambda i: (where(i), f"the box of ann_id={ids[earlier_of[i]]}"))


def _examine_geometry(
    boxes: FloatArray, sizes: IntArray, clipped: Clipped, has_box: BoolArray, where: Where
) -> list[Findings]:
    def describe(row: int) -> tuple[str, ...]:
        return where(row), str(boxes[row].tolist()), f"within {sizes[row, 1]} x {sizes[row, 0]}"

    far = has_box & (clipped.moved > MOVED_PIXELS)
    return [
        *findings_of("box_outside", has_box & clipped.outside, describe),
        *findings_of("box_partly_outside", has_box & (clipped.moved > MOVED_TOLERANCE), describe),
        *findings_of("boxes_moved", far if far.sum() > MOVED_FRACTION * len(far) else far & False, describe),
        *findings_of("box_without_area", has_box & clipped.without_area, describe),
    ]
