"""A check of a whole dataset before training: every fault, counted, with examples.

The rules are those by which loading refuses, drops or clips; besides them every image file is decoded, and what is
allowed but rarely intended is listed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from detr_backbone.coco.annotations import read_content
from detr_backbone.coco.categories import different_categories
from detr_backbone.coco.check_report import CheckedSplit
from detr_backbone.coco.findings import EXAMPLES, Finding, Findings, findings_of
from detr_backbone.coco.image_files import examine_files, unlisted_files
from detr_backbone.coco.images import examine_image
from detr_backbone.coco.near_misses import near_misses
from detr_backbone.coco.rules import Content, examine_content, more_boxes_than_queries
from detr_backbone.coco.segmentations import Packer
from detr_backbone.errors import AnnotationError
from detr_backbone.nested_tensor import Size


def check_split(
    images: Path | str,
    annotations: Path | str,
    *,
    name: str = "data",
    num_queries: int | None = None,
    decode: bool = True,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> CheckedSplit:
    """Return the findings about one annotation file and its image files.

    Args:
        images: the folder of the image files.
        annotations: the annotation file.
        name: of the split, in the report.
        num_queries: of the detector that will be trained, if known.
        decode: read every image file; otherwise only check that it exists.
        workers: processes that read image files; 0 reads them in this one.
        progress: called with the number of image files read, and of all.
    """
    source = str(annotations)
    packer = Packer()
    try:
        content = examine_content(read_content(annotations, packer=packer), source=source, packer=packer)
    except AnnotationError as error:
        what, _, rest = str(error).partition(" | where: ")
        where, _, got = rest.partition(" | got ")
        unreadable = Finding("file_unreadable", where, f"{what}: {got}")
        findings = [Findings(kind="file_unreadable", count=1, examples=(unreadable,))]
        return CheckedSplit(
            name=name,
            annotations=source,
            num_images=0,
            num_annotations=0,
            categories={},
            findings=findings,
            image_paths={},
            folder=str(images),
        )
    findings = list(content.findings)
    image_paths: dict[bytes, str] = {}
    unlisted: list[str] = []
    kinds = {one.kind for one in findings}
    if "structure" not in kinds:
        findings += _examine_use(content, num_queries)
        table = content.images
        named = np.flatnonzero([name != "" for name in table.names]).tolist()
        names = [table.names[row] for row in named]
        if names or kinds.isdisjoint({"id_malformed", "file_name_malformed"}):  # which are why there are no names
            files = examine_files(images, table.ids[named], names, source=source)
            findings += files
        else:
            files = []
        missing = [names[row] for one in files if one.kind == "file_missing" for row in one.rows.tolist()]
        misspelt = {file for file, _ in near_misses(images, missing).values()}
        unlisted = [name for name in unlisted_files(images, names) if name not in misspelt]
        if decode:
            absent = {row for one in files if one.kind in ("path_outside", "file_missing") for row in one.rows.tolist()}
            files_to_open = [
                (str(Path(images, name)), tuple(table.sizes[row].tolist()), int(table.ids[row]))
                for index, (row, name) in enumerate(zip(named, names, strict=True))
                if index not in absent
            ]
            more, image_paths = _examine_images(_ImageFiles(files_to_open), workers, progress)
            findings += more
    return CheckedSplit(
        name=name,
        annotations=source,
        num_images=len(content.images.ids),
        num_annotations=len(content.annotations.ids),
        categories=content.categories,
        findings=[*_merge(findings), *_unlisted(source, images, unlisted)],
        image_paths=image_paths,
        folder=str(Path(images).resolve()),
        unlisted=unlisted,
    )


def compare_splits(train: CheckedSplit, val: CheckedSplit) -> tuple[CheckedSplit, CheckedSplit]:
    """Return both splits, the second one with the findings about the two together.

    In a folder of both, the files that one split does not list and the other does are no finding.
    """
    if train.folder == val.folder:
        both_lack = sorted(set(train.unlisted) & set(val.unlisted))
        train, val = (
            replace(
                split,
                unlisted=both_lack,
                findings=[
                    *(one for one in split.findings if one.kind != "image_not_listed"),
                    *_unlisted(split.annotations, split.folder, both_lack),
                ],
            )
            for split in (train, val)
        )
    both = sorted(train.image_paths.keys() & val.image_paths.keys(), key=val.image_paths.__getitem__)
    shared = findings_of(
        "shared_picture",
        np.ones(len(both), np.bool_),
        lambda i: (f"file={val.image_paths[both[i]]}", f"the bytes of {train.image_paths[both[i]]}"),
    )
    other = findings_of(
        "category_mismatch",
        np.array([dict(train.categories) != dict(val.categories)]),
        lambda _: (
            f"file={val.annotations} key=categories",
            *different_categories(val.categories, train.categories),
        ),
    )
    return train, replace(val, findings=[*val.findings, *other, *shared])


def _unlisted(source: str, folder: Path | str, files: Sequence[str]) -> list[Findings]:
    examples = tuple(Finding("image_not_listed", f"file={source} folder={folder}", name) for name in files[:EXAMPLES])
    return [Findings(kind="image_not_listed", count=len(files), examples=examples)] if files else []


_REFERENCE_FAULTS = {"id_malformed", "reference_malformed", "unknown_image", "unknown_category"}
"""Kinds that leave open which image and category an annotation belongs to."""


class _ImageFiles(Dataset[tuple[list[Finding], bytes]]):
    """Image files, their stated (h, w) and image ids; each item is the findings, and a digest of the bytes."""

    def __init__(self, files: Sequence[tuple[str, Size, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[list[Finding], bytes]:
        path, size, image_id = self.files[index]
        _, findings = examine_image(path, size=size if min(size) > 0 else None, image_id=image_id)
        try:
            return findings, hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
        except OSError:
            return findings, b""


def _examine_images(
    image_files: _ImageFiles, workers: int, progress: Callable[[int, int], None]
) -> tuple[list[Findings], dict[bytes, str]]:
    """Return the findings about image files, and the path of each of them by its digest."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    paths: dict[bytes, str] = {}
    loader = DataLoader(image_files, batch_size=8, num_workers=workers, collate_fn=list)
    opened: Iterator[tuple[list[Finding], bytes]] = (item for batch in loader for item in batch)
    for number, ((path, _, image_id), (findings, digest)) in enumerate(zip(image_files.files, opened, strict=True)):
        first = paths.setdefault(digest, path) if digest else path
        if first != path:
            again = Finding("duplicate_picture", f"file={path} image_id={image_id}", f"the bytes of {first}")
            findings.append(again)
        for one in findings:
            by_kind[one.kind].append(one)
        progress(number + 1, len(image_files))
    grouped = [
        Findings(kind=kind, count=len(every), examples=tuple(every[:EXAMPLES])) for kind, every in by_kind.items()
    ]
    return grouped, paths


def _examine_use(content: Content, num_queries: int | None) -> list[Findings]:
    """Return what is allowed and rarely intended: classes and images without boxes, gaps, more boxes than queries."""
    images, table, names = content.images, content.annotations, content.categories
    ids = sorted(names)
    file = f"file={content.source}"
    trained = table.has_box & table.clipped.is_target & ~table.is_crowd & (table.categories >= 0)
    boxes = np.bincount(table.images[trained], minlength=len(images.ids))
    crowds = np.bincount(table.images[table.is_crowd & (table.images >= 0)], minlength=len(images.ids))
    per_category = np.bincount(table.categories[trained], minlength=len(ids))
    # An annotation with a fault of its own is not missed in its image and its category as well.
    faulty = ~trained & ~table.is_crowd & (table.images >= 0)
    per_image = boxes + np.bincount(table.images[faulty], minlength=len(images.ids))
    per_category += np.bincount(table.categories[faulty & (table.categories >= 0)], minlength=len(ids))
    is_known = not {one.kind for one in content.findings} & _REFERENCE_FAULTS
    listed = [names[i] for i in ids]
    gaps = np.array([bool(ids) and ids[-1] - ids[0] + 1 != len(ids)])
    findings = [
        *findings_of(
            "category_gaps", gaps, lambda _: (f"{file} key=categories", f"{len(ids)} ids from {ids[0]} to {ids[-1]}")
        ),
        *findings_of(
            "category_unused",
            is_known & (per_category == 0),
            lambda i: (f"{file} category_id={ids[i]}", repr(listed[i])),
        ),
        *findings_of(
            "duplicate_category_name",
            np.array([listed.index(name) < index for index, name in enumerate(listed)], dtype=np.bool_),
            lambda i: (f"{file} category_id={ids[i]}", repr(listed[i])),
        ),
        *findings_of(
            "image_without_boxes",
            is_known & (per_image == 0) & (crowds == 0),
            lambda i: (f"{file} image_id={images.ids[i]}",),
        ),
        *findings_of(
            "image_crowd_only",
            is_known & (per_image == 0) & (crowds > 0),
            lambda i: (f"{file} image_id={images.ids[i]}",),
        ),
    ]
    if num_queries is not None:
        findings += more_boxes_than_queries(boxes, images.ids.tolist(), num_queries, file)
    return findings


def _merge(findings: Sequence[Findings]) -> list[Findings]:
    """Return one entry for each kind."""
    by_kind: dict[str, list[Findings]] = defaultdict(list)
    for one in findings:
        by_kind[one.kind].append(one)
    return [
        Findings(
            kind=kind,
            count=sum(one.count for one in every),
            examples=tuple(example for one in every for example in one.examples)[:EXAMPLES],
        )
        for kind, every in by_kind.items()
    ]
