"""Python lists parsed into typed arrays, with a mask of the entries that could not be parsed and are 0 instead."""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


def repeated(ids: IntArray) -> tuple[BoolArray, IntArray]:
    """Return a mask of the ids [N] that occurred earlier, and the index of the first occurrence of each [N]."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rows = first[inverse]
    return rows != np.arange(len(ids)), rows


def row_indices(given: IntArray, known: IntArray) -> IntArray:
    """Return the index in `known` [M] of the first element that equals each given number [N], -1 for none."""
    values, rows = np.unique(known, return_index=True)
    if not len(values):
        return np.full(len(given), -1)
    nearest = np.searchsorted(values, given).clip(max=len(values) - 1)
    return np.where(values[nearest] == given, rows[nearest], -1)


def integers(values: Sequence[Any]) -> tuple[IntArray, BoolArray]:
    """Return the values as int64 [N], 0 for those that are no integers, and a mask of these."""
    if set(map(type, values)) <= {int}:
        try:
            return np.fromiter(values, np.int64, len(values)), np.zeros(len(values), np.bool_)
        except OverflowError:
            pass
    bad = np.array([not is_integer(value) for value in values], dtype=np.bool_)
    return np.array([0 if b else v for v, b in zip(values, bad.tolist(), strict=True)], dtype=np.int64), bad


def numbers(values: Sequence[Any]) -> tuple[FloatArray, BoolArray]:
    """Return the values as float64 [N], 0 for those that are no finite numbers, and a mask of these."""
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


def four_numbers(values: Sequence[Any]) -> tuple[FloatArray, BoolArray]:
    """Return the values as float64 [N, 4], 0 for those that are not four finite numbers, and a mask of these."""
    none = [None] * 4
    shaped = [value if isinstance(value, list) and len(value) == 4 else none for value in values]
    flat, bad = numbers(list(chain.from_iterable(shaped)))
    malformed: BoolArray = np.any(bad.reshape(-1, 4), axis=1)
    boxes = flat.reshape(-1, 4)
    boxes[malformed] = 0
    return boxes, malformed


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether the value is an integer of 64 bits and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_file_name(value: Any) -> TypeGuard[str]:
    """Return whether the value is text that the file system accepts as a name."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether the value is a number that a double can hold and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
