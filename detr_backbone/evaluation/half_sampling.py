"""What random halves of the images tell of COCO's numbers: how far they move, and how much too high they are.

A dataset is a sample of the images that could have been taken. The numbers of random halves of it show how far they
would have moved with another sample: a mean over half of n images, drawn without replacement, varies around that of
all n with the variance s^2 (2/n - 1/n) = s^2/n, as much as that of all n does around the truth. Every half is drawn
together with the other half of the images, so that what lifts one lowers the other, and their mean is known well.

An AP is too high on few images: its envelope takes the best precision still to come. The AP of a class that n images
hold is too high by A (n + 1)^(-2/3), a law found by simulation and not derived. Halves are too high once more, by what
the law says of the images that they hold of the class, and this tells A: of one class alone for its AP, of all classes
together for a mean over classes, as a class in one image or two tells little of itself. A recall has no envelope and is
taken as it is.

Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982: half-sampling; Politis, Romano and Wolf,
Subsampling, 1999; Satterthwaite, An approximate distribution of estimates of variance components, 1946.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from detr_backbone.evaluation.average_precision import Numbers, Resampled, Weights

Rows: TypeAlias = npt.NDArray[np.int64]

APS = 6
"""The first so many of COCO's twelve numbers are APs, the others recalls."""
_LAW_OFFSET, _LAW_EXPONENT = 1, -2 / 3
_LAW_UNSURE = 0.1
"""By this share of itself the bias is taken to be unsure; empirical, as the law is."""
_BLOCK = 2**24
"""Weights that are held at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spreads:
    """The twelve numbers and the AP of each of K classes, all [12 + K]; NaN where halves tell nothing.

    Attributes:
        estimates: over all images.
        biases: how much too high they are.
        spreads: standard deviations.
        freedom: how many independent deviations a spread rests on: its degrees of freedom.
    """

    estimates: Numbers
    biases: Numbers
    spreads: Numbers
    freedom: Numbers

    def rows(self) -> Iterator[tuple[float, float, float, float]]:
        """Estimate, bias, spread and freedom of each number."""
        columns = (self.estimates, self.biases, self.spreads, self.freedom)
        return zip(*(column.tolist() for column in columns), strict=True)


def spreads_of(
    numbers_of: Callable[[Weights | None], Resampled], holders: Rows, *, images: int, resamples: int, seed: int
) -> Spreads:
    """How sure numbers are.

    Args:
        numbers_of: gives the numbers of all images for None, and of resamples for weights [I, B].
        holders: int64 [12, K], how many images hold objects of the class that count for the number.
        images: I.
        resamples: halves that are drawn, in pairs; the same seed draws the same ones.
        seed: of the draws.
    """
    whole = numbers_of(None)
    by_class = whole.by_class[:, :, 0]
    count, total, squares = np.zeros((3, *by_class.shape))
    means = []
    for weights in draw_weights(images, resamples, seed=seed):
        drawn = numbers_of(weights)
        means.append(drawn.stats)
        moved = drawn.by_class - by_class[:, :, None]
        there = ~np.isnan(moved)
        moved[~there] = 0
        count += there.sum(axis=2)
        total += moved.sum(axis=2)
        squares += np.square(moved, out=moved).sum(axis=2)
    tells = (holders > 1) & (count > 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        higher = np.where(tells, total / count, np.nan)
        variances = np.where(tells, (squares - total**2 / count).clip(0) / (count - 1), np.nan)
    of_classes = np.sqrt(variances[0])
    of_means = np.array([_deviation(one) for one in np.concatenate(means, axis=1)])
    of_means[~tells.any(axis=1)] = np.nan

    law, of_halves = _law(holders, images)
    with np.errstate(invalid="ignore", divide="ignore"):
        class_biases = higher[0] * law[0] / (of_halves - law)[0]
        factors = np.nansum(higher, axis=1) / np.where(tells, of_halves - law, 0).sum(axis=1)
        mean_biases = factors * np.where(holders > 0, law, 0).sum(axis=1) / (holders > 0).sum(axis=1)
        freedom = np.nansum(variances, axis=1) ** 2 / np.nansum(variances**2 / (holders - 1), axis=1)
    mean_biases[APS:] = 0
    biases = np.concatenate([mean_biases, class_biases])
    return Spreads(
        estimates=np.concatenate([whole.stats[:, 0], by_class[0]]),
        biases=biases,
        spreads=np.hypot(np.concatenate([of_means, of_classes]), _LAW_UNSURE * biases),
        freedom=np.concatenate([freedom, holders[0] - 1.0]),
    )


def draw_weights(images: int, resamples: int, *, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Which images each of B random halves holds, 0 or 1, [I, B], in blocks of halves that memory can hold.

    They come in pairs that share no image. Of an odd number of images both leave one out, which makes intervals a
    little wide.
    """
    generator = np.random.default_rng(seed)
    block = 2 * max(1, min(500, _BLOCK // max(1, 2 * images)))
    half = images // 2
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        weights = np.zeros((images, size), dtype=np.float32)
        order = generator.random((images, (size + 1) // 2)).argsort(axis=0)
        np.put_along_axis(weights[:, ::2], order[:half], 1, axis=0)
        np.put_along_axis(weights[:, 1::2], order[half : 2 * half, : size // 2], 1, axis=0)
        yield weights


def _deviation(drawn: Numbers) -> float:
    drawn = drawn[~np.isnan(drawn)]
    return float(drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")


def _law(holders: Rows, images: int) -> tuple[Numbers, Numbers]:
    """How much too high the AP of a class is that n images hold, but for the factor A, and on average in the halves.

    Of the halves, those count that hold the class at all; how many of its images they hold is hypergeometric.
    """
    half = images // 2
    counts, place = np.unique(holders, return_inverse=True)
    of_halves = np.full(len(counts), np.nan)
    for index, count in enumerate(counts.tolist()):
        drawn = np.arange(max(1, half - (images - count)), min(count, half) + 1)
        if len(drawn):
            logarithms = _log_choices(count, drawn) + _log_choices(images - count, half - drawn)
            chances = np.exp(logarithms - logarithms.max())
            of_halves[index] = (chances * _too_high(drawn)).sum() / chances.sum()
    return _too_high(holders), of_halves[place].reshape(holders.shape)


def _too_high(images: Rows) -> Numbers:
    return np.power(images + np.float64(_LAW_OFFSET), _LAW_EXPONENT)


def _log_choices(of: int, drawn: Rows) -> Numbers:
    from scipy.special import gammaln

    result: Numbers = gammaln(of + 1) - gammaln(drawn + 1) - gammaln(of - drawn + 1)
    return result
