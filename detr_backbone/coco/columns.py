"""Lists of anything as arrays: what is no number, no id, no box is flagged, and 0 stands in its place."""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.findings import Rows

Bools: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float64]


def repeated(ids: Rows) -> tuple[Bools, Rows]:
    """Whether an id [N] stood before, and the row where it did first."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rows = first[inverse]
    return rows != np.arange(len(ids)), rows


def places_of(given: Rows, known: Rows) -> Rows:
    """The first row of `known` [M] that holds each given number [N], -1 where none does."""
    values, rows = np.unique(known, return_index=True)
    if not len(values):
        return np.full(len(given), -1)
    places = np.searchsorted(values, given).clip(max=len(values) - 1)
    return np.where(values[places] == given, rows[places], -1)


def integers(values: Sequence[Any]) -> tuple[Rows, Bools]:
    """Values as integers, 0 where they are none, and where that is."""
    if set(map(type, values)) <= {int}:
        try:
            return np.fromiter(values, np.int64, len(values)), np.zeros(len(values), np.bool_)
        except OverflowError:
            pass
    bad = np.array([not is_integer(value) for value in values], dtype=np.bool_)
    return np.array([0 if b else v for v, b in zip(values, bad.tolist(), strict=True)], dtype=np.int64), bad


def numbers(values: Sequence[Any]) -> tuple[Floats, Bools]:
    """Values as finite numbers, 0 where they are none, and where that is."""
    if set(map(type, values)) <= {int, float}:
        try:
            array = np.fromiter(values, np.float64, len(values))
        except OverflowError:
            pass
        else:
            bad = ~np.isfinite(array)
            array[bad] = 0
            return array, bad
    bad = np.array([not is_finite(value) for value in values], dtype=np.bool_)
    return np.array([0 if b else v for v, b in zip(values, bad.tolist(), strict=True)], dtype=np.float64), bad


def four_numbers(values: Sequence[Any]) -> tuple[Floats, Bools]:
    """Values as four finite numbers each, 0 where they are not, and where that is."""
    none = [None] * 4
    shaped = [value if isinstance(value, list) and len(value) == 4 else none for value in values]
    flat, bad = numbers(list(chain.from_iterable(shaped)))
    malformed: Bools = np.any(bad.reshape(-1, 4), axis=1)
    boxes: Floats = flat.reshape(-1, 4)
    boxes[malformed] = 0
    return boxes, malformed


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer of 64 bits, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_file_name(value: Any) -> TypeGuard[str]:
    """Whether it is text that the file system can take as a name."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a double holds, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
