"""The curves of a run as a picture: losses, average precision, learning rate over its epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

PANELS = (("loss", ("loss", "loss_ce", "loss_bbox", "loss_giou")), ("AP in percent", ("AP", "AP50", "AP75")))


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the rows of `metrics.csv` into a PNG file of 1200 x 400 pixels.

    Args:
        rows: one per epoch, at least one, with the names of the columns; what was not evaluated lacks its numbers.
        path: the file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    shown = [(title, names) for title, names in PANELS if any(name in row for row in rows for name in names)]
    for axes, (title, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name in names:
            drawn = [row for row in rows if name in row]
            factor = 100 if name.startswith("AP") else 1
            points = [row["epoch"] for row in drawn], [row[name] * factor for row in drawn]
            axes.plot(*points, label=name, marker="o" if len(drawn) < 50 else None, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_title(title)
        if title.startswith("AP"):
            axes.set_ylim(0, 102)
        elif any(row[name] > 0 for name in names for row in rows if name in row):
            axes.set_yscale("log")  # the sum of all layers is many times its parts
        axes.set_xlim(0.5, rows[-1]["epoch"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)
