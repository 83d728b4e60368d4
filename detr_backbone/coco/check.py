"""A sweep of a whole dataset before anything is trained on it: every fault at once, counted, with the first offenders.

The rules are those by which loading refuses, drops or clips; on top of them every picture is decoded, and what is
allowed but rarely meant is told.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from detr_backbone.coco.annotations import read_content
from detr_backbone.coco.check_report import CheckedSplit
from detr_backbone.coco.files import examine_files
from detr_backbone.coco.findings import EXAMPLES, Finding, Findings, found
from detr_backbone.coco.images import examine_image
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
    """Everything that is worth knowing about one annotation file and its pictures.

    Args:
        images: the folder of the pictures.
        annotations: the annotation file.
        name: what the report calls the two.
        num_queries: of the detector that will be trained, if that is known.
        decode: open every picture; otherwise only look whether it is there.
        workers: processes that decode pictures; 0 decodes in this one.
        progress: called with the number of pictures that were opened, and of all.
    """
    source = str(annotations)
    packer = Packer()
    try:
        content = examine_content(read_content(annotations, packer=packer), source=source, packer=packer)
    except AnnotationError as error:
        unreadable = Finding("file_unreadable", f"file={source}", str(error).replace(f"file={source} ", ""))
        findings = [Findings(kind="file_unreadable", count=1, examples=(unreadable,))]
        return CheckedSplit(
            name=name,
            annotations=source,
            num_images=0,
            num_annotations=0,
            categories={},
            findings=findings,
            pictures={},
        )
    findings = list(content.findings)
    pictures: dict[bytes, str] = {}
    if not any(one.kind == "structure" for one in findings):
        findings += _examine_use(content, num_queries)
        table = content.images
        named = np.flatnonzero([name != "" for name in table.names]).tolist()
        names = [table.names[row] for row in named]
        files = examine_files(images, table.ids[named], names, source=source)
        findings += files
        if decode:
            absent = {row for one in files if one.kind in ("path_outside", "file_missing") for row in one.rows.tolist()}
            files_to_open = [
                (str(Path(images, name)), tuple(table.sizes[row].tolist()), int(table.ids[row]))
                for place, (row, name) in enumerate(zip(named, names, strict=True))
                if place not in absent
            ]
            more, pictures = _examine_pictures(_Pictures(files_to_open), workers, progress)
            findings += more
    return CheckedSplit(
        name=name,
        annotations=source,
        num_images=len(content.images.ids),
        num_annotations=len(content.annotations.ids),
        categories=content.categories,
        findings=_merged(findings),
        pictures=pictures,
    )


def compare_splits(train: CheckedSplit, val: CheckedSplit) -> CheckedSplit:
    """The validation split, with what is wrong with it beside the training split."""
    both = sorted(train.pictures.keys() & val.pictures.keys(), key=val.pictures.__getitem__)
    shared = found(
        "shared_picture",
        np.ones(len(both), np.bool_),
        lambda i: (f"file={val.pictures[both[i]]}", f"the bytes of {train.pictures[both[i]]}"),
    )
    other = found(
        "category_mismatch",
        np.array([dict(train.categories) != dict(val.categories)]),
        lambda _: (f"file={val.annotations} key=categories", str(dict(val.categories)), str(dict(train.categories))),
    )
    return CheckedSplit(**{**vars(val), "findings": [*val.findings, *other, *shared]})


class _Pictures(Dataset[tuple[list[Finding], bytes]]):
    """Picture files, their stated (h, w) and image ids; each item is what is found, and a digest of the bytes."""

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


def _examine_pictures(
    pictures: _Pictures, workers: int, progress: Callable[[int, int], None]
) -> tuple[list[Findings], dict[bytes, str]]:
    """What is wrong with the picture files, and the path of each of them by its digest."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    paths: dict[bytes, str] = {}
    loader = DataLoader(pictures, batch_size=8, num_workers=workers, collate_fn=list)
    opened: Iterator[tuple[list[Finding], bytes]] = (item for batch in loader for item in batch)
    for number, ((path, _, image_id), (findings, digest)) in enumerate(zip(pictures.files, opened, strict=True)):
        first = paths.setdefault(digest, path) if digest else path
        if first != path:
            again = Finding("duplicate_picture", f"file={path} image_id={image_id}", f"the bytes of {first}")
            findings.append(again)
        for one in findings:
            by_kind[one.kind].append(one)
        progress(number + 1, len(pictures))
    grouped = [
        Findings(kind=kind, count=len(every), examples=tuple(every[:EXAMPLES])) for kind, every in by_kind.items()
    ]
    return grouped, paths


def _examine_use(content: Content, num_queries: int | None) -> list[Findings]:
    """What is allowed and yet worth a look: classes and images without boxes, gaps, more boxes than queries."""
    images, table, names = content.images, content.annotations, content.categories
    ids = sorted(names)
    file = f"file={content.source}"
    trained = table.has_box & table.clipped.is_target & ~table.is_crowd & (table.categories >= 0)
    boxes = np.bincount(table.images[trained], minlength=len(images.ids))
    crowds = np.bincount(table.images[table.is_crowd & (table.images >= 0)], minlength=len(images.ids))
    per_category = np.bincount(table.categories[trained], minlength=len(ids))
    listed = [names[i] for i in ids]
    gaps = np.array([bool(ids) and ids[-1] - ids[0] + 1 != len(ids)])
    findings = [
        *found(
            "category_gaps", gaps, lambda _: (f"{file} key=categories", f"{len(ids)} ids from {ids[0]} to {ids[-1]}")
        ),
        *found("category_unused", per_category == 0, lambda i: (f"{file} category_id={ids[i]}", repr(listed[i]))),
        *found(
            "duplicate_category_name",
            np.array([listed.index(name) < place for place, name in enumerate(listed)], dtype=np.bool_),
            lambda i: (f"{file} category_id={ids[i]}", repr(listed[i])),
        ),
        *found("image_without_boxes", (boxes == 0) & (crowds == 0), lambda i: (f"{file} image_id={images.ids[i]}",)),
        *found("image_crowd_only", (boxes == 0) & (crowds > 0), lambda i: (f"{file} image_id={images.ids[i]}",)),
    ]
    if num_queries is not None:
        findings += more_boxes_than_queries(boxes, images.ids.tolist(), num_queries, file)
    return findings


def _merged(findings: Sequence[Findings]) -> list[Findings]:
    """One entry for each kind."""
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
