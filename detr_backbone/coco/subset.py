"""A subset of a COCO dataset, as annotations in memory or as a dataset of its own on disk."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations, parse_annotations, read_json, refuse
from detr_backbone.coco.image_files import examine_files
from detr_backbone.coco.selection import SubsetConfig, choose_images, indices_of_images
from detr_backbone.errors import ConfigError, DataError

_OF_IMAGES = ("image_ids", "file_names", "sizes")


def take_subset(annotations: CocoAnnotations, config: SubsetConfig) -> CocoAnnotations:
    """Return the subset of a dataset that a configuration selects; `part` of the result describes it.

    Raises:
        ConfigError: an image or category is unknown, no image remains, or fewer than `count`.

    >>> from detr_backbone.coco.annotations import parse_annotations
    >>> images = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in range(1, 101)]
    >>> categories = [{"id": 1, "name": "cat"}]
    >>> every = parse_annotations({"images": images, "annotations": [], "categories": categories}, source="x.json")
    >>> ten, three = (take_subset(every, SubsetConfig(count=count)) for count in (10, 3))
    >>> set(three.image_ids) < set(ten.image_ids), ten.part
    (True, '10 of 100 images (seed 0, ids sha256 5c637f3eec6d)')
    """
    if config == SubsetConfig():
        return annotations
    chosen = only(annotations, annotations.image_ids[choose_images(annotations, config)].tolist())
    if config.drop_unused_categories:
        chosen = _with_used_categories(chosen)
    taken = f"{len(chosen.image_ids)} of {len(annotations.image_ids)} images"
    ids = image_ids_sha256(chosen.image_ids.tolist())[:12]
    return replace(chosen, part=f"{taken} ({config.in_words}, ids sha256 {ids})")


def only(annotations: CocoAnnotations, image_ids: Sequence[int]) -> CocoAnnotations:
    """Return some images of a dataset with all their annotations, and the categories and labels of the whole dataset.

    Raises:
        ConfigError: an id is unknown.
    """
    indices = indices_of_images(annotations, image_ids)
    rows = np.flatnonzero(np.isin(annotations.image_index, indices))
    taken: dict[str, Any] = {}
    for field in fields(annotations):
        value = getattr(annotations, field.name)
        if field.name in _OF_IMAGES:
            taken[field.name] = value[indices]
        elif isinstance(value, np.ndarray):
            taken[field.name] = value[rows]
        elif hasattr(value, "take"):  # annotations of unequal length, packed
            taken[field.name] = value.take(rows)
    return replace(annotations, **taken | {"image_index": np.searchsorted(indices, annotations.image_index[rows])})


def image_ids_sha256(image_ids: Sequence[int]) -> str:
    """Return the hash of image ids in ascending order, one per line, which identifies the images of a result.

    `sort -n | sha256sum` gives the same for the ids.

    >>> image_ids_sha256([2, 1])[:12]
    'a6e2b7a04068'
    """
    return hashlib.sha256("".join(f"{image_id}\n" for image_id in sorted(image_ids)).encode()).hexdigest()


def write_subset(
    annotations: Path | str,
    output: Path | str,
    config: SubsetConfig,
    *,
    images: Path | str | None = None,
    pictures: Literal["link", "copy", "none"] = "link",
) -> dict[str, Any]:
    """Write a subset as a dataset of its own, and return its manifest.

    The folder holds annotations/NAME.json, with the selected records unchanged, with every key; the image files, in
    a folder of the same name as `images`; and manifest.json: the source and its SHA-256, the options, images and
    boxes of each category, and the hash of the image ids.

    Args:
        annotations: the COCO file of the whole dataset.
        output: the folder to write; it appears only when it is complete.
        config: the selection.
        images: the folder of the image files; needed unless `pictures` is "none".
        pictures: "link" makes hard links, which take no space and stay when the source is deleted; symbolic links would
            lead out of the folder, which `CocoDetection` refuses. "none" writes the JSON files alone.

    Raises:
        ConfigError: the options choose nothing, everything, or contradict each other.
        AnnotationError: the annotation file contradicts itself, the COCO format, or the folder.
        DataError: `output` is not empty, image files are missing, or links cannot be made.
    """
    source, output = Path(annotations), Path(output)
    if config == SubsetConfig():
        raise ConfigError("a subset needs an option that says which images, such as `count`, got none")
    if (images is None) != (pictures == "none"):
        raise ConfigError(f"`images` must be given unless `pictures` is 'none', got {images} and {pictures!r}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"output holds something | where: folder={output} | fix: choose another, or remove it")
    content = read_json(source)
    whole = parse_annotations(content, source=str(source))
    chosen = take_subset(whole, config)
    manifest = {
        "source": {
            "annotations": str(source),
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "images": len(whole.image_ids),
        },
        "options": asdict(config),
        **_counts(chosen),
        "image_ids_sha256": image_ids_sha256(chosen.image_ids.tolist()),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as unfinished:
        folder = Path(unfinished) / "subset"
        (folder / "annotations").mkdir(parents=True)
        (folder / "annotations" / source.name).write_text(json.dumps(_records(content, chosen)), encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if images is not None:
            names = chosen.file_names.tolist()
            refuse(examine_files(Path(images), chosen.image_ids, names, source=chosen.source))
            _take_image_files(Path(images).resolve(), folder, names, link=pictures == "link")
        folder.rename(output)
    return manifest


def _records(content: dict[str, Any], chosen: CocoAnnotations) -> dict[str, Any]:
    """Return a file's content with the selected records alone, unchanged."""
    image_ids, category_ids = set(chosen.image_ids.tolist()), set(chosen.category_ids)
    return {
        **content,
        "images": [record for record in content["images"] if record["id"] in image_ids],
        "annotations": [record for record in content["annotations"] if record["image_id"] in image_ids],
        "categories": [record for record in content["categories"] if record["id"] in category_ids],
    }


def _counts(chosen: CocoAnnotations) -> dict[str, Any]:
    """Return the number of images, boxes and crowds, and for each category that of boxes and of images with it."""
    boxes = ~chosen.is_crowd
    pairs = np.unique(np.stack([chosen.labels[boxes], chosen.image_index[boxes]]), axis=1)
    count = len(chosen.category_names)
    of_images, of_boxes = np.bincount(pairs[0], minlength=count), np.bincount(chosen.labels[boxes], minlength=count)
    per_class = zip(chosen.category_names, of_images.tolist(), of_boxes.tolist(), strict=True)
    return {
        "images": len(chosen.image_ids),
        "boxes": int(boxes.sum()),
        "crowds": int(chosen.is_crowd.sum()),
        "per_class": {name: {"images": images, "boxes": number} for name, images, number in per_class},
    }


def _take_image_files(source: Path, folder: Path, names: Sequence[str], *, link: bool) -> None:
    for name in dict.fromkeys(names):  # images may share a file
        taken = folder / source.name / name
        taken.parent.mkdir(parents=True, exist_ok=True)
        original = (source / name).resolve()
        if not link:
            shutil.copy2(original, taken)
            continue
        try:
            os.link(original, taken)
        except OSError as error:
            raise DataError(
                f"hard link cannot be made | where: file={original} | got {error.strerror} | fix: copy the files, "
                "or write to the disk that holds them"
            ) from error


def _with_used_categories(annotations: CocoAnnotations) -> CocoAnnotations:
    used, labels = np.unique(annotations.labels, return_inverse=True)
    if not len(used):
        raise ConfigError(
            f"subset has no annotations, and so no categories | where: file={annotations.source} "
            "key=subset.drop_unused_categories | got true expected false"
        )
    return replace(
        annotations,
        category_ids=tuple(annotations.category_ids[label] for label in used),
        category_names=tuple(annotations.category_names[label] for label in used),
        labels=labels.astype(np.int64),
    )
