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
    return _font(_file_for(frozenset(text)) or _default(), size)


def names_without_font(names: Iterable[str]) -> list[str]:
    """Return the names that no font of this machine can show."""
    return [name for name in names if _file_for(frozenset(name)) is None]


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
