"""One exception per domain, each made from a single string.

A message says what is wrong, where (file, key, image_id, index), what came, what was expected, and how to mend it. An
exception that takes exactly one string can be pickled, so it crosses from a DataLoader worker to the user unharmed.
"""

import difflib
from collections.abc import Iterable


class DetrBackboneError(ValueError):
    """Anything below: a fault in what the user gave, which the user can mend."""


class ConfigError(DetrBackboneError):
    """A configuration that cannot be built: an unknown value, or two values that contradict each other."""


class WeightsError(DetrBackboneError):
    """Pretrained weights that are damaged, or that do not fit the model they are meant for."""


class NumericsError(DetrBackboneError):
    """Numbers that cannot be right: NaN or infinity in outputs, costs, losses or statistics; boxes out of range."""


class DataError(DetrBackboneError):
    """An image that cannot be read, or that is not what its annotation file says."""


class AnnotationError(DetrBackboneError):
    """An annotation file that contradicts itself or the COCO format."""


class EvaluationError(DetrBackboneError):
    """Predictions or ground truth from which an AP would be wrong or misleading."""


class ExportError(DetrBackboneError):
    """A model that cannot be exported faithfully, or an exported file or an engine that cannot be used."""


class CheckpointError(DetrBackboneError):
    """A training checkpoint that is damaged, incomplete, or belongs to another configuration."""


class ResourceError(DetrBackboneError):
    """Memory, disk space or a process that the machine could not give."""


class DistributedError(DetrBackboneError):
    """Processes of one run that disagree, or of which one no longer answers."""


def unknown_name(name: str, known: Iterable[str], *, also: Iterable[str] = ()) -> str:
    """Return what to tell a user who asked for a name that does not exist: what exists, and the nearest match.

    Args:
        name: what was asked for.
        known: the names to list.
        also: more names that may be the nearest match, too many to list.
    """
    known = list(known)
    nearest = difflib.get_close_matches(name, [*known, *also], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"got {name!r}, expected one of {', '.join(known)}{hint}"


def refuse_single_name(option: str, names: object) -> None:
    """Refuse one name where several are expected; a text would be taken apart into letters.

    Raises:
        ConfigError: `names` is a text.
    """
    if isinstance(names, str):
        raise ConfigError(f"`{option}` must be a list of names, such as [{names!r}], got {names!r}")
