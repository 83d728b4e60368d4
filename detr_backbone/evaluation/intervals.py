"""How sure an AP is, and whether one detector is better than another: by half of the images, again and again.

An interval is estimate - bias ± t · spread, with the quantile t of Student's distribution, as a spread that rests on
few images is itself unsure. It may lie below the estimate: `halves` says where bias and spread come from.
benchmarks/calibrate_intervals.py counts how often intervals cover.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import STATS, Resampled, Weights, average_precision
from detr_backbone.evaluation.half_sampling import Rows, spreads_of
from detr_backbone.evaluation.matching import Matches

_AREAS_OF_STATS = (0, 0, 0, 1, 2, 3) * 2
"""Area range of each of the twelve."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number of these images, and the range that covers what it would be over all images alike; NaN where none is.

    >>> print(Interval(estimate=0.54, low=0.512, high=0.57))
    0.540 [0.512, 0.570]
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.low) else f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """An interval for each of COCO's numbers.

    Attributes:
        stats: the twelve by name.
        per_class: AP by category name.
        level: the share of samples in which an interval covers.
        resamples: how many halves were drawn.
    """

    stats: Mapping[str, Interval]
    per_class: Mapping[str, Interval]
    level: float
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: low and high by name, without those that there are not."""
        return {
            "level": self.level,
            "resamples": self.resamples,
            **{
                kind: {name: [one.low, one.high] for name, one in intervals.items() if not math.isnan(one.low)}
                for kind, intervals in (("stats", self.stats), ("per_class", self.per_class))
            },
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number of two detectors on the same images.

    Attributes:
        a: of the first.
        b: of the second.
        interval: of b - a.
        p: how often chance alone would show a difference as large, two-sided; NaN where these images cannot tell.
    """

    a: float
    b: float
    interval: Interval
    p: float

    def sentence(self, name: str, *, level: float = 0.95) -> str:
        """The middle of the interval in words and percent, with half of its width.

        >>> interval = Interval(estimate=0.013, low=0.005, high=0.021)
        >>> Difference(a=0.4, b=0.413, interval=interval, p=0.004).sentence("AP")
        'B is better by 1.3 ± 0.8 AP (p = 0.004)'
        >>> Difference(a=0.413, b=0.4, interval=Interval(estimate=-0.013, low=-0.03, high=0.01), p=0.3).sentence("AP")
        'no difference shown: B - A is -1.0 ± 2.0 AP (p = 0.3)'
        """
        if math.isnan(self.p):
            return f"these images cannot tell a difference in {name}"
        middle, half = (50 * (self.interval.high + sign * self.interval.low) for sign in (1, -1))
        if self.p > 1 - level:
            return f"no difference shown: B - A is {middle:+.1f} ± {half:.1f} {name} (p = {self.p:.2g})"
        better = "B" if middle > 0 else "A"
        return f"{better} is better by {abs(middle):.1f} ± {half:.1f} {name} (p = {self.p:.2g})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Each of COCO's numbers of detector A and detector B.

    Attributes:
        stats: the twelve by name.
        per_class: AP by category name.
        level: the share of samples in which an interval covers.
        resamples: how many halves were drawn.
    """

    stats: Mapping[str, Difference]
    per_class: Mapping[str, Difference]
    level: float
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: every difference by name, without those that there are not."""
        return {
            "level": self.level,
            "resamples": self.resamples,
            **{
                kind: {name: asdict(one) for name, one in differences.items() if not math.isnan(one.p)}
                for kind, differences in (("stats", self.stats), ("per_class", self.per_class))
            },
        }

    def __str__(self) -> str:
        width = max(map(len, [*self.stats, *self.per_class]))
        lines = [self.stats["AP"].sentence("AP", level=self.level), "", f"{'':<{width}}      A      B  B - A  interval"]
        for name, one in [*self.stats.items(), *self.per_class.items()]:
            if math.isnan(one.a):
                lines.append(f"{name:<{width}}      -      -      -")
                continue
            numbers = f"{100 * one.a:6.1f} {100 * one.b:6.1f} {100 * (one.b - one.a):+6.1f}"
            around = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}] p = {one.p:.3f}"
            lines.append(f"{name:<{width}} {numbers}  {'-' if math.isnan(one.p) else around}")
        return "\n".join(lines)


def resample_intervals(matches: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Intervals:
    """Intervals of all numbers; none where the objects of each class are in one image, or where halves never differ.

    Args:
        matches: of a detector.
        resamples: halves of the images that are drawn; the same seed draws the same ones.
        level: the share of samples of images in which an interval is to cover.
        seed: of the draws.

    Raises:
        ValueError: `resamples` or `level` is out of range.
    """
    _check(resamples, level)
    spreads = spreads_of(
        lambda weights: average_precision(matches, weights),
        _holders(matches),
        images=len(matches.image_ids),
        resamples=resamples,
        seed=seed,
    )
    intervals = [
        _interval(*row, level=level) if row[2] > 0 else Interval(estimate=row[0], low=math.nan, high=math.nan)
        for row in spreads.rows()
    ]
    return Intervals(
        stats=dict(zip(STATS, intervals, strict=False)),
        per_class=dict(zip(matches.category_names, intervals[len(STATS) :], strict=True)),
        level=level,
        resamples=resamples,
    )


def compare(a: Matches, b: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Comparison:
    """What sets two detectors apart on the same images, each half taken for both: see `resample_intervals`.

    Raises:
        EvaluationError: the two were not matched to the same objects.
        ValueError: `resamples` or `level` is out of range.
    """
    _check(resamples, level)
    for name in ("image_ids", "category_names", "object_index"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise EvaluationError(f"detectors were not evaluated on the same ground truth | where: key={name}")

    def difference(weights: Weights | None) -> Resampled:
        one, other = average_precision(a, weights), average_precision(b, weights)
        return Resampled(stats=other.stats - one.stats, by_class=other.by_class - one.by_class)

    spreads = spreads_of(difference, _holders(a), images=len(a.image_ids), resamples=resamples, seed=seed)
    whole = [average_precision(m) for m in (a, b)]
    values = [np.concatenate([numbers.stats, numbers.per_class])[:, 0].tolist() for numbers in whole]
    differences = [
        Difference(a=of_a, b=of_b, interval=_interval(*row, level=level, least=-1), p=_p_value(*row))
        for of_a, of_b, row in zip(*values, spreads.rows(), strict=True)
    ]
    return Comparison(
        stats=dict(zip(STATS, differences, strict=False)),
        per_class=dict(zip(a.category_names, differences[len(STATS) :], strict=True)),
        level=level,
        resamples=resamples,
    )


def _check(resamples: int, level: float) -> None:
    if resamples < 2:
        raise ValueError(f"`resamples` must be at least 2, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")


def _holders(matches: Matches) -> Rows:
    """How many images hold objects of a class that count for a number: int64 [12, K]."""
    classes = len(matches.category_names)
    pairs = matches.object_labels * len(matches.image_ids) + matches.object_image_index
    of_areas = [
        np.bincount(np.unique(pairs[~ignored]) // max(1, len(matches.image_ids)), minlength=classes)
        for ignored in matches.object_ignored
    ]
    return np.stack([of_areas[area] for area in _AREAS_OF_STATS])


def _interval(
    estimate: float, bias: float, spread: float, freedom: float, *, level: float, least: float = 0
) -> Interval:
    """Estimate - bias ± t · spread within [least, 1]."""
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, (1 + level) / 2)) * spread if spread else 0.0
    low, high = (min(max(estimate - bias + side, least), 1) for side in (-half, half))
    return Interval(estimate=estimate, low=low, high=high)


def _p_value(estimate: float, bias: float, spread: float, freedom: float) -> float:
    from scipy.special import stdtr

    if spread == 0:
        return 1.0 if estimate == 0 else math.nan
    return float(2 * stdtr(freedom, -abs(estimate - bias) / spread))
