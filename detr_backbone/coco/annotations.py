"""A COCO annotation file, checked as a whole and packed into arrays.

Later code relies on what is checked here: ids are integers and unique, every annotation belongs to an image and a
category of the same file, every box is four finite numbers. Arrays instead of dicts, because the memory pages of an
array stay shared between the workers of a DataLoader, while reference counts of a dict's values copy them.

Source: https://cocodataset.org/#format-data
"""

import contextlib
import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.findings import DEFAULT_POLICIES, KINDS, DataPolicies, Findings
from detr_backbone.coco.rules import Content, examine_content
from detr_backbone.coco.segmentations import Packer, Segmentations
from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.errors import AnnotationError

MAX_BYTES = 8 * 2**30
"""Bytes of the largest annotation file that is read: about three times that of Objects365."""

_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')
_NUMBERS = r"\[[-+0-9.eE,\s]*\]"
_POLYGONS = re.compile(rf'("segmentation":\s*\[)\s*{_NUMBERS}(?:\s*,\s*{_NUMBERS})*\s*(?=\])')
_COCO_FILE = "give the path of a COCO file; `python -m detr_backbone.coco.shapes FOLDER` draws an example"
_TARGETS_ONLY = ("box_outside", "box_without_area")  # dropped for training, but not from the evaluation
_MISLEADING = ("area_mismatch", "ignore_flag", "duplicate_box", "federated")  # AP is lower or higher than it should be


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoAnnotations:
    """The content of a COCO file for a detector: I images in the order of their ids, K classes, N annotations by image.

    Attributes:
        source: the file, as errors name it.
        image_ids: int64 [I], ascending.
        file_names: str [I].
        sizes: int64 [I, 2], the (h, w) that the file states.
        category_ids: the category id of each label 0 .. K - 1, ascending.
        category_names: the name of each label; a name that several categories share gets its id added.
        annotation_ids: int64 [N].
        image_index: int64 [N], ascending: the index of the annotation's image in `image_ids`.
        labels: int64 [N], 0 .. K - 1.
        boxes: float64 [N, 4] as in the file, xywh in pixels, neither side negative.
        areas: float64 [N], the file's `area`, or that of the box where the file gives none.
        is_crowd: bool [N].
        segmentations: the masks of the annotations, where they were asked for.
        findings: the number of faults of each kind that the policies let through, by dropping annotations, clipping
            boxes, or with a warning.
        warnings: the findings with which an AP is misleading, each in a line.
        part: a description of the subset of the file; empty for all of it.
    """

    source: str
    image_ids: IntArray
    file_names: npt.NDArray[np.str_]
    sizes: IntArray
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    annotation_ids: IntArray
    image_index: IntArray
    labels: IntArray
    boxes: FloatArray
    areas: FloatArray
    is_crowd: BoolArray
    segmentations: Segmentations | None = None
    findings: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    part: str = ""


def load_annotations(
    path: Path | str, *, segmentations: bool = False, policies: DataPolicies = DEFAULT_POLICIES
) -> CocoAnnotations:
    """Return the checked content of a COCO annotation file.

    Args:
        path: the file.
        segmentations: fill `CocoAnnotations.segmentations`. Without, the numbers of polygons are not even parsed, which
            takes most of the time.
        policies: how faults are handled that need not be refused.

    Raises:
        AnnotationError: the file cannot be read, is no JSON, or contradicts itself or the COCO format.
    """
    packer = Packer() if segmentations else None
    with pause_garbage_collection():
        return assemble(examine_content(read_content(path, packer=packer), source=str(path), packer=packer), policies)


def parse_annotations(
    content: Any, *, source: str, segmentations: bool = False, policies: DataPolicies = DEFAULT_POLICIES
) -> CocoAnnotations:
    """Return the checked content of a parsed file, which errors call `source`.

    Raises:
        AnnotationError: the content contradicts itself or the COCO format.
    """
    packer = Packer() if segmentations else None
    return assemble(examine_content(content, source=source, packer=packer), policies)


def refuse(findings: Sequence[Findings], policies: DataPolicies = DEFAULT_POLICIES) -> None:
    """Raise the first finding that the policies refuse, as AnnotationError or DataError."""
    for one in findings:
        if policies.action(one.kind) == "error":
            raise one.examples[0].error


def read_json(path: Path | str) -> Any:
    """Return the content of a UTF-8 JSON file, with or without a byte order mark; NaN and Infinity are refused.

    Raises:
        AnnotationError: naming the file, and the line and column where it stops being JSON.
    """
    return _parse(_read_text(path), path)


def read_content(path: Path | str, *, packer: Packer | None = None) -> Any:
    """Return the content of a COCO file, its segmentations in a packer; without one, polygons are left out.

    Raises:
        AnnotationError: as `read_json`.
    """
    if packer is None:
        text = _POLYGONS.sub(r"\1", _read_text(path, fix=_COCO_FILE))
        try:
            return json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):  # the error needs line and column of the whole text
            return read_json(path)

    def pack(record: dict[str, Any]) -> dict[str, Any]:
        if "segmentation" in record:
            record["segmentation"] = packer.pack(record["segmentation"])
        return record

    return _parse(_read_text(path, fix=_COCO_FILE), path, pack)


def assemble(content: Content, policies: DataPolicies) -> CocoAnnotations:
    """Return the arrays of an examined file.

    Raises:
        AnnotationError: a finding that the policies refuse.
    """
    refuse(content.findings, policies)
    images, table = content.images, content.annotations
    keep, is_crowd = np.ones(len(table.ids), np.bool_), table.is_crowd.copy()
    for one in content.findings:
        if policies.action(one.kind) == "drop" and one.kind not in _TARGETS_ONLY:
            keep[one.rows] = False
        elif policies.action(one.kind) == "crowd":
            is_crowd[one.rows] = True
    order = np.argsort(images.ids)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(position[table.images[rows]], kind="stable")]
    ids = sorted(content.categories)
    names = content.categories
    shared = Counter(names.values())
    return CocoAnnotations(
        source=content.source,
        image_ids=images.ids[order],
        file_names=np.array([images.names[row] for row in order], dtype=np.str_),
        sizes=images.sizes[order],
        category_ids=tuple(ids),
        category_names=tuple(names[i] if shared[names[i]] == 1 else f"{names[i]} (id {i})" for i in ids),
        annotation_ids=table.ids[rows],
        image_index=position[table.images[rows]],
        labels=table.categories[rows],
        boxes=table.boxes[rows],
        areas=table.areas[rows],
        is_crowd=is_crowd[rows],
        segmentations=table.segmentations and table.segmentations.take(rows),
        findings={
            one.kind: one.count
            for one in content.findings
            if KINDS[one.kind].severity != "note" or policies.action(one.kind)
        },
        warnings=tuple(
            f"{KINDS[one.kind].what}: {one.count} | fix: {KINDS[one.kind].fix}"
            for one in content.findings
            if one.kind in _MISLEADING and policies.action(one.kind) not in ("drop", "crowd")
        ),
    )


def _read_text(path: Path | str, *, fix: str = "give the path of a file that can be read") -> str:
    try:
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise AnnotationError(
                f"file is too large | where: file={path} | got {size} bytes expected {MAX_BYTES} at most"
            )
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise AnnotationError(
            f"file cannot be read | where: file={path} | got {error.strerror or error} | fix: {fix}"
        ) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"file is not UTF-8 text | where: file={path} | got {error}") from error


def _parse(text: str, path: Path | str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    def refuse(constant: str) -> NoReturn:
        start = next(match.start(1) for match in _STRING_OR_CONSTANT.finditer(text) if match[1])
        raise json.JSONDecodeError(f"{constant} is not a number", text, start)

    try:
        return json.loads(text, parse_constant=refuse, object_hook=hook)
    except json.JSONDecodeError as error:
        where = f"file={path} line={error.lineno} column={error.colno}"
        raise AnnotationError(f"file is not JSON | where: {where} | got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"file is not usable JSON | where: file={path} | got {error}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(constant)


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time while millions of objects are created."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
