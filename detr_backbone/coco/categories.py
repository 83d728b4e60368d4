"""The categories in which two datasets, or a dataset and a detector, differ."""

from collections.abc import Mapping

from detr_backbone.errors import ConfigError

_SHOWN = 3


def refuse_other_categories(got: Mapping[int, str], expected: Mapping[int, str], *, file: str) -> None:
    """Refuse a dataset whose categories are not those of the detector that it is given to.

    Args:
        got: categories id -> name of the dataset.
        expected: those of the detector.
        file: the annotations of the dataset.

    Raises:
        ConfigError: they differ.
    """
    if dict(got) != dict(expected):
        others, own = different_categories(got, expected)
        raise ConfigError(
            f"the categories must be the detector's | where: file={file} key=categories | got {others} expected {own}"
        )


def different_categories(got: Mapping[int, str], expected: Mapping[int, str]) -> tuple[str, str]:
    """Return those of the categories id -> name that are not the same in both, shortened, of each side.

    >>> different_categories({1: "cat", 2: "dog", 3: "cow"}, {1: "cat", 2: "wolf"})
    ("{2: 'dog', 3: 'cow'} of 3", "{2: 'wolf'} of 2")
    >>> different_categories({0: "cat", 1: "dog"}, {1: "cat", 2: "dog"})
    ("{0: 'cat', 1: 'dog'} of 2, the same names under other ids", "{1: 'cat', 2: 'dog'} of 2")
    """
    ids = [one for one in sorted(got.keys() | expected.keys()) if got.get(one) != expected.get(one)]
    is_renumbered = bool(ids) and sorted(got.values()) == sorted(expected.values())
    return _shown(got, ids) + (", the same names under other ids" if is_renumbered else ""), _shown(expected, ids)


def _shown(categories: Mapping[int, str], ids: list[int]) -> str:
    different = {one: categories[one] for one in ids if one in categories}
    first = dict(list(different.items())[:_SHOWN])
    return (
        f"{str(first)[:-1]}, ...}} of {len(categories)}" if len(different) > _SHOWN else f"{first} of {len(categories)}"
    )
