"""Which files of a folder are pictures, and what is left out, with the reason; nothing is left out in silence."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from detr_backbone.coco.annotations import CocoAnnotations, parse_annotations, read_json
from detr_backbone.coco.categories import refuse_other_categories
from detr_backbone.coco.findings import KINDS
from detr_backbone.coco.image_files import examine_files
from detr_backbone.coco.images import readable_formats
from detr_backbone.errors import DataError

_NAMED_AS_PICTURES = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".pdf", ".raf", ".raw", ".svg"}
)
"""Endings of pictures beside those that Pillow registers."""


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The pictures to detect objects in.

    Attributes:
        folder: to which the names are relative.
        names: of the files, with "/" between folders, in order.
        skipped: why a file that should be a picture is none, by its name.
        others: how many files have another ending that no picture has, by ending.
        folders: how many folders were not entered.
        image_ids, sizes: the id and the stated (h, w) of each name, where an annotation file gives them.
    """

    folder: Path
    names: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    folders: int = 0
    image_ids: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def find_images(path: Path | str, *, recursive: bool = False) -> ImageFiles:
    """Return the pictures of a folder in the order of their names, or the one file.

    A file counts as a picture by its ending, or else by its first bytes. Hidden copies that macOS leaves (`._NAME`) and
    icons are skipped. The pictures are not decoded, so that a damaged one is still among `names`.

    Args:
        path: a picture, or a folder.
        recursive: take the folders in it too.

    Raises:
        DataError: there is no such file or folder, or no picture in it.
    """
    path = Path(path)
    if path.is_file():
        return ImageFiles(folder=path.parent, names=(path.name,))
    if not path.is_dir():
        raise DataError(
            f"there are no pictures | where: file={path} | got no such file or folder | fix: give a picture or a folder"
        )
    names, folders = _files(path, recursive=recursive)
    pictures, skipped, others = [], {}, Counter[str]()
    endings = Image.registered_extensions().keys() | _NAMED_AS_PICTURES
    for name in names:
        ending = Path(name).suffix.lower()
        is_named, is_file = ending in endings, (path / name).is_file()
        if is_named and not is_file:
            skipped[name] = "a link to no file, or no regular file"
        elif is_named and name.rpartition("/")[2].startswith("._"):
            skipped[name] = "metadata of macOS, no picture"
        elif ending in (".pdf", ".ico", ".icns", ".svg"):
            skipped[name] = f"{ending[1:].upper()}, which is not read"
        elif is_named or (is_file and _begins_like_a_picture(path / name)):
            pictures.append(name)
        else:
            others[ending or "no ending"] += 1
    if not pictures:
        fix = f" | fix: --recursive takes the {folders} folders in it" if folders else ""
        raise DataError(
            f"there are no pictures | where: file={path} | got {len(skipped)} skipped, {others.total()} others{fix}"
        )
    return ImageFiles(folder=path, names=tuple(pictures), skipped=skipped, others=others, folders=folders)


def read_image_list(folder: Path | str, annotations: Path | str, categories: Mapping[int, str]) -> ImageFiles:
    """Return the pictures that a COCO file lists, with their ids; it may be a test file, without `annotations`.

    Args:
        folder: of the pictures.
        annotations: the file. Pictures in the folder that it does not list are left out.
        categories: category id -> name of the detector; the file must have the same, or none.

    Raises:
        AnnotationError: the file contradicts itself or the COCO format.
        ConfigError: its categories are others than the detector's.
        DataError: none of its files exists, or a name leads out of the folder.
    """
    content = read_json(annotations)
    if isinstance(content, dict):
        default = [{"id": category_id, "name": name} for category_id, name in categories.items()]
        content = {"annotations": [], "categories": default} | content
    listed: CocoAnnotations = parse_annotations(content, source=str(annotations))
    own = dict(zip(listed.category_ids, listed.category_names, strict=True))
    refuse_other_categories(own, categories, file=str(annotations))
    names = listed.file_names.tolist()
    skipped = {name: "missing" for name in names if not (Path(folder) / name).is_file()}
    for finding in examine_files(folder, listed.image_ids, names, source=str(annotations)):
        is_partial = finding.kind == "file_missing" and len(skipped) < len(names)
        if KINDS[finding.kind].severity == "error" and not is_partial:
            raise finding.examples[0].error
    return ImageFiles(
        folder=Path(folder),
        names=tuple(name for name in names if name not in skipped),
        skipped=skipped,
        image_ids=dict(zip(names, listed.image_ids.tolist(), strict=True)),
        sizes={name: (h, w) for name, (h, w) in zip(names, listed.sizes.tolist(), strict=True)},
    )


def _files(folder: Path, *, recursive: bool) -> tuple[list[str], int]:
    """Return the names of the files of a folder, and how many folders in it were not entered."""
    if not recursive:
        entries = list(folder.iterdir())
        return sorted(entry.name for entry in entries if not entry.is_dir()), sum(entry.is_dir() for entry in entries)
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found), 0


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=readable_formats()):
            return True
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
