"""File names that nearly match: which change of a missing name gives a file that exists."""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from detr_backbone.coco.annotations import read_json
from detr_backbone.errors import AnnotationError, DataError

_CHANGES: Mapping[str, Callable[[str], str]] = {
    "slashes for backslashes": lambda name: name.replace("\\", "/"),
    "%-escapes decoded": unquote,
    "Unicode composed or decomposed alike": lambda name: unicodedata.normalize("NFC", name),
    "the ending in another case": lambda name: os.path.splitext(name)[0] + os.path.splitext(name)[1].lower(),  # noqa: PTH122
    "another folder": lambda name: name.rpartition("/")[2],
}
"""Each makes two names equal, one in the annotation file and one on the disk, that differ in this only."""
TOGETHER = "several of these changes"


def near_misses(folder: Path | str, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return, of names without a file, those that one change or all of them together give a file.

    A change that fits several files is none.

    Args:
        folder: the folder of the images.
        names: file names relative to it, none of which exists.

    Returns:
        By name, the path of the file relative to the folder, and the change.
    """
    root = Path(folder)
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    changes = {**_CHANGES, TOGETHER: _all_changes}
    found: dict[str, tuple[str, str]] = {}
    for change, normalise in changes.items():
        left = [name for name in names if name not in found]
        if not left:
            break
        keys = [normalise(file) for file in files]
        counts = Counter(keys)
        unique = {key: file for key, file in zip(keys, files, strict=True) if counts[key] == 1}
        found |= {name: (unique[key], change) for name in left if (key := normalise(name)) in unique}
    return found


def summary_of(found: Mapping[str, tuple[str, str]]) -> str:
    """Return how many files which change finds, in words; empty for none."""
    counts = Counter(change for _, change in found.values())
    return ", ".join(f"{count} would be found with {change}" for change, count in counts.most_common())


def rename_files(annotations: Path | str, folder: Path | str, output: Path | str) -> dict[str, str]:
    """Write a copy of an annotation file with the file names that nearly match, and return the new name of each.

    Args:
        annotations: the COCO file, which stays as it is.
        folder: of the images.
        output: the copy to write.

    Raises:
        AnnotationError: the file cannot be read.
        DataError: `output` exists, or no name can be corrected.
    """
    output = Path(output)
    if output.exists():
        raise DataError(f"output exists | where: file={output} | fix: choose another, or remove it")
    content = read_json(annotations)
    images: Sequence[dict[str, object]] = content.get("images", []) if isinstance(content, dict) else []
    if not all(isinstance(image, dict) and isinstance(image.get("file_name"), str) for image in images):
        raise AnnotationError(f"image has no file name | where: file={annotations} key=file_name")
    missing = [name for image in images if not Path(folder, name := str(image["file_name"])).is_file()]
    found = near_misses(folder, missing)
    if not found:
        raise DataError(
            f"no file name nearly matches | where: file={annotations} folder={folder} | got {len(missing)} missing"
        )
    for image in images:
        name = str(image["file_name"])
        image["file_name"] = found[name][0] if name in found else name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content), encoding="utf-8")
    return {name: file for name, (file, _) in found.items()}


def _all_changes(name: str) -> str:
    for normalise in _CHANGES.values():
        name = normalise(name)
    return name
