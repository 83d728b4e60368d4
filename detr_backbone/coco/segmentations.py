"""Polygons and masks of the annotations, checked before they reach C code, and packed into a few arrays.

pycocotools does not check its arguments: a vertex that is NaN ends the process, and runs that do not fill a mask let it
read uninitialised memory. So `examine_segmentations` checks everything before.

Source of the compressed form: `rleToString` of the COCO API, https://github.com/cocodataset/cocoapi.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
from pycocotools import mask

from detr_backbone.coco.findings import Findings, findings_of, shortened
from detr_backbone.coco.images import MAX_PIXELS
from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray

Number = TypeVar("Number", np.float64, np.int64)

FAR = 2
"""Image sizes by which a polygon may leave its image."""
MAX_OUTLINE = 1_000_000
"""Pixels along the polygons of one annotation; pycocotools takes about a hundred bytes for each of them."""


class EncodedMask(TypedDict):
    """A mask of h x w pixels in the compressed form of the COCO API."""

    size: list[int]
    counts: bytes


class Packed(int):
    """The number of a segmentation in a `Packer`; a type that JSON does not give."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentations:
    """The segmentations of N annotations; `segmentations[i]` is the mask of annotation i, compressed.

    All of them share one list of points and one of runs, so that the workers of a DataLoader share the pages.

    Attributes:
        sizes: int64 [N, 2], the (h, w) of the annotation's image.
        points: float64 [V, 2], x and y of every vertex.
        rings: int64 [R + 1], the index in `points` at which each polygon starts, and the end of the last one.
        counts: int64 [M], the lengths of runs, by columns, background first.
        spans: int64 [N, 2], the first polygon and the one after the last, or for an encoding its part of `counts`.
        is_encoded: bool [N], True for a run-length encoding instead of polygons.
    """

    sizes: IntArray
    points: FloatArray
    rings: IntArray
    counts: IntArray
    spans: IntArray
    is_encoded: BoolArray

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> EncodedMask:
        (height, width), (start, stop) = self.sizes[index].tolist(), self.spans[index].tolist()
        encoded: EncodedMask
        if self.is_encoded[index]:
            runs = {"size": [height, width], "counts": self.counts[start:stop].tolist()}
            encoded = mask.frPyObjects(runs, height, width)
        else:
            ends = self.rings[start : stop + 1].tolist()
            rings = [self.points[a:b].ravel().tolist() for a, b in pairwise(ends)]
            encoded = mask.merge(mask.frPyObjects(rings, height, width))
        return encoded

    def take(self, rows: IntArray) -> "Segmentations":
        """Return the segmentations of some annotations; points and runs stay shared."""
        return Segmentations(
            sizes=self.sizes[rows],
            points=self.points,
            rings=self.rings,
            counts=self.counts,
            spans=self.spans[rows],
            is_encoded=self.is_encoded[rows],
        )


class Packer:
    """Collects segmentations as a file is read, so that none of them has to stay as a list of Python's numbers."""

    def __init__(self) -> None:
        self.points = array("d")
        self.rings = array("q", [0])
        self.counts = array("q")
        self.spans = array("q")
        self.sizes = array("q")  # of a run-length encoding; 0, 0 for polygons

    def pack(self, value: Any) -> Any:
        """Store a well-formed segmentation and return its number; return anything else as it is."""
        if isinstance(value, list) and value and all(map(_is_ring, value)):
            first = len(self.rings) - 1
            for ring in value:
                self.points.extend(ring)
                self.rings.append(len(self.points) // 2)
            return self._add(first, len(self.rings) - 1, (0, 0))
        if isinstance(value, dict) and _is_size(value.get("size")) and (runs := _runs(value.get("counts"))) is not None:
            first = len(self.counts)
            self.counts.extend(runs)
            return self._add(first, len(self.counts), value["size"])
        return value

    def _add(self, first: int, stop: int, size: Sequence[int]) -> Packed:
        self.spans.extend((first, stop))
        self.sizes.extend(size)
        return Packed(len(self.spans) // 2 - 1)

    def segmentations(self, values: Sequence[Any], sizes: IntArray) -> tuple[Segmentations, IntArray]:
        """Return the segmentations of N annotations in images of `sizes` [N, 2], and the [N, 2] that encodings state.

        A value that is not packed has an empty span.
        """
        numbers = np.fromiter((v if isinstance(v, Packed) else -1 for v in values), np.int64, len(values))
        spans = np.concatenate([_as_array(self.spans, np.int64).reshape(-1, 2), [[0, 0]]])[numbers]
        own_sizes = np.concatenate([_as_array(self.sizes, np.int64).reshape(-1, 2), [[0, 0]]])[numbers]
        return Segmentations(
            sizes=sizes,
            points=_as_array(self.points, np.float64).reshape(-1, 2),
            rings=_as_array(self.rings, np.int64),
            counts=_as_array(self.counts, np.int64),
            spans=spans,
            is_encoded=own_sizes[:, 0] > 0,
        ), own_sizes


def examine_segmentations(
    values: Sequence[Any], packer: Packer, sizes: IntArray, where: Callable[[int], str]
) -> tuple[list[Findings], Segmentations]:
    """Return the faults of the segmentations of N annotations, and the packed ones.

    Args:
        values: the result of `packer.pack` for each of them.
        packer: holds the packed ones.
        sizes: int64 [N, 2], the (h, w) of each annotation's image, 0 where it is not known.
        where: the location of an annotation, as findings give it.
    """
    packed = np.fromiter((isinstance(value, Packed) for value in values), np.bool_, len(values))
    missing = np.fromiter((value is None or value == [] for value in values), np.bool_, len(values))
    masks, own_sizes = packer.segmentations(values, sizes)
    known = packed & (sizes > 0).all(axis=1)
    drawable = sizes.prod(axis=1, dtype=np.float64) <= MAX_PIXELS
    encoded, drawn = known & masks.is_encoded, known & ~masks.is_encoded
    other_size = encoded & ((own_sizes != sizes).any(axis=1) | ~drawable)
    sums = np.concatenate([[0], np.cumsum(masks.counts)])[np.where(encoded[:, None], masks.spans, 0)]
    filled = sums[:, 1] - sums[:, 0]
    low, high, length = _extents(masks, np.flatnonzero(drawn & drawable))
    side = sizes.max(axis=1, initial=0)
    far = drawn & (~drawable | (low < -FAR * side) | (high > (FAR + 1) * side) | (length > MAX_OUTLINE))

    def at(index: int) -> str:
        return f"{where(index)} key=segmentation"

    limit = f"{MAX_PIXELS} pixels at most"

    def describe_far(index: int) -> tuple[str, ...]:
        if not drawable[index]:
            return at(index), f"polygons in an image of {sizes[index].tolist()}", limit
        if low[index] >= -FAR * side[index] and high[index] <= (FAR + 1) * side[index]:
            return at(index), f"{length[index]:g} pixels along its polygons", f"{MAX_OUTLINE} at most"
        bounds = f"{-FAR * side[index]} to {(FAR + 1) * side[index]}"
        return at(index), f"coordinates from {low[index]:g} to {high[index]:g}", bounds

    return [
        *findings_of("segmentation_missing", missing, lambda i: (at(i), repr(values[i]), "polygons or an encoding")),
        *findings_of(
            "segmentation_malformed",
            ~packed & ~missing,
            lambda i: (
                at(i),
                shortened(values[i]),
                "polygons of three finite points or more, or size and counts",
            ),
        ),
        *findings_of(
            "segmentation_size",
            other_size,
            lambda i: (f"{at(i)}.size", str(own_sizes[i].tolist()), f"{sizes[i].tolist()} as the image, {limit}"),
        ),
        *findings_of(
            "segmentation_counts",
            encoded & ~other_size & (filled != sizes.prod(axis=1)),
            lambda i: (f"{at(i)}.counts", f"runs of {filled[i]} pixels together", f"{sizes[i].prod()}"),
        ),
        *findings_of("segmentation_far", far, describe_far),
    ], masks


@np.errstate(over="ignore")
def _extents(masks: Segmentations, rows: IntArray) -> tuple[FloatArray, ...]:
    """Return smallest and largest coordinate of the polygons of some annotations, and their length; 0 for others."""
    low, high, length = np.zeros((3, len(masks)))
    starts, ends = masks.rings[:-1], masks.rings[1:]
    if not len(rows):
        return low, high, length
    least, most = (
        np.stack([extreme.reduceat(masks.points[:, axis], starts) for axis in (0, 1)])
        for extreme in (np.minimum, np.maximum)
    )
    # An outline of n points is at most n times the larger side of its box long; few need to be measured.
    lengths = (ends - starts) * (most - least).max(axis=0)
    first, stop = masks.spans[rows].T
    for target, values, reduce in (
        (low, least.min(axis=0), np.minimum),
        (high, most.max(axis=0), np.maximum),
        (length, lengths, np.add),
    ):
        bounds = np.stack([first, stop], axis=1).ravel()
        target[rows] = reduce.reduceat(np.append(values, 0), bounds)[::2]
    for row in np.flatnonzero(length > MAX_OUTLINE).tolist():
        rings = (masks.points[starts[ring] : ends[ring]] for ring in range(*masks.spans[row].tolist()))
        length[row] = sum(float(np.abs(ring - np.roll(ring, 1, axis=0)).max(axis=1).sum()) for ring in rings)
    return low, high, length


def decoded_counts(text: str) -> list[int] | None:
    """Return the runs in a compressed string, None for a string that is no valid encoding.

    Every character holds five bits and a flag for more to follow; from the fourth run on, a number is the difference
    from the run two before.

    >>> decoded_counts("489JI0007")
    [4, 8, 9, 2, 2, 2, 2, 2, 9]
    """
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or ends[-1:].tolist() != [len(digits) - 1]:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:  # seven times five bits hold more than any run
        return None
    shift = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((digits & 31) << shift, starts)
    negative = (digits[ends] & 16) != 0
    numbers[negative] -= 1 << (5 * (ends - starts + 1))[negative]
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers.tolist() if (numbers >= 0).all() else None


def _runs(counts: Any) -> list[int] | None:
    """Return the runs of an encoding in either form, None for invalid ones."""
    if isinstance(counts, str):
        return decoded_counts(counts)
    if isinstance(counts, list) and set(map(type, counts)) <= {int} and all(0 <= n <= MAX_PIXELS for n in counts):
        return counts
    return None


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**31 for side in size)


def _is_ring(ring: Any) -> bool:
    """Return whether the value is x, y, x, y, ... of at least three finite points."""
    if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2 or not set(map(type, ring)) <= {int, float}:
        return False
    try:
        return math.isfinite(sum(map(abs, ring)))
    except OverflowError:  # an integer beyond doubles
        return False


def _as_array(values: "array[Any]", dtype: type[Number]) -> npt.NDArray[Number]:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype)
