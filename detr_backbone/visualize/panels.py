"""A grid of captioned panels as one picture, as wide as a README shows it."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from detr_backbone.visualize.fonts import font_file

Array: TypeAlias = npt.NDArray[np.float64]

WIDTH = 850
"""Pixels."""
NOT_FINITE = "#FF00FF"
VALUES = colormaps["viridis"].with_extremes(bad=NOT_FINITE)
"""Perceptually uniform, and readable by colour-blind readers; magenta is no value."""

_DPI = 100
_GAP = 12  # pixels around panels
_LINE = 16  # pixels per line of text
_LETTERS = 100  # that fit into the width, at the title's size


class Panels:
    """A figure of equal panels, row by row, each with a caption above it.

    Args:
        captions: one for each panel; may have several lines.
        columns: panels in a row.
        aspect: width / height of what a panel shows; one beyond 1:4 or 4:1 leaves room.
        title: above all panels; broken into lines where it is too long.

    Attributes:
        axes: the panels.
    """

    def __init__(self, captions: Sequence[str], *, columns: int, aspect: float, title: str) -> None:
        head = [line for part in title.splitlines() for line in textwrap.wrap(part, _LETTERS)]
        lines = max(caption.count("\n") + 1 for caption in captions)
        rows = -(-len(captions) // columns)
        side = (WIDTH - _GAP * (columns + 1)) / columns
        depth = side / min(max(aspect, 0.25), 4.0)
        top = _GAP + _LINE * len(head)
        height = round(top + rows * (depth + _LINE * lines + _GAP))
        self._figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI)
        for number, line in enumerate(head):
            at = 1 - (_GAP / 2 + _LINE * (number + 0.5)) / height
            weight = "bold" if number == 0 else "normal"
            self._figure.text(_GAP / WIDTH, at, line, fontsize=9, weight=weight, va="center", parse_math=False)
        self.axes: list[Axes] = []
        for number, caption in enumerate(captions):
            row, column = divmod(number, columns)
            left = _GAP + column * (side + _GAP)
            bottom = height - top - (row + 1) * (depth + _LINE * lines) - row * _GAP
            axes = self._figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, depth / height))
            font = FontProperties(fname=font_file(caption), size=8)
            axes.set_title(caption, font=font, loc="left", pad=4, parse_math=False)
            axes.set_axis_off()
            self.axes.append(axes)

    def picture(self) -> Image.Image:
        """The figure, drawn."""
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # `font_warning` tells it once
            self._figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")


def robust_range(values: Array) -> tuple[float, float]:
    """The 1st and 99th percentile of the finite values, or a range around the only one that there is."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(bound) for bound in np.percentile(finite, (1, 99)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
