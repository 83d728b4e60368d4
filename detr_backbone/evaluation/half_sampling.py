"""Standard error and bias of COCO's numbers, estimated from random halves of the images.

A dataset is a sample of the images that could have been taken. The numbers of random halves of it show how far they
would have moved with another sample: a mean over half of n images, drawn without replacement, varies around that of
all n with the variance s^2 (2/n - 1/n) = s^2/n, as much as that of all n does around the truth. Every half is drawn
together with the other half of the images, so that what raises one lowers the other, and their mean is known well.

An AP is biased upwards on few images: its envelope takes the best precision still to come. The AP of a class in n
images has the bias A (n + 1)^(-2/3), a model fitted to simulations and not derived. The AP of a half has the bias of
its own images with the class, and the difference gives A: from one class alone for its AP, from all classes
together for a mean over classes, as a class in one or two images says little about itself. A recall has no envelope and
no bias.

Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982: half-sampling; Politis, Romano and Wolf,
Subsampling, 1999; Satterthwaite, An approximate distribution of estimates of variance components, 1946.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detr_backbone.coco.typed_arrays import BoolArray, FloatArray, IntArray
from detr_backbone.evaluation.average_precision import ResampledStats, Weights

_BIAS_OFFSET, _BIAS_EXPONENT = 1, -2 / 3
_BIAS_RELATIVE_ERROR = 0.1
"""Standard error of a bias as a fraction of itself; empirical, as the model is."""
_BLOCK = 2**24
"""Weights that are held at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfSamplingEstimates:
    """The S numbers of a result and the AP of each of K classes, all [S + K]; NaN where halves say nothing.

    Attributes:
        estimates: over all images.
        biases: how much too high they are.
        standard_errors: of the estimates.
        degrees_of_freedom: of the standard errors.
    """

    estimates: FloatArray
    biases: FloatArray
    standard_errors: FloatArray
    degrees_of_freedom: FloatArray

    def rows(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield estimate, bias, standard error and degrees of freedom of each number."""
        columns = (self.estimates, self.biases, self.standard_errors, self.degrees_of_freedom)
        return zip(*(column.tolist() for column in columns), strict=True)


def half_sampling(
    stats_of: Callable[[Weights | None], ResampledStats],
    images_with_class: IntArray,
    *,
    is_recall: BoolArray,
    images: int,
    resamples: int,
    seed: int,
) -> HalfSamplingEstimates:
    """Return bias and standard error of the numbers.

    Args:
        stats_of: returns the numbers of all images for None, and of resamples for weights [I, B].
        images_with_class: int64 [S, K], the images with objects of the class that count for the number.
        is_recall: bool [S], True for the numbers that are recalls.
        images: I.
        resamples: halves to draw, in pairs; the same seed draws the same ones.
        seed: of the draws.
    """
    whole = stats_of(None)
    by_class = whole.by_class[:, :, 0]
    count, total, squares = np.zeros((3, *by_class.shape))
    means = []
    for weights in draw_weights(images, resamples, seed=seed):
        drawn = stats_of(weights)
        means.append(drawn.stats)
        moved = drawn.by_class - by_class[:, :, None]
        defined = ~np.isnan(moved)
        moved[~defined] = 0
        count += defined.sum(axis=2)
        total += moved.sum(axis=2)
        squares += np.square(moved, out=moved).sum(axis=2)
    usable = (images_with_class > 1) & (count > 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(usable, total / count, np.nan)
        variances = np.where(usable, (squares - total**2 / count).clip(0) / (count - 1), np.nan)
    class_errors = np.sqrt(variances[0])
    mean_errors = np.array([_standard_deviation(one) for one in np.concatenate(means, axis=1)])
    mean_errors[~usable.any(axis=1)] = np.nan

    model, model_of_halves = _bias_model(images_with_class, images)
    with np.errstate(invalid="ignore", divide="ignore"):
        class_biases = excess[0] * model[0] / (model_of_halves - model)[0]
        factors = np.nansum(excess, axis=1) / np.where(usable, model_of_halves - model, 0).sum(axis=1)
        has_class = images_with_class > 0
        mean_biases = factors * np.where(has_class, model, 0).sum(axis=1) / has_class.sum(axis=1)
        degrees = np.nansum(variances, axis=1) ** 2 / np.nansum(variances**2 / (images_with_class - 1), axis=1)
    mean_biases[is_recall] = 0
    biases = np.concatenate([mean_biases, class_biases])
    return HalfSamplingEstimates(
        estimates=np.concatenate([whole.stats[:, 0], by_class[0]]),
        biases=biases,
        standard_errors=np.hypot(np.concatenate([mean_errors, class_errors]), _BIAS_RELATIVE_ERROR * biases),
        degrees_of_freedom=np.concatenate([degrees, images_with_class[0] - 1.0]),
    )


def draw_weights(images: int, resamples: int, *, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield which images each of B random halves holds, 0 or 1, [I, B], in blocks of halves that memory can hold.

    They come in pairs that share no image. Of an odd number of images both leave one out, which makes intervals
    slightly wide.
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


def _standard_deviation(drawn: FloatArray) -> float:
    drawn = drawn[~np.isnan(drawn)]
    return float(drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")


def _bias_model(images_with_class: IntArray, images: int) -> tuple[FloatArray, FloatArray]:
    """Return the bias of an AP over n images without its factor A, and the mean of it over the halves.

    Of the halves, those with the class count; how many of its images they hold is hypergeometric.
    """
    half = images // 2
    counts, inverse = np.unique(images_with_class, return_inverse=True)
    of_halves = np.full(len(counts), np.nan)
    for index, count in enumerate(counts.tolist()):
        drawn = np.arange(max(1, half - (images - count)), min(count, half) + 1)
        if len(drawn):
            logarithms = _log_choices(count, drawn) + _log_choices(images - count, half - drawn)
            probabilities = np.exp(logarithms - logarithms.max())
            of_halves[index] = (probabilities * _relative_bias(drawn)).sum() / probabilities.sum()
    return _relative_bias(images_with_class), of_halves[inverse].reshape(images_with_class.shape)


def _relative_bias(images: IntArray) -> FloatArray:
    return np.power(images + np.float64(_BIAS_OFFSET), _BIAS_EXPONENT)


def _log_choices(of: int, drawn: IntArray) -> FloatArray:
    from scipy.special import gammaln

    return gammaln(of + 1) - gammaln(drawn + 1) - gammaln(of - drawn + 1)
