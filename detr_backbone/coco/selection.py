"""Reproducible selection of images of a COCO dataset.

Conditions come first: named images, images with objects of some categories or areas. Of the remaining images, `count`
or `share` takes the first ones of an order that a seed decides. The order depends on neither of them, so with the same
seed and conditions 500 images are among the 1,000.

Unless `balanced`, an image's rank in the order is a hash of the seed and its id. So the draw is the same on every
machine and for every order of the records, and in a dataset that grows, new images may push old ones out of the first
500, but the order of two old ones never changes. Images with new ids are drawn anew. A balanced order depends on the
objects of all remaining images.
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.typed_arrays import BoolArray, IntArray
from detr_backbone.errors import ConfigError

_NAMED = 5  # unknown entries that an error names


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """A selection of images of a dataset; without any option, all of them.

    Objects are annotations that are not crowds. An image is taken with all its annotations.

    Args:
        image_ids: only these images.
        image_list: only the images in this text file, one file name or image id per line.
        categories: only images with an object of one of these categories, given by name or id; as id:3 or name:3 if a
            category is named by a number.
        min_area: only images with an object of at least this area in square pixels, of `categories` where they are set.
        max_area: only images with an object of a smaller area than this; the same object as for `min_area`.
        count: the number of images to draw from the remaining ones.
        share: the fraction of them instead, above 0 and at most 1, rounded to whole images, at least one.
        seed: of the draw.
        balanced: draw in turn for the category with the fewest drawn images, the rarest first.
        drop_unused_categories: leave out categories without annotations in the subset, which renumbers the labels; a
            detector that was trained on the whole dataset no longer fits.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    image_ids: tuple[int, ...] = ()
    image_list: str = ""
    categories: tuple[int | str, ...] = ()
    min_area: float = 0.0
    max_area: float | None = None
    count: int | None = None
    share: float | None = None
    seed: int = 0
    balanced: bool = False
    drop_unused_categories: bool = False

    def __post_init__(self) -> None:
        for key, fits, expected in (
            ("min_area", self.min_area >= 0, "at least 0"),
            ("max_area", self.max_area is None or self.max_area > self.min_area, "above `subset.min_area`"),
            ("count", self.count is None or self.count >= 1, "at least 1"),
            ("share", self.share is None or 0 < self.share <= 1, "above 0 and at most 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(f"`subset.{key}` must be {expected}, got {getattr(self, key)}")
        for key, other in (("image_ids", "image_list"), ("count", "share")):
            if getattr(self, key) and getattr(self, other):
                raise ConfigError(
                    f"`subset.{key}` and `subset.{other}` exclude each other, got {getattr(self, key)} and "
                    f"{getattr(self, other)}"
                )
        for key in ("seed", "balanced"):
            if getattr(self, key) and self.count is None and self.share is None:
                raise ConfigError(
                    f"`subset.{key}` decides what `subset.count` or `subset.share` draws: set one of them, got "
                    f"{getattr(self, key)} alone"
                )

    @property
    def in_words(self) -> str:
        """The options that are set, in words.

        >>> SubsetConfig(categories=("cat", 18), max_area=1024, count=500).in_words
        'with cat or 18, areas from 0 to 1024, seed 0'
        """
        limit = "" if self.max_area is None else f" to {self.max_area:g}"
        return ", ".join(
            words
            for words, is_set in (
                (f"{len(self.image_ids)} ids", self.image_ids),
                (f"listed in {self.image_list}", self.image_list),
                (f"with {' or '.join(map(str, self.categories))}", self.categories),
                (f"areas from {self.min_area:g}{limit}", self.min_area or limit),
                ("balanced", self.balanced),
                (f"seed {self.seed}", self.count or self.share),
                ("unused categories dropped", self.drop_unused_categories),
            )
            if is_set
        )


def choose_images(annotations: CocoAnnotations, config: SubsetConfig) -> IntArray:
    """Return the indices of the images that a configuration takes, ascending.

    Raises:
        ConfigError: an image or category is unknown; no image remains, or fewer than `count`.
    """
    remaining = np.ones(len(annotations.image_ids), dtype=np.bool_)
    if config.image_ids or config.image_list:
        remaining[:] = False
        remaining[indices_of_images(annotations, config.image_ids or _listed(annotations, config.image_list))] = True
    objects = ~annotations.is_crowd & (annotations.areas >= config.min_area)
    if config.max_area is not None:
        objects &= annotations.areas < config.max_area
    if config.categories:
        objects &= np.isin(annotations.labels, _labels(annotations, config.categories))
    if config.categories or config.min_area or config.max_area is not None:
        remaining &= np.bincount(annotations.image_index[objects], minlength=len(remaining)) > 0
    indices = np.flatnonzero(remaining)
    count = config.count or (len(indices) if config.share is None else max(1, round(config.share * len(indices))))
    if not len(indices) or count > len(indices):
        raise ConfigError(
            f"subset has {'too few' if len(indices) else 'no'} images | where: file={annotations.source} key=subset | "
            f"got {len(indices)} of {len(remaining)} ({config.in_words}) expected {count or 1} or more"
        )
    if count < len(indices):
        keys = [_key(config.seed, image_id) for image_id in annotations.image_ids[indices].tolist()]
        order = indices[np.argsort(np.array(keys, dtype=np.uint64), kind="stable")]
        indices = np.sort((_balanced(order, annotations, objects, count) if config.balanced else order)[:count])
    return indices


def _key(seed: int, image_id: int) -> int:
    """Return a reproducible pseudo-random number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {image_id}".encode(), digest_size=8).digest(), "big")


def _balanced(order: IntArray, annotations: CocoAnnotations, objects: BoolArray, count: int) -> IntArray:
    """Return an order in which the first `count` images balance the categories; images without objects come last."""
    has_category = np.zeros((len(annotations.image_ids), len(annotations.category_ids)), dtype=np.bool_)
    has_category[annotations.image_index[objects], annotations.labels[objects]] = True
    waiting = [iter(order[column].tolist()) for column in has_category[order].T]
    available = has_category[order].sum(axis=0)
    drawn = np.zeros(len(available), dtype=np.int64)
    exhausted = available == 0
    chosen: dict[int, None] = {}  # an ordered set
    while len(chosen) < count and not exhausted.all():
        pace = np.where(exhausted, np.iinfo(np.int64).max, drawn * (len(order) + 1) + available)
        category = int(pace.argmin())
        image = next((image for image in waiting[category] if image not in chosen), None)
        if image is None:
            exhausted[category] = True
        else:
            chosen[image] = None
            drawn += has_category[image]
    remaining = order[~np.isin(order, list(chosen))]
    return np.concatenate([np.array(list(chosen), dtype=np.int64), remaining])


def indices_of_images(annotations: CocoAnnotations, image_ids: Sequence[int]) -> IntArray:
    """Return the indices of images, ascending, each once.

    Raises:
        ConfigError: an id is unknown.
    """
    known = annotations.image_ids.tolist()
    wanted = sorted(set(image_ids))
    _refuse_unknown("image ids", sorted(set(wanted).difference(known)), known, annotations, "image_ids")
    return np.searchsorted(annotations.image_ids, wanted)


def _listed(annotations: CocoAnnotations, path: str) -> list[int]:
    """Return the ids of the images that a text file lists; a line that is no file name may be an id."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ConfigError(
            f"image list cannot be read | where: file={path} key=subset.image_list | got {error}"
        ) from error
    ids, names = annotations.image_ids.tolist(), annotations.file_names.tolist()
    ids_by_name: dict[str, list[int]] = {}
    for image_id, name in zip(ids, names, strict=True):
        ids_by_name.setdefault(name, []).append(image_id)
    known = set(ids)
    listed = {
        line: ids_by_name.get(line) or ([int(line)] if line.isdecimal() and int(line) in known else [])
        for line in filter(None, map(str.strip, lines))
    }
    _refuse_unknown("listed images", [line for line in listed if not listed[line]], names, annotations, "image_list")
    return [image_id for image_ids in listed.values() for image_id in image_ids]


def _labels(annotations: CocoAnnotations, categories: Sequence[int | str]) -> list[int]:
    """Return the labels of categories given by id or name, or as id:3 or name:3 where one is named by a number."""
    by_id = {str(category_id): label for label, category_id in enumerate(annotations.category_ids)}
    by_name = {name: label for label, name in enumerate(annotations.category_names)}
    prefixed = {f"id:{key}": label for key, label in by_id.items()} | {
        f"name:{name}": label for name, label in by_name.items()
    }
    labels = [
        {table[str(entry)] for table in (by_id, by_name, prefixed) if str(entry) in table} for entry in categories
    ]
    unknown = [entry for entry, candidates in zip(categories, labels, strict=True) if not candidates]
    _refuse_unknown("categories", unknown, [*annotations.category_ids, *by_name], annotations, "categories")
    for entry, candidates in zip(categories, labels, strict=True):
        if len(candidates) > 1:
            raise ConfigError(
                f"category is the id of one and the name of another | where: file={annotations.source} "
                f"key=subset.categories | got {entry!r} expected 'id:{entry}' or 'name:{entry}'"
            )
    return [candidates.pop() for candidates in labels]


def _refuse_unknown(
    what: str, unknown: Sequence[int | str], known: Sequence[int | str], annotations: CocoAnnotations, key: str
) -> None:
    if unknown:
        named = ", ".join(f"{value!r}{_nearest(value, known)}" for value in unknown[:_NAMED])
        raise ConfigError(
            f"{what} are not in the dataset | where: file={annotations.source} key=subset.{key} | "
            f"got {len(unknown)} unknown: {named}{', ...' if len(unknown) > _NAMED else ''}"
        )


def _nearest(value: int | str, known: Sequence[int | str]) -> str:
    if isinstance(value, int):
        near: list[Any] = sorted((entry for entry in known if isinstance(entry, int)), key=lambda e: abs(e - value))
    else:
        near = difflib.get_close_matches(value, [entry for entry in known if isinstance(entry, str)], cutoff=0.5)
    return f" (nearest {near[0]!r})" if near else ""
