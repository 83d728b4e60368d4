"""Charts as inline SVG with the colours of the page's style, light or dark.

Every chart has its natural size in CSS pixels; its text is as large as that of the page.
"""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

Number: TypeAlias = float | None

WIDTH, HEIGHT = 340, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40
_CELL = 26


def percent(value: Number, *, sign: bool = False) -> str:
    """Return a fraction as a percentage with one decimal, `-` for None.

    >>> percent(0.5046), percent(None), percent(0.02, sign=True)
    ('50.5', '-', '+2.0')
    """
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def interval_bar(value: Number, low: Number, high: Number) -> str:
    """Return a number between 0 and 1 as a tick on a line, and its interval as a bar; empty without a number."""
    if value is None:
        return ""
    width, middle = 130, 7
    bar = "" if low is None or high is None else _line(width * low, middle, width * high, middle, "range")
    return _svg(
        width,
        14,
        percent(value),
        f"{_line(0, middle, width, middle, 'grid')}{bar}"
        f"{_line(width * value, middle - 5, width * value, middle + 5, 'tick')}",
        padding=4,
    )


def step_lines(recall: Sequence[float], lines: Sequence[tuple[str, Sequence[Number]]], *, title: str) -> str:
    """Return lines of precision over recall, both 0 to 1, with their names; a line of None is left out."""
    drawn = "".join(
        f'<path class="line s{index}" d="{_steps(recall, values, _frame())}"/>'
        for index, (_, values) in enumerate(lines)
        if values[0] is not None
    )
    names = "".join(
        f"{_line(_LEFT + 96 * index, HEIGHT + 10, _LEFT + 96 * index + 20, HEIGHT + 10, f'line s{index}')}"
        f"{_text(_LEFT + 96 * index + 25, HEIGHT + 14, name)}"
        for index, (name, _) in enumerate(lines)
    )
    return _svg(WIDTH, HEIGHT + 20, title, _axes("recall", "precision") + drawn + names)


def spark_steps(recall: Sequence[float], lines: Sequence[Sequence[Number]], *, title: str) -> str:
    """Return the same as a small chart with a frame and no axes."""
    frame = (1, 1, 118, 68)
    drawn = "".join(f'<path class="line s{i}" d="{_steps(recall, values, frame)}"/>' for i, values in enumerate(lines))
    return _svg(120, 70, title, f'<rect class="frame" x="0.5" y="0.5" width="119" height="69"/>{drawn}')


def signed_bars(rows: Sequence[tuple[str, Number]], *, title: str) -> str:
    """Return a bar for each fraction, with its name and its percentage."""
    known = [value for _, value in rows if value is not None]
    most = max([0.01, *known])
    left, room = 92, WIDTH - 92 - 58
    parts = []
    for index, (name, value) in enumerate(rows):
        y = 6 + 26 * index
        parts.append(_text(left - 8, y + 14, name, "end"))
        length = 0 if value is None else max(0.0, room * value / most)
        parts.append(f'<rect class="bar" x="{left}" y="{y}" width="{length:.1f}" height="19" rx="2"/>')
        parts.append(_text(left + length + 6, y + 14, percent(value, sign=True), number=True))
    height = 6 + 26 * len(rows)
    return _svg(WIDTH, height, title, "".join(parts) + _line(left, 2, left, height - 3, "axis"))


def reliability(
    edges: Sequence[float], scores: Sequence[Number], precision: Sequence[Number], counts: Sequence[int], *, title: str
) -> str:
    """Return precision over score in bins, with the diagonal of equal values; below, the number in each bin."""
    x0, y0, width, height = _frame()
    bars, histogram = [], []
    most = max([1, *counts])
    for left, right, score, fraction, count in zip(edges[:-1], edges[1:], scores, precision, counts, strict=True):
        start, wide = x0 + width * left, width * (right - left)
        filled = 34 * count / most
        histogram.append(
            f'<rect class="count" x="{start + 1:.1f}" y="{HEIGHT + 46 - filled:.1f}" width="{wide - 2:.1f}" '
            f'height="{filled:.1f}"><title>{count} detections</title></rect>'
        )
        if score is None or fraction is None:
            continue
        top = y0 + height * (1 - fraction)
        tip = f"{count} detections: mean score {percent(score)} %, precision {percent(fraction)} %"
        bars.append(
            f'<rect class="bar" x="{start + 1:.1f}" y="{top:.1f}" width="{wide - 2:.1f}" '
            f'height="{height * fraction:.1f}"><title>{tip}</title></rect>'
            f'<circle class="dot" cx="{x0 + width * score:.1f}" cy="{top:.1f}" r="3.5"><title>{tip}</title></circle>'
        )
    body = (
        _axes("score", "precision")
        + "".join(bars)
        + _line(x0, y0 + height, x0 + width, y0, "diagonal")
        + "".join(histogram)
        + _line(x0, HEIGHT + 46, x0 + width, HEIGHT + 46, "axis")
        + _text(x0 - 6, HEIGHT + 20, _brief(most), "end", number=True)
        + _text(x0 - 6, HEIGHT + 46, "0", "end", number=True)
        + _text(x0 + width / 2, HEIGHT + 62, "detections in each bin", "middle")
    )
    return _svg(WIDTH, HEIGHT + 68, title, body)


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], *, mixed: str, title: str) -> str:
    """Return counts with names of rows and columns; the colour of a cell is as strong as its fraction of the row.

    Args:
        names: of the rows, and of the columns.
        counts: by row.
        mixed: the name of several classes together, whose cell on the diagonal holds hits and mistakes.
        title: of the chart.
    """
    longest = max(len(_short(name)) for name in names)
    left, top = 14 + 6.6 * longest, 14 + 4.7 * longest
    parts = []
    for row, (truth, line) in enumerate(zip(names, counts, strict=True)):
        y = top + _CELL * row
        parts.append(_text(left - 6, y + 17, _short(truth), "end", tip=truth))
        for column, (predicted, count) in enumerate(zip(names, line, strict=True)):
            x = left + _CELL * column
            fraction = count / max(1, sum(line))
            kind = "slip" if row != column else "mixed" if truth == mixed else "hit"
            strength = 0.0 if not count else 0.1 + 0.5 * fraction
            tip = f"{escape(truth)} detected as {escape(predicted)}: {count} of {sum(line)}"
            parts.append(
                f'<g><title>{tip}</title><rect class="cell {kind}" x="{x:.1f}" y="{y:.1f}" width="{_CELL - 1}" '
                f'height="{_CELL - 1}" style="fill-opacity:{strength:.2f}"/>'
                + (_text(x + _CELL / 2, y + 17, _brief(count), "middle", number=True) if count else "")
                + "</g>"
            )
    for column, name in enumerate(names):
        x, y = left + _CELL * column + 16, top - 6
        label = escape(_short(name))
        parts.append(
            f'<text transform="translate({x:.1f} {y:.1f}) rotate(-45)"><title>{escape(name)}</title>{label}</text>'
        )
    side = _CELL * len(names)
    return _svg(round(left + side + 4.7 * longest + 8), round(top + side + 4), title, "".join(parts), scale=False)


def _svg(width: int, height: int, title: str, body: str, *, padding: int = 0, scale: bool = True) -> str:
    return (
        f'<svg class="chart{"" if scale else " fixed"}" role="img" aria-label="{escape(title)}" '
        f'width="{width + 2 * padding}" height="{height}" '
        f'viewBox="{-padding} 0 {width + 2 * padding} {height}">{body}</svg>'
    )


def _frame() -> tuple[int, int, int, int]:
    """Return left, top, width and height of the area within the axes."""
    return _LEFT, _TOP, WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM


def _axes(x: str, y: str) -> str:
    """Return two axes from 0 to 1 with a grid and their names."""
    x0, y0, width, height = _frame()
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        across, up = x0 + width * tick, y0 + height * (1 - tick)
        parts += [_line(x0, up, x0 + width, up, "grid"), _line(across, y0, across, y0 + height, "grid")]
        parts += [
            _text(x0 - 6, up + 4, f"{tick:g}", "end", number=True),
            _text(across, y0 + height + 16, f"{tick:g}", "middle", number=True),
        ]
    parts.append(_text(x0 + width / 2, y0 + height + 33, x, "middle"))
    parts.append(
        f'<text text-anchor="middle" transform="translate(12 {y0 + height / 2:.1f}) rotate(-90)">{escape(y)}</text>'
    )
    return "".join(parts)


def _steps(recall: Sequence[float], values: Sequence[Number], frame: tuple[int, int, int, int]) -> str:
    """Return the path of a curve that falls in steps, with a corner only where it falls."""
    x0, y0, width, height = frame
    points: list[str] = []
    before: float | None = None
    for x, value in zip(recall, values, strict=True):
        if value is not None and value != before:
            across, up = x0 + width * x, y0 + height * (1 - value)
            points.append(f"H{across:.1f}V{up:.1f}" if points else f"M{across:.1f} {up:.1f}")
            before = value
    return "".join(points) + (f"H{x0 + width:.1f}" if points else "")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, number: bool = False, tip: str = "") -> str:
    kind = ' class="number"' if number else ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{title}{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _brief(count: int) -> str:
    """Return a count in at most four characters."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.0f}M"
