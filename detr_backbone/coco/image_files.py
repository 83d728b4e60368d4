"""The image files that an annotation file names: whether they exist, below their folder, each of them once."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from detr_backbone.coco.findings import Finding, Findings, findings_of
from detr_backbone.coco.near_misses import near_misses, summary_of
from detr_backbone.coco.typed_arrays import IntArray

ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".jp2", ".j2k", ".jpx"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif"),
    )
)
"""Endings of files that are images."""


def examine_files(folder: Path | str, image_ids: IntArray, names: Sequence[str], *, source: str) -> list[Findings]:
    """Return the faults of the files that images [I] name.

    Folders are listed once instead of a call for every file; only a name that its folder does not list, such as that
    of a link, is resolved.

    Args:
        folder: the folder of the images.
        image_ids: int64 [I].
        names: the file name of each image, relative to the folder.
        source: the annotation file, as findings give it.
    """
    if not names:
        empty = Finding("no_images", f"file={source} key=images", "[]")
        return [Findings(kind="no_images", count=1, examples=(empty,))]
    root = os.path.realpath(folder)
    listed: dict[str, frozenset[str]] = {}
    outside, missing = np.zeros((2, len(names)), dtype=np.bool_)
    for index, name in enumerate(names):
        parent, _, base = name.rpartition("/")
        if parent not in listed:
            listed[parent] = _files(root, parent, starts_at_root=name.startswith("/"))
        if base not in listed[parent]:
            real = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 - five times faster than Path
            outside[index] = name.startswith("/") or not _is_below(root, real)
            missing[index] = not outside[index] and not os.path.isfile(real)  # noqa: PTH113
    rows: dict[str, int] = {}
    first = np.array([rows.setdefault(os.path.normpath(name), row) for row, name in enumerate(names)], dtype=np.int64)
    absent = [names[row] for row in np.flatnonzero(missing).tolist()]
    near = summary_of(near_misses(folder, absent)) if absent else ""

    def where(row: int) -> str:
        return f"file={source} image_id={image_ids[row]} key=file_name"

    return [
        *findings_of("path_outside", outside, lambda i: (where(i), repr(names[i]), f"a file below {root}")),
        *findings_of(
            "file_missing",
            missing,
            lambda _: (
                f"file={source} key=file_name folder={folder}",
                f"{len(absent)} of {len(names)} missing, first {absent[:5]}" + (f"; {near}" if near else ""),
            ),
        ),
        *findings_of(
            "duplicate_file",
            first != np.arange(len(names)),
            lambda i: (where(i), f"{names[i]!r} again after image_id={image_ids[first[i]]}"),
        ),
        *findings_of(
            "file_name_not_text",
            np.array([not _is_text(name) for name in names], dtype=np.bool_),
            lambda i: (where(i), repr(names[i])),
        ),
    ]


def unlisted_files(folder: Path | str, names: Iterable[str]) -> list[str]:
    """Return the image files below a folder, by their endings, that are not among `names`, as paths relative to it."""
    listed = {os.path.normpath(name) for name in names}
    root = Path(os.path.realpath(folder))
    paths = (path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    return sorted({str(path.relative_to(root)) for path in paths} - listed)


def _files(root: str, parent: str, *, starts_at_root: bool) -> frozenset[str]:
    """Return the names of the regular files in a folder; none if it is missing or not below the root."""
    folder = os.path.realpath(os.path.join(root, parent))  # noqa: PTH118
    if starts_at_root or not _is_below(root, folder):
        return frozenset()
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return frozenset()


def _is_below(root: str, path: str) -> bool:
    return os.path.commonpath([root, path]) == root


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding
        return False
    return True
