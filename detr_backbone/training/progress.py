"""What a run shows while it goes: a bar where the output is a terminal, plain lines where it is not."""

import csv
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from detr_backbone.errors import ResourceError
from detr_backbone.evaluation.result import percent
from detr_backbone.evaluation.settings import COCO_SETTINGS
from detr_backbone.nested_tensor import NestedTensor

LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
COLUMNS = ("epoch", "step", "seconds", "lr", *LOSSES, *COCO_SETTINGS.stat_names, "padding")

Item = TypeVar("Item")


class Means:
    """Running means of the losses of an epoch, and the fraction of padding in its batches, in this process.

    Args:
        state: of the means to go on with, as `state` gave it.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"sums": {}, "count": 0, "pixels": 0, "cells": 0}
        self._sums: dict[str, Tensor] = dict(state["sums"])
        self._count, self._pixels, self._cells = state["count"], state["pixels"], state["cells"]

    def add(self, losses: Mapping[str, Tensor], images: NestedTensor) -> None:
        """Count the losses of one batch, and its padding."""
        self._count += 1
        self._pixels += sum(height * width for height, width in images.sizes)
        self._cells += images.mask.numel()
        for name in LOSSES:
            loss = losses[name].detach()  # no wait for the device here
            self._sums[name] = self._sums.get(name, torch.zeros_like(loss)).to(loss.device) + loss

    def values(self) -> dict[str, float]:
        """Return the mean of each loss so far, and the fraction of all pixels that were padding."""
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        return means | {"padding": 1 - self._pixels / self._cells}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the means."""
        sums = {name: total.cpu() for name, total in self._sums.items()}
        return {"sums": sums, "count": self._count, "pixels": self._pixels, "cells": self._cells}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in self.values().items() if name.startswith("loss"))


class RunLog:
    """The run's console.

    Args:
        is_main: whether this process shows anything at all.
        seconds: that earlier parts of the run took.
        every: seconds between lines, where the output is no terminal.
    """

    def __init__(self, *, is_main: bool, seconds: float = 0, every: float = 60) -> None:
        from rich.console import Console

        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._start = time.monotonic() - seconds
        self._every = every

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, over all its parts."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print text as it is."""
        self.console.print(text, markup=False)

    def steps(
        self, steps: Iterable[Item], means: Means, title: str, *, done: int, per_epoch: int, left_after: int
    ) -> Iterator[Item]:
        """Yield the steps of an epoch, while showing `means` and the time left of the whole run.

        Args:
            steps: those that are left of the epoch.
            means: of its losses.
            title: of the epoch.
            done: steps of the epoch that earlier parts of the run took.
            per_epoch: steps of a whole epoch.
            left_after: steps of the run after this epoch.
        """
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[left]}"),
            progress.TextColumn("{task.fields[means]}"),
        )
        start = said = time.monotonic()
        is_terminal = self.console.is_terminal
        with progress.Progress(*columns, console=self.console, transient=True, disable=not is_terminal) as bar:
            task = bar.add_task(title, total=per_epoch, completed=done, means="", left="")
            for taken, step in enumerate(steps, start=1):
                yield step
                now = time.monotonic()
                left = f"{duration((now - start) / taken * (per_epoch - done - taken + left_after))} left"
                if is_terminal:
                    bar.update(task, advance=1, means=str(means), left=left)
                elif now - said >= self._every and not self.console.quiet:
                    said = now
                    self.say(f"{title}  step {done + taken}/{per_epoch}  {left}  {means}")

    def epoch(self, row: Mapping[str, float]) -> None:
        """Print one line for the row of an epoch, as `metrics.csv` holds it."""
        losses = "  ".join(f"{name} {row[name]:.3f}" for name in LOSSES if name.startswith("loss") and name in row)
        evaluated = "".join(f"  {name} {percent(row[name])}" for name in ("AP", "AP50") if name in row)
        minutes = row["seconds"] / 60
        self.say(f"epoch {row['epoch']:>3}  {minutes:5.1f} min  {losses}  padding {row['padding']:.0%}{evaluated}")


def write_rows(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write `metrics.csv`, COCO's numbers in percent: at every moment it holds all rows before or all rows now.

    Raises:
        ResourceError: it cannot be written, as where the disk is full; nothing of it stays.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in in_percent(row).items()} for row in rows)
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"table cannot be written | where: file={path} | got {error.strerror} | fix: make room, and go on with "
            "--resume true: the checkpoint holds its rows"
        ) from error


def in_percent(row: Mapping[str, float]) -> dict[str, float]:
    """Return the row of an epoch with COCO's numbers in percent, without those that do not exist.

    >>> in_percent({"epoch": 1, "AP": 0.5, "AP_large": -1})
    {'epoch': 1, 'AP': 50.0}
    """
    names = COCO_SETTINGS.stat_names
    return {
        name: 100 * value if name in names else value for name, value in row.items() if name not in names or value >= 0
    }


def duration(seconds: float) -> str:
    """Return seconds as a person says them.

    >>> duration(41), duration(754), duration(7500), duration(200_000)
    ('41 s', '13 min', '2 h 05 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"
