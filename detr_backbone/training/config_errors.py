"""Mistakes in configurations and options, told in one line: the key, file and line, what came, what is expected.

jsonargparse answers a mistyped key with its whole usage. Here the keys of a file are compared with those of the
dataclasses before it is read, so that a mistake is found where it stands, with the nearest key that exists.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from detr_backbone.errors import ConfigError

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


def keys_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every option of a function or key of a dataclass, by its dotted name, groups included.

    >>> from detr_backbone.coco.selection import SubsetConfig
    >>> keys_of(SubsetConfig)["count"], "data.val" in keys_of(SubsetConfig)
    (int | None, False)
    """
    keys = {}
    for name, hint in get_type_hints(kind).items():
        if name != "return":
            keys[prefix + name] = hint
            if is_dataclass(hint):
                keys |= keys_of(hint, f"{prefix}{name}.")
    return keys


def nearest_key(name: str, keys: Mapping[str, Any]) -> str:
    """Return the key that was probably meant, or an empty string: one that ends in `name`, or is spelled nearly so.

    >>> nearest_key("lr", {"optimizer.lr": float, "optimizer.lr_drop": int})
    'optimizer.lr'
    >>> nearest_key("detector.num_querys", {"detector.num_queries": int, "detector.nheads": int})
    'detector.num_queries'
    """
    if ending := [key for key in keys if key.endswith(f".{name}")]:
        return min(ending, key=len)
    close: list[str] = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
    return last[close[0]] if close else ""


def expected(hint: Any) -> str:
    """Return in words what a key of this type takes.

    >>> expected(tuple[str, ...] | None), expected(Literal["no", "bf16"]), expected(tuple[int, int])
    ('a list of text, such as [a, b], or null', 'one of no, bf16', 'a list of 2, each a whole number')
    """
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return ", or ".join(expected(part) for part in arguments)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if _is_list(hint):
        if Ellipsis in arguments or len(arguments) == 1:
            return f"a list of {expected(arguments[0])}, such as [a, b]"
        return f"a list of {len(arguments)}, each {' or '.join(dict.fromkeys(map(expected, arguments)))}"
    if is_dataclass(hint):
        return f"a group of keys: {', '.join(get_type_hints(hint))}"
    name = _NAMES.get(hint)
    return str(getattr(hint, "__name__", hint)) if name is None else name


def lines_of(path: Path, keys: Mapping[str, Any]) -> dict[str, int]:
    """Return the line of every key of a YAML file, by its dotted name.

    Raises:
        ConfigError: the file is no YAML mapping, or holds a key that does not exist, or a group without keys.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"file={path}" + (f" line={mark.line + 1}" if mark else "")
        got = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"configuration is not YAML | where: {where} | got {got}") from error
    if not isinstance(root, yaml.MappingNode):
        got = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}.get(type(root), "nothing")
        raise ConfigError(f"configuration must be keys with values | where: file={path} | got {got}")
    return dict(_lines(root, "", path, keys))


def _lines(node: yaml.MappingNode, prefix: str, path: Path, keys: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line + 1
        where = f"where: file={path} line={line} key={key}"
        if key not in keys:
            raise ConfigError(f"key does not exist | {where}{_suggestion(key, keys)}")
        yield key, line
        if is_dataclass(keys[key]):
            if not isinstance(value, yaml.MappingNode):
                raise ConfigError(f"value does not fit | {where} | got {value.value!r} expected {expected(keys[key])}")
            yield from _lines(value, f"{key}.", path, keys)


class OneLineParser(ArgumentParser):
    """A command line whose every mistake is one line on stderr and exit code 2; values are taken as people type them.

    `--key a b`, `--key a,b` and `--key "[a, b]"` are the same for a key that takes a list, `--key` and `--key true` for
    one that takes true or false.

    Args:
        keys: the type of every key, as `keys_of` gives them.
    """

    def __init__(self, *args: Any, keys: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.keys: Mapping[str, Any] = keys or {}
        self.lines: dict[str, tuple[Path, int]] = {}
        """Where files set a key; `--config` fills it."""
        self._typed: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse the words of a command line."""
        import sys

        self._typed = values_as_yaml(sys.argv[1:] if args is None else args, self.keys)
        return super().parse_args(self._typed, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with the message in one line."""
        text = self._in_one_line(message)
        if not self.exit_on_error:
            raise ConfigError(text) from ex
        self.exit(2, f"error: {text}\n")

    def _in_one_line(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            word = (unknown[1].split() or [""])[0]
            option = word.partition("=")[0]
            if option.startswith("-"):
                return f"option does not exist | got {option}{_suggestion(option.lstrip('-'), self.keys, '--')}"
            return f"word belongs to no option | got {word!r} | fix: options are --key value; see --help"
        if bad := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
            key, reason = bad[1], bad[2]
            if below := re.search(r"NestedArg\(key='([^']*)'", reason):
                return (
                    f"option does not exist | got --{key}.{below[1]}{_suggestion(f'{key}.{below[1]}', self.keys, '--')}"
                )
            given = re.search(r"(?:Got value:|Given value:|Unable to load config) '?(.*?)'?\s*$", reason, re.MULTILINE)
            if key in self.keys and given and not reason.startswith("File does not exist"):
                got = "null" if given[1] == "None" else repr(given[1])
                text = f"`{key}` must be {expected(self.keys[key])}, got {got}{self._where(key)}"
                is_text = re.fullmatch(r"[\w.]+", given[1]) and "a list of text" in text
                return text + (f" | fix: {key}: [{given[1]}]" if is_text else "")
            return f"{' '.join(reason.split())} | where: key={key}"
        if missing := re.match(r"the following arguments are required: (.*)", message):
            return f"options must be given | got none of --{missing[1].replace(', ', ', --')}"
        if valueless := re.match(r"argument (--\S+): expected one argument", message):
            return f"`{valueless[1]}` must have a value, got none"
        text = " ".join(message.split())
        named = re.match(r"`(?:\w+: )?([\w.]+)`", text)
        return text + (self._where(named[1]) if named and "where:" not in text else "")

    def _where(self, key: str) -> str:
        """Return the file and line that set a key, unless the command line did."""
        if key not in self.lines or any(word.partition("=")[0] == f"--{key}" for word in self._typed):
            return ""
        path, line = self.lines[key]
        return f" | where: file={path} line={line}"


def values_as_yaml(words: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with the values of a list in one word, as YAML, and `true` behind a bare flag.

    >>> values_as_yaml(["--names", "a", "b", "--n", "1"], {"names": tuple[str, ...], "n": int})
    ['--names=["a", "b"]', '--n', '1']
    >>> values_as_yaml(["--sizes=3,4", "--strict"], {"sizes": tuple[int, ...], "strict": bool})
    ['--sizes=[3, 4]', '--strict', 'true']
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        hint = keys.get(option.removeprefix("--")) if option.startswith("--") else None
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        list_type = next((part for part in parts if _is_list(part)), None)
        if list_type is None:
            joined.append(word)
            if bool in parts and not equals and (not rest or rest[0].startswith("--")):
                joined.append("true")
            continue
        values = [value] if equals else []
        while rest and not equals and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values or (len(values) == 1 and (values[0][:1] == "[" or values[0] == "null" or str in parts)):
            joined += [word, *([] if equals else values)]
            continue
        if str not in parts:  # a name of a file may hold a comma
            values = [item for text in values for item in text.split(",") if item]
        text_only = get_args(list_type)[:1] == (str,)
        shown = [json.dumps(item) if text_only or not re.fullmatch(r"[\w.+-]+", item) else item for item in values]
        joined.append(f"{option}=[{', '.join(shown)}]")
    return joined


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (tuple, list, Sequence)


def _suggestion(key: str, keys: Mapping[str, Any], dashes: str = "") -> str:
    near = nearest_key(key, keys)
    return f" | fix: did you mean {dashes}{near}?" if near else " | fix: --help-all lists every key"
