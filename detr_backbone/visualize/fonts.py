"""Fonts for the names of categories, in any script: DejaVu Sans, or a font of the system that has the characters."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from PIL import ImageFont

_WIDE = ("cjk", "notosans", "sourcehan", "wqy", "droid", "unicode", "yahei", "pingfang", "gothic", "malgun", "ttf")
"""What the names of fonts with many characters hold, in the order in which they are tried."""


def load_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font of this many pixels that has the characters of a text, or DejaVu Sans if no font has them."""
    return _font(font_file(text), size)


def font_file(text: str) -> str:
    """Return the file of a font that has the characters of a text, or that of DejaVu Sans if no font has them."""
    return _file_for(frozenset(text)) or _default()


def font_warning(names: Iterable[str]) -> str:
    """Return which names no font of this machine can show, in a line, or an empty string.

    >>> font_warning(["cell", "Größe", "клетка"])
    ''
    """
    unreadable = [name for name in names if _file_for(frozenset(name)) is None]
    if not unreadable:
        return ""
    return f"no font has the characters of {unreadable}, which are drawn as boxes: install Noto Sans CJK, or another"


@lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def _default() -> str:
    return str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=4096)
def _file_for(characters: frozenset[str]) -> str | None:
    needed = {ord(one) for one in characters if not one.isspace() and unicodedata.category(one) not in ("Cc", "Cf")}
    return next((file for file in _files() if needed <= _characters(file)), None)


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    def rank(file: str) -> tuple[int, str]:
        name = Path(file).name.lower()
        return next((number for number, word in enumerate(_WIDE) if word in name), len(_WIDE)), name

    return (_default(), *sorted(findSystemFonts(), key=rank))


@lru_cache(maxsize=256)
def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (RuntimeError, OSError):  # a damaged or an unknown kind of font
        return frozenset()
