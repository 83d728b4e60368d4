"""The faults that a dataset may have: a table of their kinds, and how each is handled.

Every check returns findings: loading raises the first one that is refused, and a check of a whole dataset collects
them all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from detr_backbone.coco.typed_arrays import BoolArray, IntArray
from detr_backbone.errors import AnnotationError, ConfigError, DataError, DetrBackboneError

Severity: TypeAlias = Literal["error", "warning", "note"]
EXAMPLES = 5
"""Faults of one kind that are described; all are counted."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault.

    Attributes:
        what: the fault, as the first words of its message.
        fix: how to correct it; empty where the message suffices.
        severity: "error" is refused, unless a policy says otherwise; "warning" should be looked at; "note" is listed.
        error: the exception that is raised.
    """

    what: str
    fix: str = ""
    severity: Severity = "error"
    error: type[DetrBackboneError] = AnnotationError


KINDS: Mapping[str, Kind] = {
    # the annotation file
    "file_unreadable": Kind(what="annotation file cannot be read"),
    "structure": Kind(what="file is not a COCO dataset"),
    "no_images": Kind(what="dataset has no images", fix="check whether it is the right file", error=DataError),
    "id_malformed": Kind(what="entry has no integer id", fix="number the entries"),
    "duplicate_image": Kind(what="image id is used twice", fix="give every image an id of its own"),
    "federated": Kind(
        what="image was annotated for some categories only",
        fix="evaluate with the dataset's own tools: COCO's AP takes objects without annotation as false positives",
        severity="warning",
    ),
    "file_name_malformed": Kind(what="image has no file name"),
    "image_size_malformed": Kind(what="image has no size"),
    "duplicate_category": Kind(what="category id is used twice"),
    "category_name_malformed": Kind(what="category has no name"),
    "reference_malformed": Kind(what="annotation has no valid reference", fix="write ids as integers, not as text"),
    "unknown_image": Kind(what="annotation of an unknown image"),
    "unknown_category": Kind(what="annotation of an unknown category"),
    "duplicate_annotation": Kind(what="annotation id is used twice", fix="renumber the annotations"),
    "box_malformed": Kind(what="box is malformed"),
    "box_negative": Kind(what="box has a negative side", fix="write x, y, w, h instead of two corners"),
    "area_malformed": Kind(what="area is not a size"),
    "area_mismatch": Kind(
        what="area contradicts the box",
        fix="remove `area`, so that the box's is used; AP by size depends on it",
        severity="warning",
    ),
    "crowd_malformed": Kind(what="iscrowd is not a flag"),
    "ignore_flag": Kind(
        what="annotation is marked to be ignored, and is not",
        fix="set the policy ignore_flag to crowd, to drop, or leave it at keep, as pycocotools does",
        severity="warning",
    ),
    "duplicate_box": Kind(
        what="box is annotated twice",
        fix="remove one, or set the policy duplicate_box to drop",
        severity="warning",
    ),
    "box_outside": Kind(what="box lies outside its image"),
    "box_partly_outside": Kind(what="box reaches outside its image", severity="note"),
    "boxes_moved": Kind(
        what="many boxes reach far outside their images",
        fix="compare the stated sizes with the image files, and the boxes with x, y, w, h in pixels",
        severity="warning",
    ),
    "box_without_area": Kind(what="box has no area", severity="warning"),
    "segmentation_missing": Kind(what="annotation has no segmentation"),
    "segmentation_malformed": Kind(what="segmentation is malformed"),
    "segmentation_far": Kind(what="segmentation leaves its image"),
    "segmentation_size": Kind(what="encoded mask is not of the size of its image"),
    "segmentation_counts": Kind(what="encoded mask is not filled by its runs"),
    # the image files by name
    "path_outside": Kind(
        what="file name leads out of the images folder", fix="name files relative to the folder, and move them into it"
    ),
    "file_missing": Kind(
        what="image files are missing",
        fix="check the folder; if names nearly match, check-data --rename writes a corrected annotation file",
        error=DataError,
    ),
    "duplicate_file": Kind(what="images share a file", fix="merge their annotations", severity="warning"),
    "file_name_not_text": Kind(what="file name is not UTF-8 text", fix="rename the file", severity="warning"),
    # the content of the image files
    "picture_unreadable": Kind(
        what="image file cannot be read",
        fix="replace the file, or remove its entry",
        error=DataError,
    ),
    "picture_too_large": Kind(what="image is too large", fix="downscale it", error=DataError),
    "picture_size": Kind(
        what="stated size is not that of the image file",
        fix="state that of the file, or restore the annotated file",
    ),
    "picture_rotated": Kind(
        what="image is stored rotated", fix="check its boxes, or store it upright", severity="warning"
    ),
    "picture_animated": Kind(what="of several frames the first one is read", severity="note"),
    "picture_16_bit": Kind(what="16-bit grey is scaled by 1/257", severity="note"),
    "picture_alpha": Kind(
        what="transparency is dropped", fix="store the image on the background that it should have", severity="warning"
    ),
    "picture_mode": Kind(what="image is converted to RGB", severity="note"),
    "picture_shape": Kind(
        what="image is tiny or extremely long",
        fix="check whether its objects can be detected",
        severity="warning",
    ),
    "duplicate_picture": Kind(
        what="image files are identical", fix="keep one, with the boxes of all", severity="warning"
    ),
    "shared_picture": Kind(
        what="train and val share an image", fix="keep it in one of them; otherwise AP is too high", severity="warning"
    ),
    "image_not_listed": Kind(
        what="image files are not in the annotation file", fix="list them, if they belong to it", severity="warning"
    ),
    # what training and evaluation make of it
    "category_mismatch": Kind(
        what="train and val have other categories",
        fix="give both files the same categories under the same ids, also those without boxes",
        error=ConfigError,
    ),
    "category_gaps": Kind(what="category ids have gaps, labels have none", severity="note"),
    "category_unused": Kind(what="category has no boxes to train on", severity="warning"),
    "duplicate_category_name": Kind(what="categories share a name", fix="merge or rename them", severity="warning"),
    "category_named_by_number": Kind(
        what="category is named by a number", fix="choose it as name:N, and others as id:N", severity="note"
    ),
    "image_without_boxes": Kind(what="image has no boxes", severity="note"),
    "image_crowd_only": Kind(what="image has only crowds, which are not trained on", severity="note"),
    "more_boxes_than_queries": Kind(
        what="image has more boxes than queries", fix="raise detector.num_queries", severity="warning"
    ),
}
"""Every kind by its name, in the order of the checks."""


@dataclass(frozen=True, kw_only=True)
class DataPolicies:
    """Policies for the faults: "error" refuses the file, "drop" leaves the annotation out, "clamp" clips the box.

    "warn" and "keep" only list it. Dropped and clipped annotations are counted in the log of the training. A box that
    is outside, partly outside or without area is dropped or clipped for training only: the evaluation takes every box
    as it is in the file.

    Args:
        unknown_image: an annotation of an image that the file does not list.
        unknown_category: an annotation of a category that the file does not list.
        duplicate_annotation: an annotation id that is used again.
        box_malformed: a box that is not four finite numbers.
        box_negative: a box with a negative width or height.
        area_malformed: an area that is not a number >= 0.
        crowd_malformed: an `iscrowd` that is not 0 or 1.
        ignore_flag: an annotation with `ignore`, as CrowdHuman and VisDrone have; "crowd" takes it as a crowd, which is
            neither trained on nor counted, "keep" as any other object, as pycocotools does.
        duplicate_box: a box of the same category in the same image as an earlier one.
        box_outside: a box that does not overlap its image.
        box_partly_outside: a box that reaches outside its image by more than a hundredth of a pixel.
        box_without_area: a box of width or height 0.
        segmentation_missing: no segmentation, where segmentations are asked for.
        segmentation_malformed: neither polygons of three finite points or more nor a run-length encoding.
        segmentation_far: a polygon that leaves its image by several of its sizes, or is too large to be drawn.
        segmentation_size: a run-length encoding of another size than the image.
        segmentation_counts: a run-length encoding whose runs do not fill its size.
        more_boxes_than_queries: a training image with more boxes than the detector has queries; "warn" trains on those
            that fit, and the matcher names every such image once.
    """

    unknown_image: Literal["error", "drop"] = "error"
    unknown_category: Literal["error", "drop"] = "error"
    duplicate_annotation: Literal["error", "drop"] = "error"
    box_malformed: Literal["error", "drop"] = "error"
    box_negative: Literal["error", "drop"] = "error"
    area_malformed: Literal["error", "drop"] = "error"
    crowd_malformed: Literal["error", "drop"] = "error"
    ignore_flag: Literal["keep", "crowd", "drop"] = "keep"
    duplicate_box: Literal["warn", "drop", "error"] = "warn"
    box_outside: Literal["error", "drop"] = "error"
    box_partly_outside: Literal["error", "clamp"] = "clamp"
    box_without_area: Literal["error", "drop"] = "drop"
    segmentation_missing: Literal["error", "drop"] = "error"
    segmentation_malformed: Literal["error", "drop"] = "error"
    segmentation_far: Literal["error", "drop"] = "error"
    segmentation_size: Literal["error", "drop"] = "error"
    segmentation_counts: Literal["error", "drop"] = "error"
    more_boxes_than_queries: Literal["warn", "error"] = "warn"

    def action(self, kind: str) -> str:
        """Return how a kind of fault is handled: one of its policy's values, or "" if it is only listed."""
        return str(getattr(self, kind, "error" if KINDS[kind].severity == "error" else ""))


DEFAULT_POLICIES = DataPolicies()


def fix_of(kind: str) -> str:
    """Return how to correct a kind of fault, and the policy that lets it through; empty where the message suffices.

    >>> fix_of("duplicate_annotation")
    'renumber the annotations, or set the policy duplicate_annotation to drop'
    """
    fix = KINDS[kind].fix
    if getattr(DEFAULT_POLICIES, kind, "") != "error":
        return fix
    return f"{fix or 'correct the file'}, or set the policy {kind} to drop"


@dataclass(frozen=True)
class Finding:
    """One fault and its location.

    Attributes:
        kind: a key of `KINDS`.
        where: file=, image_id=, ann_id=, key=, as far as they apply.
        got: the value that is there.
        expected: a valid value.
    """

    kind: str
    where: str
    got: str = ""
    expected: str = ""

    @property
    def detail(self) -> str:
        """Location and value, without the words that all faults of the kind have in common."""
        values = " ".join(
            f"{word} {value}" for word, value in (("got", self.got), ("expected", self.expected)) if value
        )
        return f"{self.where} | {values}" if values else self.where

    @property
    def message(self) -> str:
        """The whole message in one line."""
        fix = fix_of(self.kind)
        return f"{KINDS[self.kind].what} | where: {self.detail}" + (f" | fix: {fix}" if fix else "")

    @property
    def error(self) -> DetrBackboneError:
        """The exception that refuses it."""
        return KINDS[self.kind].error(self.message)


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """All faults of one kind in one list of records.

    Attributes:
        kind: a key of `KINDS`.
        count: how many there are.
        examples: the first of them described, at least one.
        rows: int64 [count], the indices of the records with the fault, in the list that was checked.
    """

    kind: str
    count: int
    examples: tuple[Finding, ...]
    rows: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))


def findings_of(kind: str, bad: BoolArray, describe: Callable[[int], tuple[str, ...]]) -> list[Findings]:
    """Return the findings of a kind where `bad` [N] is True, if any; `describe` gives where, got, expected of a row."""
    rows = np.flatnonzero(bad)
    if not len(rows):
        return []
    examples = tuple(Finding(kind, *describe(row)) for row in rows[:EXAMPLES].tolist())
    return [Findings(kind=kind, count=len(rows), examples=examples, rows=rows)]


def shortened(value: Any, length: int = 80) -> str:
    """Return a value as errors show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
