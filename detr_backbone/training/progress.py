"""What a run shows while it goes, and what it writes down: a bar with losses and time left, and a CSV file."""

import csv
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from detr_backbone.evaluation.result import percent
from detr_backbone.evaluation.settings import COCO_SETTINGS
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.data import Batch, Loader

LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
COLUMNS = ("epoch", "step", "seconds", "lr", *LOSSES, *COCO_SETTINGS.stat_names, "padding")


class Means:
    """Running means of the losses of an epoch, and the share of padding in its batches, in this process."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._pixels = self._cells = 0

    def add(self, losses: Mapping[str, Tensor], images: NestedTensor) -> None:
        """Count the losses of one step, and the padding of its batch."""
        self._count += 1
        self._pixels += sum(height * width for height, width in images.sizes)
        self._cells += images.mask.numel()
        for name in LOSSES:
            self._sums[name] = self._sums.get(name, 0) + losses[name].detach()  # no wait for the device here

    def values(self) -> dict[str, float]:
        """The mean of each loss so far, and the share of all pixels that were padding."""
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        return means | {"padding": 1 - self._pixels / self._cells}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in self.values().items() if name.startswith("loss"))


class RunLog:
    """The run's console and its `metrics.csv`, one row per epoch; seconds count from the start of this process.

    Args:
        folder: where `metrics.csv` stands; rows are added to one that is there.
        is_main: whether this process shows and writes anything at all.
    """

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        from rich.console import Console

        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._path = folder / "metrics.csv" if is_main else None
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print text as it is."""
        self.console.print(text, markup=False)

    def steps(self, loader: Loader, means: Means, title: str) -> Iterator[Batch]:
        """The batches of an epoch, with a bar that shows `means` and the time left."""
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[means]}"),
        )
        with progress.Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(title, total=len(loader), means="")
            for batch in loader:
                yield batch
                bar.update(task, advance=1, means=str(means))

    def epoch(self, epoch: int, *, step: int, lr: float, means: Means, stats: Mapping[str, float]) -> None:
        """Print one line and write one row; `stats` is empty where nothing was evaluated."""
        seconds = time.monotonic() - self._start
        values = means.values()
        evaluated = "".join(f"  {name} {percent(stats[name])}" for name in ("AP", "AP50") if stats)
        self.say(f"epoch {epoch:>3}  {seconds / 60:5.1f} min  {means}  padding {values['padding']:.0%}{evaluated}")
        if self._path is None:
            return
        is_new = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            row = {"epoch": epoch, "step": step, "seconds": seconds, "lr": lr, **values, **stats}
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
