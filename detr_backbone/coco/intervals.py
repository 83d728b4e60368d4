"""How sure an AP is, and whether one detector is better than another: by half of the images, again and again.

A dataset is a sample of the images that could have been taken. The numbers of random halves of it show how far they
would have moved with another sample: a mean over half of n images, drawn without replacement, varies around that of all
n with the variance s^2 (2/n - 1/n) = s^2/n, as much as that of all n does around the truth.

AP is too high on few images: its envelope takes the best precision still to come. A half shows by how much, as it is
too high once more. The bias falls as n^(-2/3), an exponent found by simulation and not derived, so that the bias of the
whole is (mean of the halves - estimate) / (2^(2/3) - 1), and the interval is estimate - bias ± z · spread of the
halves. It may lie below the estimate. scripts/calibrate_intervals.py counts how often it covers.

Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982: half-sampling; Politis, Romano and Wolf,
Subsampling, 1999.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.average_precision import STATS, Numbers, average_precision
from detr_backbone.coco.matching import Matches
from detr_backbone.errors import EvaluationError

_BIAS_OF_HALF = 2 ** (2 / 3)
"""How many times as far too high AP is on half of the images; empirical."""
_AREAS_OF_STATS = (0, 0, 0, 1, 2, 3) * 2
_BLOCK = 2**24
"""Weights that are held at once."""


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
        """The difference in words and percent, with half the width of its interval.

        >>> interval = Interval(estimate=0.013, low=0.005, high=0.021)
        >>> Difference(a=0.4, b=0.413, interval=interval, p=0.004).sentence("AP")
        'B is better by 1.3 ± 0.8 AP (p = 0.004)'
        >>> Difference(a=0.413, b=0.4, interval=Interval(estimate=-0.013, low=-0.03, high=0.01), p=0.3).sentence("AP")
        'no difference shown: B - A is -1.3 ± 2.0 AP (p = 0.3)'
        """
        if math.isnan(self.p):
            return f"these images cannot tell a difference in {name}"
        half = 50 * (self.interval.high - self.interval.low)
        if self.p > 1 - level:
            return (
                f"no difference shown: B - A is {100 * (self.b - self.a):+.1f} ± {half:.1f} {name} (p = {self.p:.2g})"
            )
        better = "B" if self.b > self.a else "A"
        return f"{better} is better by {100 * abs(self.b - self.a):.1f} ± {half:.1f} {name} (p = {self.p:.2g})"


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
    """Intervals of all numbers; none of one whose objects are all in one image.

    Args:
        matches: of a detector.
        resamples: halves of the images that are drawn; the same seed draws the same ones.
        level: the share of samples of images in which an interval is to cover.
        seed: of the draws.

    Raises:
        ValueError: `resamples` or `level` is out of range.
    """
    _check(resamples, level)
    estimates, drawn = _numbers(matches), _drawn(matches, resamples, seed)
    intervals = [_interval(*numbers, level) for numbers in zip(estimates, drawn, strict=True)]
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
    (numbers_a, drawn_a), (numbers_b, drawn_b) = ((_numbers(m), _drawn(m, resamples, seed)) for m in (a, b))
    differences = [
        Difference(a=float(x), b=float(y), interval=_interval(y - x, drawn, level, least=-1), p=_p_value(y - x, drawn))
        for x, y, drawn in zip(numbers_a, numbers_b, drawn_b - drawn_a, strict=True)
    ]
    return Comparison(
        stats=dict(zip(STATS, differences, strict=False)),
        per_class=dict(zip(a.category_names, differences[len(STATS) :], strict=True)),
        level=level,
        resamples=resamples,
    )


def draw_weights(images: int, resamples: int, *, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Which images each of B random halves holds, 0 or 1, [I, B], in blocks of halves that memory can hold.

    Of an odd number of images it is the smaller half, which makes intervals a little wide.
    """
    generator = np.random.default_rng(seed)
    block = max(1, min(1000, _BLOCK // max(1, images)))
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        weights = np.zeros((images, size), dtype=np.float32)
        order = generator.random((images, size)).argsort(axis=0)
        np.put_along_axis(weights, order[: images // 2], 1, axis=0)
        yield weights


def _check(resamples: int, level: float) -> None:
    if resamples < 2:
        raise ValueError(f"`resamples` must be at least 2, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level}")


def _numbers(matches: Matches) -> Numbers:
    """The twelve numbers and the AP of each class, [12 + K]."""
    numbers = average_precision(matches)
    return np.concatenate([numbers.stats, numbers.per_class])[:, 0]


def _drawn(matches: Matches, resamples: int, seed: int) -> Numbers:
    """The same of each half, [12 + K, B]; NaN where it has no objects to find, or all of them are in one image."""
    blocks = []
    for weights in draw_weights(len(matches.image_ids), resamples, seed=seed):
        numbers = average_precision(matches, weights)
        blocks.append(np.concatenate([numbers.stats, numbers.per_class]))
    drawn = np.concatenate(blocks, axis=1)
    drawn[~_in_two_images(matches)] = np.nan
    return drawn


def _in_two_images(matches: Matches) -> npt.NDArray[np.bool_]:
    """Whether the objects of each number are in two images or more, [12 + K]: one image says nothing of others."""
    counted = ~matches.object_ignored
    of_areas = [matches.object_image_index[counted[area]] for area in _AREAS_OF_STATS]
    of_classes = [
        matches.object_image_index[counted[0] & (matches.object_labels == label)]
        for label in range(len(matches.category_names))
    ]
    return np.array([len(np.unique(images)) > 1 for images in of_areas + of_classes])


def _interval(estimate: float, drawn: Numbers, level: float, *, least: float = 0) -> Interval:
    """Estimate - bias ± z · spread within [least, 1], over the halves that have objects to find."""
    from scipy.special import ndtri

    bias, spread = _bias_and_spread(estimate, drawn)
    half = float(ndtri((1 + level) / 2)) * spread
    low, high = (min(max(estimate - bias + side, least), 1) for side in (-half, half))
    return Interval(estimate=float(estimate), low=low, high=high)


def _p_value(estimate: float, drawn: Numbers) -> float:
    from scipy.special import ndtr

    bias, spread = _bias_and_spread(estimate, drawn)
    if spread == 0:
        return 1.0 if estimate == 0 else math.nan
    return float(2 * ndtr(-abs(estimate - bias) / spread))


def _bias_and_spread(estimate: float, drawn: Numbers) -> tuple[float, float]:
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < 2:
        return math.nan, math.nan
    return float(drawn.mean() - estimate) / (_BIAS_OF_HALF - 1), float(drawn.std(ddof=1))
