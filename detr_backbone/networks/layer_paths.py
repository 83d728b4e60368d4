"""Paths of layers that a pattern stands for, such as the last four blocks of a transformer."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from detr_backbone.errors import ConfigError, refuse_single_name

_RANGE = re.compile(r"\[(\d+)-(\d+)\]")


def expand_paths(network: nn.Module, patterns: Sequence[str], *, option: str) -> list[str]:
    """Return the paths that patterns stand for, pattern by pattern, in the order of the network.

    `[8-11]` stands for each of the numbers 8 to 11, and `*` for any one name, which holds no dot. A path without either
    stays as it is.

    Args:
        network: the layers are those of its `named_modules()`.
        patterns: paths and patterns.
        option: what errors call them.

    Raises:
        ConfigError: one name is given instead of a list, a pattern with `*` fits no layer, or brackets hold no such
            numbers.

    >>> network = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(1, 1)}) for _ in range(3))})
    >>> expand_paths(network, ["norm", "blocks.[1-2]", "blocks.*.mlp"], option="train_layers")
    ['norm', 'blocks.1', 'blocks.2', 'blocks.0.mlp', 'blocks.1.mlp', 'blocks.2.mlp']
    """
    refuse_single_name(option, patterns)
    known = [path for path, _ in network.named_modules() if path]
    expanded = []
    for pattern in patterns:
        for path in _each_number(pattern, option):
            expression = re.compile(re.escape(path).replace(r"\*", r"[^.]+"))
            paths = [other for other in known if expression.fullmatch(other)] if "*" in path else [path]
            if not paths:
                raise ConfigError(f"`{option}` must name layers of the network, got {pattern!r}, which fits none")
            expanded += paths
    return expanded


def _each_number(pattern: str, option: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None or int(match[1]) > int(match[2]):
        if match or "[" in pattern or "]" in pattern:
            raise ConfigError(
                f"`{option}` must hold paths, in which [8-11] stands for the numbers 8 to 11, got {pattern!r}"
            )
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _each_number(f"{pattern[: match.start()]}{number}{pattern[match.end() :]}", option)
