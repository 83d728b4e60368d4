"""Resamples by weights are resamples of copies, and the intervals are what the halves of the images say."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import average_precision
from detr_backbone.evaluation.half_sampling import draw_weights, half_sampling
from detr_backbone.evaluation.intervals import Comparison, Difference, Interval, compare, resample_intervals
from detr_backbone.evaluation.matching import Matches, match
from detr_backbone.evaluation.settings import COCO_SETTINGS, EvaluationSettings
from detr_backbone.evaluation.simulation import simulate
from tests.coco_sets import matched, plain_pycocotools, random_set

HALF = 51 / 101
"""AP when one of two objects is found first: precision 1 at the recalls 0, 0.01 .. 0.5 of 101."""


def two_images(*found: int) -> Matches:
    """One object in each of two images, and a perfect detection in those that are named."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20]} for i in (1, 2)],
    }
    return matched(content, [{"image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9} for i in found])


def four_images() -> Matches:
    """One object in each of four images: 1 and 2 are found, 3 has a detection elsewhere that is best of all, 4 none."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2, 3, 4)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20]} for i in (1, 2, 3, 4)],
    }
    found = [
        {"image_id": image, "category_id": 1, "bbox": [x, 10, 20, 20], "score": score}
        for image, x, score in ((1, 10, 0.9), (2, 10, 0.8), (3, 60, 0.95))
    ]
    return matched(content, found)


def copied(
    content: dict[str, Any], results: list[dict[str, Any]], weights: list[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The dataset in which each image stands as often as its weight, copies side by side under ids of their own."""
    images, annotations, found = [], [], []
    for image, weight in zip(content["images"], weights, strict=True):
        for _ in range(weight):
            new = {"image_id": len(images)}
            images.append({**image, "id": len(images)})
            annotations += [{**one, **new} for one in content["annotations"] if one["image_id"] == image["id"]]
            found += [{**one, **new} for one in results if one["image_id"] == image["id"]]
    return {**content, "images": images, "annotations": annotations}, found


@pytest.mark.parametrize("seed", range(3))
def test_weights_count_images_as_pycocotools_counts_copies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    content, results = random_set(rng)
    weights = rng.multinomial(12, [1 / 12] * 12, size=4).T
    weights[:, 0] = 0  # nothing is left to find
    weights[0, 0] = 12

    drawn = average_precision(matched(content, results), weights.astype(np.float64))

    for column in range(4):
        stats, per_class = plain_pycocotools(*copied(content, results, weights[:, column].tolist()))
        np.testing.assert_allclose(np.nan_to_num(drawn.stats[:, column], nan=-1), stats, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.nan_to_num(drawn.per_class[:, column], nan=-1), per_class, rtol=0, atol=1e-12)


def test_single_precision_gives_six_digits() -> None:
    matches = matched(*random_set(np.random.default_rng(1)))
    (weights,) = draw_weights(12, 50, seed=0)

    single, double = (average_precision(matches, w).stats for w in (weights, weights.astype(np.float64)))

    np.testing.assert_allclose(single, double, rtol=0, atol=1e-6)


def test_all_resamples_of_two_images() -> None:
    draws = list(itertools.product((0, 1), repeat=2))  # each of two images, twice
    weights = np.array([[draw.count(image) for draw in draws] for image in (0, 1)], dtype=np.float64)

    drawn = average_precision(two_images(1), weights).per_class[0]

    assert drawn.tolist() == pytest.approx([1, HALF, HALF, 0])


def student(t: float) -> float:
    """Student's distribution function with three degrees of freedom, in closed form."""
    u = t / math.sqrt(3)
    return 0.5 + (u / (1 + u**2) + math.atan(u)) / math.pi


def test_an_interval_is_the_estimate_less_its_bias_and_a_share_of_a_spread_to_each_side() -> None:
    level = 2 * student(0.2) - 1  # four images leave three degrees of freedom
    interval = resample_intervals(four_images(), resamples=20_000, level=level).stats["AP"]

    # all four: of the best 1, 2, 3 detections 0, 1, 2 are right, so that half of the objects are found at precision 2/3
    estimate = HALF * 2 / 3
    # the halves 12, 13, 14, 23, 24, 34 are equally probable
    halves = [1, HALF / 2, HALF, HALF / 2, HALF, 0]
    mean = sum(halves) / 6
    # four images hold the class, and two in every half: too high as 1 / 5^(2/3) and 1 / 3^(2/3)
    bias = (mean - estimate) / ((5 / 3) ** (2 / 3) - 1)
    spread = math.hypot(math.sqrt(sum(one**2 for one in halves) / 6 - mean**2), bias / 10)
    assert interval.estimate == pytest.approx(estimate)
    # the standard error of the mean of 20,000 draws is 0.002, that of the centre 0.005
    expected = (estimate - bias - spread / 5, estimate - bias + spread / 5)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.015)


def test_a_recall_is_taken_as_it_is() -> None:
    interval = resample_intervals(four_images(), resamples=20_000).stats["AR_100"]

    # the halves recall 1, 1/2, 1/2, 1/2, 1/2, 0 of their objects: a spread of sqrt(1/12)
    assert 0.5 - interval.low == interval.high - 0.5 == 0.5  # 3.18 spreads, cut off at 0 and 1
    narrow = resample_intervals(four_images(), resamples=20_000, level=2 * student(0.5) - 1).stats["AR_100"]
    assert (narrow.low, narrow.high) == pytest.approx((0.5 - 12**-0.5 / 2, 0.5 + 12**-0.5 / 2), abs=0.01)


def test_classes_tell_together_how_much_too_high_their_mean_is() -> None:
    """Four images: cat in all of them, as `four_images`; dog in the first two, found and not found; cow in one."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2, 3, 4)],
        "categories": [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (3, "cow"))],
        "annotations": [
            {"id": n, "image_id": image, "category_id": label, "bbox": [10, 10, 20, 20]}
            for n, (image, label) in enumerate([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (4, 3)], start=1)
        ],
    }
    found = [
        {"image_id": image, "category_id": label, "bbox": [x, 10, 20, 20], "score": score}
        for image, label, x, score in (
            *((1, 1, 10, 0.9), (2, 1, 10, 0.8), (3, 1, 60, 0.95)),
            *((1, 2, 10, 0.9), (3, 2, 60, 0.99), (4, 3, 10, 0.9)),
        )
    ]
    matches = matched(content, found)
    estimates = half_sampling(
        lambda weights: average_precision(matches, weights),
        np.tile([4, 2, 1], (12, 1)),
        is_recall=np.array([False] * 6 + [True] * 6),
        images=4,
        resamples=20_000,
        seed=0,
    )

    cat, cats = HALF * 2 / 3, [1, HALF / 2, HALF, HALF / 2, HALF, 0]  # as above
    # dog: the best detection is in image 3; half of the objects at precision 1/2. The half 34 holds no dog
    dog, dogs = HALF / 2, [HALF, 1 / 2, 1, 0, 0]  # 12, 13, 14, 23, 24
    higher = [sum(cats) / 6 - cat, sum(dogs) / 5 - dog]
    law = [5 ** (-2 / 3), 3 ** (-2 / 3), 2 ** (-2 / 3)]
    # of the five halves with dogs one holds two images of them, four hold one
    of_halves = [3 ** (-2 / 3), (3 ** (-2 / 3) + 4 * 2 ** (-2 / 3)) / 5]
    factor = sum(higher) / (of_halves[0] - law[0] + of_halves[1] - law[1])
    assert estimates.estimates[[0, 12, 13, 14]].tolist() == pytest.approx([(cat + dog + 1) / 3, cat, dog, 1])
    # standard errors: 0.002 of a mean of halves, by the factor 1 / (of_halves - law)
    assert estimates.biases[0] == pytest.approx(factor * sum(law) / 3, abs=0.03)
    assert estimates.biases[13] == pytest.approx(higher[1] * law[1] / (of_halves[1] - law[1]), abs=0.05)
    assert np.isnan(estimates.biases[14])
    assert estimates.degrees_of_freedom[12:14].tolist() == [3, 1]
    of_dogs = np.std(dogs) ** 2
    of_cats = np.std(cats) ** 2
    expected = (of_cats + of_dogs) ** 2 / (of_cats**2 / 3 + of_dogs**2 / 1)
    assert estimates.degrees_of_freedom[0] == pytest.approx(expected, rel=0.05)


def test_draws_are_halves_of_the_images_and_those_of_the_seed() -> None:
    first, again, other = (np.concatenate(list(draw_weights(7, 1500, seed=s)), axis=1) for s in (0, 0, 1))

    assert first.shape == (7, 1500)
    assert set(first.sum(axis=0).tolist()) == {3}
    assert set(first.ravel().tolist()) == {0, 1}
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert set((first[:, ::2] + first[:, 1::2]).ravel().tolist()) == {0, 1}  # two of a pair share no image
    assert next(draw_weights(7, 3, seed=0)).shape == (7, 3)


def test_all_halves_are_equally_probable() -> None:
    halves, counts = np.unique(np.concatenate(list(draw_weights(4, 6000, seed=0)), axis=1), axis=1, return_counts=True)

    assert sorted(map(tuple, halves.T.tolist())) == sorted(set(itertools.permutations((0, 0, 1, 1))))
    # each count is binomial: mean 1000, standard deviation 29
    assert counts.tolist() == pytest.approx([1000] * 6, abs=145)


def test_a_class_in_one_image_or_of_which_halves_do_not_differ_has_no_interval() -> None:
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label, "bbox": [20 * i, 10, side, side]}
            for i, image, label, side in ((1, 1, 1, 20), (2, 2, 1, 20), (3, 3, 2, 20), (4, 3, 2, 40))
        ],
    }
    results = [{**entry, "score": 0.9} for entry in content["annotations"]]

    matches = matched(content, results)
    intervals, difference = resample_intervals(matches, resamples=20), compare(matches, matches, resamples=20)

    assert str(intervals.per_class["dog"]) == "-"
    assert str(intervals.per_class["cat"]) == "-"  # perfect in every half, which tells nothing of other images
    assert all(math.isnan(one.low) for one in intervals.stats.values())
    assert str(difference).splitlines()[-2].split() == [
        "cat",
        "100.0",
        "100.0",
        "+0.0",
        "[+0.0,",
        "+0.0]",
        "p",
        "=",
        "1.000",
    ]
    assert str(difference).splitlines()[-1].split() == ["dog", "100.0", "100.0", "+0.0", "-"]
    assert difference.per_class["dog"].sentence("AP") == "too few images to compare AP"


def test_every_number_has_an_interval_and_none_where_there_is_nothing_to_find() -> None:
    content, results = random_set(np.random.default_rng(2))

    intervals = resample_intervals(matched(content, results), resamples=50)

    assert tuple(intervals.stats) == COCO_SETTINGS.stat_names
    assert list(intervals.per_class) == ["class 0", "class 2", "class 3", "class 7", "class 90"]
    assert math.isnan(intervals.per_class["class 90"].low)
    assert str(intervals.per_class["class 90"]) == "-"
    assert "class 90" not in intervals.to_dict()["per_class"]
    assert all(0 <= one.low <= one.high <= 1 for one in intervals.stats.values())


def test_a_detector_is_not_better_than_itself() -> None:
    matches = matched(*random_set(np.random.default_rng(3)))

    difference = compare(matches, matches, resamples=50).stats["AP"]

    assert (difference.interval.low, difference.interval.high, difference.p) == (0, 0, 1)
    assert difference.sentence("AP") == "no difference shown: B - A is +0.0 AP [+0.0, +0.0] (p = 1)"


def test_a_better_detector_is_found_better_whichever_comes_first() -> None:
    annotations, detections = simulate(60, classes=3, detections=20)
    shifted = replace(detections, boxes=detections.boxes + np.array([3, 3, 0, 0]))
    good, bad = match(annotations, detections), match(annotations, shifted)

    forward, back = (compare(*pair, resamples=200) for pair in ((bad, good), (good, bad)))

    one, other = forward.stats["AP"], back.stats["AP"]
    assert one.sentence("AP").startswith("B is better: B - A is +")
    assert other.sentence("AP").startswith("A is better: B - A is -")
    assert one.p == pytest.approx(other.p)
    assert (one.interval.low, one.interval.high) == pytest.approx((-other.interval.high, -other.interval.low))
    assert one.b - one.a == pytest.approx(average_precision(good).stats[0, 0] - average_precision(bad).stats[0, 0])
    assert str(forward).splitlines()[0] == one.sentence("AP")
    assert [line.split()[0] for line in str(forward).splitlines()[3:15]] == list(COCO_SETTINGS.stat_names)


def test_the_same_images_make_a_comparison_surer_than_two_intervals() -> None:
    content, results = random_set(np.random.default_rng(4))
    nearly = [{**one, "score": one["score"] * 0.9} if one["image_id"] == 3 else one for one in results]
    good, other = matched(content, results), matched(content, nearly)

    together = compare(good, other, resamples=200).stats["AP"].interval
    alone = resample_intervals(good, resamples=200).stats["AP"]

    assert together.high - together.low < (alone.high - alone.low) / 2


def test_detectors_on_other_images_are_not_compared() -> None:
    content, results = random_set(np.random.default_rng(3))
    everywhere = matched(content, results)

    with pytest.raises(EvaluationError, match=r"not evaluated on the same ground truth .* key=image_ids"):
        compare(everywhere, everywhere.subset([3, 6]))


@pytest.mark.parametrize("wrong", [{"resamples": 1}, {"level": 0}, {"level": 95}])
def test_options_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be "):
        resample_intervals(two_images(1), **wrong)


def test_headline_and_table_of_a_comparison_show_one_difference_and_explain_one_outside_of_its_interval() -> None:
    biased = Difference(a=0.4, b=0.43, interval=Interval(estimate=0.03, low=0.001, high=0.02), p=0.01)
    plain = Difference(a=0.4, b=0.43, interval=Interval(estimate=0.03, low=-0.01, high=0.07), p=0.2)
    comparison = Comparison(stats={"AP": biased, "AP50": plain}, per_class={}, level=0.95, resamples=2)

    lines = str(comparison).splitlines()

    assert lines[0] == "B is better: B - A is +3.0 AP [+0.1, +2.0] (p = 0.01)"
    assert lines[3].split()[:5] == ["AP", "40.0", "43.0", "+3.0", "[+0.1,"]
    assert [line.rpartition(": ")[2] for line in lines if "outside of the interval" in line] == ["AP"]


def test_detectors_with_other_settings_are_not_compared() -> None:
    content, results = random_set(np.random.default_rng(3))
    loose = EvaluationSettings(iou_thresholds=(0.5,))

    with pytest.raises(EvaluationError, match=r"not evaluated alike \| got IoU 0.5, "):
        compare(matched(content, results, settings=loose), matched(content, results))
