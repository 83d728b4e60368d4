"""The result of an evaluation, as text to read in percent, and as JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_backbone.coco.subset import image_ids_sha256
from detr_backbone.evaluation.intervals import Interval, Intervals
from detr_backbone.evaluation.settings import COCO_SETTINGS, EvaluationSettings

UNIT = "fractions of 1: an AP of 0.5 is 50 %"
"""The unit of AP, recall and their intervals in files for programs."""


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """The numbers of one evaluation, between 0 and 1; -1 without objects.

    Attributes:
        stats: COCO's twelve by name: AP over IoU 0.50 .. 0.95, at 0.50 and at 0.75, by object area (below 32^2, up to
            96^2, above, in square pixels), and the recall with 1, 10 and 100 detections and by area. Other settings
            give other ones, see `EvaluationSettings.stats`.
        per_class: AP by category name.
        num_images: images that were evaluated.
        num_expected: images that count; those not evaluated count as images without detections.
        part: a description of the subset of the dataset; empty for all of it.
        warnings: the faults of the annotations with which the numbers are misleading, each in a line.
        settings: which matches count.
    """

    stats: Mapping[str, float]
    per_class: Mapping[str, float]
    num_images: int
    num_expected: int
    part: str = ""
    warnings: tuple[str, ...] = ()
    settings: EvaluationSettings = COCO_SETTINGS

    def table(self, intervals: Intervals | None = None) -> str:
        """Return the numbers as lines of text, in percent, with their intervals; `-` for what does not exist."""
        lines = [f"images {self.num_images} of {self.num_expected}"]
        lines += [f"subset {self.part}"] if self.part else []
        lines += [f"settings {self.settings}"] if self.settings != COCO_SETTINGS else []
        ranges = (None, None) if intervals is None else (intervals.stats, intervals.per_class)
        for numbers, of_numbers in zip((self.stats, self.per_class), ranges, strict=True):
            width = max(map(len, numbers))
            lines += [
                f"{name:<{width}} {percent(value):>5}{_range(of_numbers[name]) if of_numbers and value >= 0 else ''}"
                for name, value in numbers.items()
            ]
        every = [] if intervals is None else [*intervals.stats.items(), *intervals.per_class.items()]
        if biased := [name for name, interval in every if interval.is_biased]:
            names = f"{', '.join(biased[:5])}{', ...' if len(biased) > 5 else ''}"
            lines.append(
                f"outside of the interval, which is corrected for bias, as AP is too high on few images: {names}"
            )
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def write_result(
    folder: Path | str,
    result: CocoResult,
    *,
    detections: Sequence[Any],
    image_ids: Sequence[int],
    intervals: Intervals | None = None,
) -> None:
    """Write results.json with the numbers, and detections.json, a COCO results file.

    Args:
        folder: the folder to write, made if missing.
        result: the numbers.
        detections: of the evaluator.
        image_ids: of the evaluator.
        intervals: of the numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "unit": UNIT,
        "stats": dict(result.stats),
        "per_class": dict(result.per_class),
        "images": result.num_images,
        "subset": result.part,
        "settings": result.settings.to_dict(),
        "warnings": list(result.warnings),
        "image_ids_sha256": image_ids_sha256(image_ids),
    }
    if intervals is not None:
        numbers["intervals"] = intervals.to_dict()
    (folder / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    (folder / "detections.json").write_text(json.dumps(detections), encoding="utf-8")


def percent(value: float) -> str:
    """Return a number between 0 and 1 in percent with one decimal, `-` for one that does not exist.

    >>> percent(0.5046), percent(-1)
    ('50.5', '-')
    """
    return "-" if value < 0 else f"{100 * value:.1f}"


def _range(interval: Interval) -> str:
    return " -" if math.isnan(interval.low) else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
