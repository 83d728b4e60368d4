"""YAML that says what it seems to say: no references, no octal or sexagesimal numbers, nothing that takes for ever."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from detr_backbone.errors import ConfigError

MAX_CHARACTERS = 200_000
MAX_DEPTH = 20
_MISREAD = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")  # YAML 1.1: octal, sexagesimal
_MANY_DIGITS = re.compile(r"[-+]?[0-9_]{20,}")


def load_yaml(text: str) -> Any:
    """Return what a YAML text holds, as jsonargparse reads it, once `refuse_misleading` has nothing against it."""
    from jsonargparse import get_loader

    refuse_misleading(text)
    return get_loader("yaml")(text)


def read_text(path: Path) -> str:
    """Return the content of a configuration file.

    Raises:
        ConfigError: it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration must be UTF-8 text | where: file={path} | got {error.reason}") from error


def refuse_misleading(text: str, *, source: str = "") -> None:
    """Refuse a YAML text that is read as something else than it seems, or that takes for ever to read.

    Anchors may refer to themselves, or expand to more than any memory holds; YAML 1.1 reads 010 as 8 and 1:30 as 90. A
    text that is not YAML at all is left to the parser that reads it next.

    Args:
        text: the YAML text.
        source: the file, as the message names it.

    Raises:
        ConfigError: naming file, line, and what came.
    """
    file = f"file={source} " if source else ""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"configuration is too long | where: {file}| got {len(text)} characters expected at most {MAX_CHARACTERS}"
        )
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = event.start_mark
            where = f"where: {file}line={mark.line + 1 if mark else 1}"
            anchor = getattr(event, "anchor", None)
            if anchor is not None:
                raise ConfigError(
                    f"anchors and aliases of YAML are not read | {where} | got {anchor} | fix: write the value out"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ConfigError(f"configuration is nested too deeply | {where} | got more than {MAX_DEPTH} levels")
            if isinstance(event, yaml.ScalarEvent) and event.style is None:
                _refuse_number(event.value, where)
    except yaml.YAMLError:
        return


def refuse_misread_arguments(arguments: Sequence[str]) -> None:
    """Refuse command-line values that are read as another number than they seem to be.

    Raises:
        ConfigError: naming the option.
    """
    for option, value in zip(["", *arguments], arguments, strict=False):
        key, equals, after = value.partition("=")
        if value.startswith("--") and equals:
            _refuse_number(after, f"where: key={key[2:]}")
        elif option.startswith("--"):
            _refuse_number(value, f"where: key={option[2:]}")


def _refuse_number(value: str, where: str) -> None:
    if _MISREAD.fullmatch(value):
        raise ConfigError(
            f"number is read as another one in YAML | {where} | got {value} expected a decimal number without "
            "leading zeros | fix: write it so, or quote it where it is text"
        )
    if _MANY_DIGITS.fullmatch(value):
        raise ConfigError(f"number is too large | {where} | got {len(value)} digits")
