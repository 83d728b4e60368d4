"""Confidence intervals of COCO's numbers and of the difference of two detectors, from random halves of the images.

An interval is estimate - bias ± t · standard error, with the quantile t of Student's distribution, as a standard error
from few images is itself uncertain. It may lie below the estimate: `half_sampling` says where bias and standard error
come from. benchmarks/calibrate_intervals.py counts how often intervals cover.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from detr_backbone.coco.typed_arrays import IntArray
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import ResampledStats, Weights, average_precision
from detr_backbone.evaluation.half_sampling import HalfSamplingEstimates, half_sampling
from detr_backbone.evaluation.matching import Matches

Number = TypeVar("Number")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number over these images, and the range that covers its value over all images like them; NaN without a range.

    Printed in percent:

    >>> print(Interval(estimate=0.54, low=0.512, high=0.57))
    54.0 [51.2, 57.0]
    """

    estimate: float
    low: float
    high: float

    @property
    def is_biased(self) -> bool:
        """True if the estimate lies outside of the range, which is corrected for bias."""
        return self.estimate < self.low or self.estimate > self.high

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "-"
        return f"{100 * self.estimate:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, kw_only=True)
class _ByName(Generic[Number]):
    """One entry for each of COCO's numbers.

    Attributes:
        stats: by the names of `EvaluationSettings.stats`.
        per_class: AP by category name.
        level: the fraction of samples in which an interval covers.
        resamples: how many halves were drawn.
    """

    stats: Mapping[str, Number]
    per_class: Mapping[str, Number]
    level: float
    resamples: int

    def _to_dict(self, plain: Callable[[Number], Any]) -> dict[str, Any]:
        """Return entries as plain values by name; those for which there is none are left out."""
        kinds = (("stats", self.stats), ("per_class", self.per_class))
        entries = {kind: {name: plain(one) for name, one in numbers.items()} for kind, numbers in kinds}
        return {
            "level": self.level,
            "resamples": self.resamples,
            **{kind: {k: v for k, v in values.items() if v is not None} for kind, values in entries.items()},
        }


class Intervals(_ByName[Interval]):
    """An interval for each of COCO's numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Return low and high by name, between 0 and 1, for a JSON file; numbers without an interval are left out."""
        return self._to_dict(lambda one: None if math.isnan(one.low) else [one.low, one.high])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number of two detectors on the same images.

    Attributes:
        a: of the first.
        b: of the second.
        interval: of b - a.
        p: the probability that chance alone shows a difference as large, two-sided; NaN where there are too few images.
    """

    a: float
    b: float
    interval: Interval
    p: float

    def sentence(self, name: str, *, level: float = 0.95) -> str:
        """Return the difference in words and percent.

        >>> interval = Interval(estimate=0.013, low=0.005, high=0.021)
        >>> Difference(a=0.4, b=0.413, interval=interval, p=0.004).sentence("AP")
        'B is better: B - A is +1.3 AP [+0.5, +2.1] (p = 0.004)'
        >>> Difference(a=0.413, b=0.4, interval=Interval(estimate=-0.013, low=-0.03, high=0.01), p=0.3).sentence("AP")
        'no difference shown: B - A is -1.3 AP [-3.0, +1.0] (p = 0.3)'
        """
        if math.isnan(self.p):
            return f"too few images to compare {name}"
        low, high = self.interval.low, self.interval.high
        verdict = "no difference shown" if self.p > 1 - level else f"{'B' if low + high > 0 else 'A'} is better"
        numbers = f"{100 * self.interval.estimate:+.1f} {name} [{100 * low:+.1f}, {100 * high:+.1f}]"
        return f"{verdict}: B - A is {numbers} (p = {self.p:.2g})"


class Comparison(_ByName[Difference]):
    """Each of COCO's numbers of detector A and detector B."""

    def to_dict(self) -> dict[str, Any]:
        """Return differences by name, between -1 and 1, for a JSON file; those without an interval are left out."""
        return self._to_dict(lambda one: None if math.isnan(one.p) else asdict(one))

    def __str__(self) -> str:
        width = max(map(len, [*self.stats, *self.per_class]))
        lines = [self.stats["AP"].sentence("AP", level=self.level), "", f"{'':<{width}}      A      B  B - A  interval"]
        every = [*self.stats.items(), *self.per_class.items()]
        for name, one in every:
            if math.isnan(one.a):
                lines.append(f"{name:<{width}}      -      -      -  -")
                continue
            numbers = f"{100 * one.a:6.1f} {100 * one.b:6.1f} {100 * (one.b - one.a):+6.1f}"
            interval = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}] p = {one.p:.3f}"
            lines.append(f"{name:<{width}} {numbers}  {'-' if math.isnan(one.p) else interval}")
        if biased := [name for name, one in every if not math.isnan(one.p) and one.interval.is_biased]:
            lines.append(f"B - A outside of the interval, which is corrected for bias: {', '.join(biased)}")
        return "\n".join(lines)


def resample_intervals(matches: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Intervals:
    """Return intervals of all numbers; none where each class is in one image only, or where halves never differ.

    Args:
        matches: of a detector.
        resamples: halves of the images to draw; the same seed draws the same ones.
        level: the fraction of samples of images in which an interval is to cover.
        seed: of the draws.

    Raises:
        ValueError: `resamples` or `level` is out of range.
    """
    _check(resamples, level)
    estimates = _half_sampling(matches, lambda weights: average_precision(matches, weights), resamples, seed)
    intervals = [
        _student_interval(*row, level=level) if row[2] > 0 else Interval(estimate=row[0], low=math.nan, high=math.nan)
        for row in estimates.rows()
    ]
    names = matches.settings.stat_names
    return Intervals(
        stats=dict(zip(names, intervals, strict=False)),
        per_class=dict(zip(matches.category_names, intervals[len(names) :], strict=True)),
        level=level,
        resamples=resamples,
    )


def compare(a: Matches, b: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Comparison:
    """Return the differences of two detectors on the same images, each half drawn for both: see `resample_intervals`.

    Raises:
        EvaluationError: the two were not matched to the same objects, or with other settings.
        ValueError: `resamples` or `level` is out of range.
    """
    _check(resamples, level)
    for name in ("image_ids", "category_names", "object_index"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise EvaluationError(f"detectors were not evaluated on the same ground truth | where: key={name}")
    if a.settings != b.settings:
        raise EvaluationError(f"detectors were not evaluated alike | got {a.settings} and {b.settings}")

    def difference(weights: Weights | None) -> ResampledStats:
        one, other = average_precision(a, weights), average_precision(b, weights)
        return ResampledStats(stats=other.stats - one.stats, by_class=other.by_class - one.by_class)

    estimates = _half_sampling(a, difference, resamples, seed)
    whole = [average_precision(m) for m in (a, b)]
    values = [np.concatenate([numbers.stats, numbers.per_class])[:, 0].tolist() for numbers in whole]
    differences = [
        Difference(a=of_a, b=of_b, interval=_student_interval(*row, level=level, least=-1), p=_p_value(*row))
        for of_a, of_b, row in zip(*values, estimates.rows(), strict=True)
    ]
    names = a.settings.stat_names
    return Comparison(
        stats=dict(zip(names, differences, strict=False)),
        per_class=dict(zip(a.category_names, differences[len(names) :], strict=True)),
        level=level,
        resamples=resamples,
    )


def _check(resamples: int, level: float) -> None:
    if resamples < 2:
        raise ValueError(f"`resamples` must be at least 2, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")


def _half_sampling(matches: Matches, stats_of: Any, resamples: int, seed: int) -> HalfSamplingEstimates:
    return half_sampling(
        stats_of,
        _images_with_class(matches),
        is_recall=np.array([stat.is_recall for stat in matches.settings.stats]),
        images=len(matches.image_ids),
        resamples=resamples,
        seed=seed,
    )


def _images_with_class(matches: Matches) -> IntArray:
    """Return how many images have objects of a class that count for a number: int64 [S, K]."""
    classes = len(matches.category_names)
    pairs = matches.object_labels * len(matches.image_ids) + matches.object_image_index
    of_areas = [
        np.bincount(np.unique(pairs[~ignored]) // max(1, len(matches.image_ids)), minlength=classes)
        for ignored in matches.object_ignored
    ]
    return np.stack([of_areas[stat.area] for stat in matches.settings.stats])


def _student_interval(
    estimate: float, bias: float, standard_error: float, degrees_of_freedom: float, *, level: float, least: float = 0
) -> Interval:
    """Return estimate - bias ± t · standard error within [least, 1]."""
    from scipy.special import stdtrit

    half = float(stdtrit(degrees_of_freedom, (1 + level) / 2)) * standard_error if standard_error else 0.0
    low, high = (min(max(estimate - bias + side, least), 1) for side in (-half, half))
    return Interval(estimate=estimate, low=low, high=high)


def _p_value(estimate: float, bias: float, standard_error: float, degrees_of_freedom: float) -> float:
    from scipy.special import stdtr

    if standard_error == 0:
        return 1.0 if estimate == 0 else math.nan
    return float(2 * stdtr(degrees_of_freedom, -abs(estimate - bias) / standard_error))
