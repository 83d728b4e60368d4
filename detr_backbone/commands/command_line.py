"""How a command meets its user: options from a function's signature, a help that fits a screen, early refusals."""

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import Any

from detr_backbone.errors import ConfigError
from detr_backbone.training.config import TrainConfig
from detr_backbone.training.config_errors import OneLineParser, keys_of

_OVERRIDES = "overrides"
_YAML = {"True": "true", "False": "false"}  # as values are typed


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: the function that does the work, whose signature and docstring are its options and its help.

    A parameter `overrides` of the function takes all words of the form `--KEY VALUE` whose key is one of TrainConfig,
    for a configuration that is read from elsewhere.

    Attributes:
        name: as it is typed, with the program before it.
        main: takes keyword arguments; what it returns is the exit code, None is 0.
        example: a command line that works.
        shown: the keys that `--help` shows; all parameters of `main` if left out.
    """

    name: str
    main: Callable[..., int | None]
    example: str
    shown: tuple[str, ...] = ()

    def run(self, words: Sequence[str]) -> int:
        """Run the command with the words that follow its name, and return the exit code."""
        if {"-h", "--help"}.intersection(words):
            print(self.help())
            return 0
        if "--help-all" in words:
            print(self.parser().format_help())
            return 0
        return self.main(**self.options(words)) or 0

    def parser(self) -> OneLineParser:
        """Return the command line with all its options."""
        keys = keys_of(self.main)
        skip: set[str | int] = {_OVERRIDES} if keys.pop(_OVERRIDES, None) else set()
        parser = OneLineParser(prog=self.name, description=_summary(self.main), keys=keys)
        parser.add_function_arguments(self.main, skip=skip, fail_untyped=True)
        return parser

    def options(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments of `main` that a command line gives."""
        parser = self.parser()
        takes_overrides = _OVERRIDES in keys_of(self.main)
        own, overrides = split_overrides(words) if takes_overrides else (words, [])
        options: dict[str, Any] = vars(parser.instantiate(parser.parse_args(own)))
        return options | ({_OVERRIDES: overrides} if takes_overrides else {})

    def help(self) -> str:
        """Return the options that are used most, one after the other, with an example."""
        parser = self.parser()
        width = min(shutil.get_terminal_size().columns, 120)
        shown = self.shown or tuple(key for key in keys_of(self.main) if "." not in key and key != _OVERRIDES)
        text, entries = parser.format_help(), []
        for key in shown:
            if is_dataclass(parser.keys.get(key)):
                entries.append((f"--{key}.KEY", f"{_documented(self.main, key)} See --help-all."))
            else:
                entries.append(_option(text, key))
        if _OVERRIDES in keys_of(self.main):
            entries.append(("--KEY VALUE", "overrides a key of the configuration, such as --data.batch_size 8."))
        entries.append(("--help-all", "shows all options."))
        indent = min(max(len(option) for option, _ in entries) + 4, 36)
        lines = [line for option, about in entries for line in _entry(option, about, indent, width)]
        head = [f"usage: {self.name} [OPTIONS]", "", *textwrap.wrap(_summary(self.main), width), ""]
        return "\n".join([*head, *lines, "", "example:", *(f"  {line}" for line in self.example.splitlines())])


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line without the words that set keys of TrainConfig, and those words.

    >>> split_overrides(["--images", "a", "--data.batch_size", "4", "--seed=1"])
    (['--images', 'a'], ['--data.batch_size', '4', '--seed=1'])
    """
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            first = re.split(r"[.=]", word.removeprefix("--"))[0]
            target = overrides if first in TrainConfig.__dataclass_fields__ else own
        target.append(word)
    return own, overrides


def require(*libraries: str, extra: str) -> None:
    """Refuse to start without libraries of an extra.

    Raises:
        ConfigError: naming the first one that is missing, and how to install it.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise ConfigError(f'`{library}` is not installed | fix: pip install "detr_backbone[{extra}]"')


def output_folder(path: str, *, option: str = "output") -> Path:
    """Return a folder to write into, which is made where it is missing.

    Raises:
        ConfigError: it cannot be one, or nothing can be written there.
    """
    if not path:
        raise ConfigError(f"`--{option}` must be a folder to write into, got ''")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`--{option}` must be a folder to write into, got {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"`--{option}` must be a folder to write into, got {path}: it is read-only")
    return folder


def output_file(path: str, *, option: str = "output") -> Path:
    """Return a file to write, whose folder is made where it is missing.

    Raises:
        ConfigError: it cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"`--{option}` must be a file to write, got the folder {path}")
    output_folder(str(file.parent), option=option)
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"`--{option}` must be a file to write, got {path}: it is read-only")
    return file


def _summary(documented: Any) -> str:
    return (documented.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")


def _documented(function: Callable[..., Any], parameter: str) -> str:
    """Return what the docstring of a function says of a parameter."""
    lines = re.search(rf"^    {parameter}: (.*(?:\n        .*)*)", cleandoc(function.__doc__ or ""), re.MULTILINE)
    assert lines is not None, f"{parameter} is not documented"
    return " ".join(lines[1].split())


def _option(text: str, key: str) -> tuple[str, str]:
    """Return an option with its choices, and what jsonargparse's help says of it, without the types."""
    block = re.search(rf"^  --{re.escape(key)}[ ,].*\n(?:    .*\n|\n(?=    ))*", f"{text}\n", re.MULTILINE)
    assert block is not None, f"{key} is no option"
    head, _, about = re.sub(r"\s{2,}", "\n", block[0].strip()).partition("\n")
    choices = re.search(r"\{.*?\}", head)
    about = re.sub(
        r"\((required, )?type: .*?(?:, default: (.*?))?\)\s*$",
        lambda found: "(required)" if found[1] else f"(default: {_YAML.get(found[2], found[2])})",
        " ".join(about.split()),
    )
    about = re.sub(r"\d\.\d{9,}", lambda found: f"{float(found[0]):g}", about)
    return f"--{key}" + (f" {choices[0]}" if choices else ""), re.sub(r" ?\(default: (null|None|\(\)|)\)", "", about)


def _entry(option: str, about: str, indent: int, width: int) -> list[str]:
    """Return the lines of one option, as argparse sets them."""
    left = f"  {option}"
    body = textwrap.wrap(about, max(width - indent, 30), break_on_hyphens=False)
    head = [left] if len(left) > indent - 2 else [f"{left:<{indent}}{body.pop(0) if body else ''}"]
    return [*head, *(f"{'':<{indent}}{line}" for line in body)]
