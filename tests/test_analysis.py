"""What lies behind an AP: curves, operating point, confusions, calibration, images, and the kinds of mistakes."""

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_backbone.coco.annotations import parse_annotations
from detr_backbone.evaluation.analysis import (
    calibration,
    confusion,
    curves,
    image_scores,
    operating_point,
    precision_at_recalls,
)
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import Matches, match
from detr_backbone.evaluation.mistakes import MISTAKE_KINDS, Mistakes, mistakes

Box = tuple[float, float, float, float]

HERE: Box = (10, 10, 20, 20)
SHIFTED: Box = (18, 10, 20, 20)  # on HERE: 12 of 28, an IoU of 0.43
BARELY: Box = (28, 28, 20, 20)  # on HERE: 4 of 796, an IoU of 0.005
AWAY: Box = (60, 60, 20, 20)
CAT, DOG, OWL = 1, 5, 7


def case(
    objects: list[tuple[int, int, Box]], found: list[tuple[int, int, Box, float]], crowds: tuple[int, ...] = ()
) -> Matches:
    """Objects (image id, category id, box) and detections (.., score), matched; objects at the places `crowds` are."""
    images = (1, 2, 3)
    annotations = parse_annotations(
        {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in images],
            "categories": [{"id": i, "name": name} for i, name in ((CAT, "cat"), (DOG, "dog"), (OWL, "owl"))],
            "annotations": [
                {"id": i, "image_id": image, "category_id": label, "bbox": list(box), "iscrowd": int(i in crowds)}
                for i, (image, label, box) in enumerate(objects)
            ],
        },
        source="<test>",
    )
    detections = Detections(
        image_index=np.array([images.index(row[0]) for row in found], dtype=np.int64),
        labels=np.array([(CAT, DOG, OWL).index(row[1]) for row in found], dtype=np.int64),
        boxes=np.array([row[2] for row in found], dtype=np.float64).reshape(-1, 4),
        scores=np.array([row[3] for row in found], dtype=np.float64),
    )
    return match(annotations, detections)


def counts(result: Mistakes) -> dict[str, int]:
    return {kind: result.count(kind) for kind in MISTAKE_KINDS if result.count(kind)}


KIND_CASES = {
    "localisation": ([(1, CAT, HERE)], [(1, CAT, SHIFTED, 0.9)], {"localisation": 1}),
    "class": ([(1, CAT, HERE)], [(1, DOG, HERE, 0.9)], {"class": 1}),
    "both": ([(1, CAT, HERE)], [(1, DOG, SHIFTED, 0.9)], {"both": 1, "missed": 1}),
    "duplicate": ([(1, CAT, HERE)], [(1, CAT, HERE, 0.9), (1, CAT, HERE, 0.8)], {"duplicate": 1}),
    "background": ([(1, CAT, HERE)], [(1, CAT, BARELY, 0.9)], {"background": 1, "missed": 1}),
    "background without objects": ([], [(2, CAT, HERE, 0.9)], {"background": 1}),
    "missed": ([(1, CAT, HERE)], [], {"missed": 1}),
    "localisation before class": (
        [(1, CAT, HERE), (1, DOG, SHIFTED)],
        [(1, CAT, SHIFTED, 0.9)],
        {"localisation": 1, "missed": 1},
    ),
    "class before duplicate": (
        [(1, CAT, HERE), (1, DOG, HERE)],
        [(1, CAT, HERE, 0.9), (1, CAT, HERE, 0.8)],
        {"class": 1},
    ),
    "right": ([(1, CAT, HERE)], [(1, CAT, HERE, 0.9)], {}),
    "another image": ([(1, CAT, HERE)], [(2, CAT, HERE, 0.9)], {"background": 1, "missed": 1}),
}


@pytest.mark.parametrize(("objects", "found", "expected"), KIND_CASES.values(), ids=KIND_CASES)
def test_each_mistake_has_its_kind(objects: Any, found: Any, expected: dict[str, int]) -> None:
    assert counts(mistakes(case(objects, found))) == expected


def test_a_detection_on_a_crowd_is_no_mistake_and_a_crowd_is_not_missed() -> None:
    assert counts(mistakes(case([(1, CAT, HERE)], [(1, CAT, HERE, 0.9)], crowds=(0,)))) == {}


def test_mending_a_kind_gains_what_the_definition_says() -> None:
    objects = [(1, CAT, HERE), (2, CAT, HERE), (3, DOG, HERE), (3, CAT, AWAY)]
    found = [
        (1, CAT, HERE, 0.9),  # right
        (2, CAT, SHIFTED, 0.8),  # localisation
        (2, CAT, SHIFTED, 0.7),  # the same object again: cannot become right too
        (3, CAT, HERE, 0.6),  # class: the dog
        (1, CAT, HERE, 0.95),  # takes the object first, so that the one with 0.9 is the duplicate
        (1, DOG, AWAY, 0.99),  # background
    ]
    result = mistakes(case(objects, found))

    assert counts(result) == {"localisation": 2, "class": 1, "duplicate": 1, "background": 1, "missed": 1}
    # cats: right at 0.95, then wrong; 1 of 3 found gives the 34 recalls 0 .. 0.33 of 101. Dogs: wrong only, 1 object.
    cat, dog = 34 / 101, 0.0
    assert result.ap50 == pytest.approx((cat + dog) / 2)
    mended = {
        # cats: right, wrong, right: to 0.33 with precision 1, to 0.66 with 2 / 3
        "localisation": ((34 + 33 * 2 / 3) / 101 + dog) / 2,
        # dogs: wrong, right: precision 1 / 2 at every recall
        "class": (cat + 1 / 2) / 2,
        "duplicate": (cat + dog) / 2,
        "background": (cat + dog) / 2,
        # cats: 1 of 2 found gives 51 recalls
        "missed": (51 / 101 + dog) / 2,
        "both": (cat + dog) / 2,
    }
    assert result.costs == pytest.approx({kind: ap - result.ap50 for kind, ap in mended.items()})
    assert result.false_positives == pytest.approx(0)
    # cats: the one that is found is the only one; dogs: none is left to find, which stays at 0
    assert result.false_negatives == pytest.approx((1 + 0) / 2 - result.ap50)


def test_a_mended_mistake_does_not_find_again_what_is_found() -> None:
    objects = [(1, CAT, HERE), (2, CAT, HERE)]
    result = mistakes(case(objects, [(1, CAT, HERE, 0.9), (1, DOG, HERE, 0.8)]))

    assert counts(result) == {"class": 1, "missed": 1}
    assert result.costs["class"] == pytest.approx(0)  # there are no dogs, and the first cat counts once


def test_without_wrong_detections_precision_is_one() -> None:
    objects = [(1, CAT, HERE), (2, CAT, HERE)]
    result = mistakes(case(objects, [(3, CAT, HERE, 0.9), (1, CAT, HERE, 0.8), (1, CAT, AWAY, 0.7)]))

    assert result.ap50 == pytest.approx(51 / 101 / 2)
    assert result.costs["background"] == result.false_positives == pytest.approx(51 / 101 / 2)


def test_without_objects_a_mistake_has_no_cost() -> None:
    result = mistakes(case([], [(1, CAT, HERE, 0.9)]))

    assert math.isnan(result.ap50)
    assert all(map(math.isnan, result.costs.values()))


def random_case(seed: int) -> tuple[Matches, list[dict[str, Any]], list[dict[str, Any]]]:
    """Objects and detections around them, also as entries of COCO files."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in (1, 2, 3):
        for _ in range(12):
            box = (*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 40, 2).tolist())
            objects.append((image, int(rng.choice([CAT, DOG])), box))
            for _ in range(rng.integers(0, 3)):
                near = (np.array(box) + rng.normal(0, 2, 4)).tolist()
                label = objects[-1][1] if rng.random() < 0.8 else int(rng.choice([CAT, DOG, OWL]))
                found.append((image, label, (near[0], near[1], near[2], near[3]), float(rng.random())))
    crowds = (3, 17)
    truth = [
        {
            "id": i + 1,
            "image_id": a,
            "category_id": b,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": int(i in crowds),
        }
        for i, (a, b, box) in enumerate(objects)
    ]
    results = [{"image_id": a, "category_id": b, "bbox": list(box), "score": score} for a, b, box, score in found]
    return case(objects, found, crowds), truth, results


@pytest.mark.parametrize("seed", range(3))
def test_curves_are_those_of_pycocotools(seed: int) -> None:
    matches, truth, results = random_case(seed)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in (1, 2, 3)],
        "categories": [{"id": i} for i in (CAT, DOG, OWL)],
        "annotations": truth,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()

    result = curves(matches)

    for ours, theirs in ((result.precision, "precision"), (result.recall, "recall")):
        expected = evaluation.eval[theirs][..., 0, -1]  # any area, 100 detections
        np.testing.assert_array_equal(np.nan_to_num(ours, nan=-1), expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_ap_that_mistakes_cost_is_that_of_the_curves(seed: int) -> None:
    given, _, _ = random_case(seed)

    assert mistakes(given).ap50 == pytest.approx(np.nanmean(curves(given).average_precision[0]))


@pytest.mark.parametrize("seed", range(3))
def test_every_wrong_detection_has_one_kind(seed: int) -> None:
    matches = random_case(seed)[0]
    result = mistakes(matches)
    wrong = (matches.matched[0, 0] < 0) & ~matches.ignored[0, 0]

    assert ((result.kinds >= 0) == wrong).all()
    assert sum(result.count(kind) for kind in MISTAKE_KINDS if kind != "missed") == wrong.sum() > 0


def test_a_recall_that_is_not_reached_has_precision_zero() -> None:
    curve = precision_at_recalls(np.array([False, True]), 2)

    assert curve[:51] == pytest.approx(1 / 2)
    assert not curve[51:].any()


def test_a_class_without_objects_has_no_curve() -> None:
    result = curves(case([(1, CAT, HERE)], [(1, OWL, HERE, 0.9)]))

    assert result.objects.tolist() == [1, 0, 0]
    assert np.isnan(result.precision[:, :, 1:]).all()
    assert np.isnan(result.recall[:, 1:]).all()


def test_a_class_that_is_not_detected_has_precision_zero() -> None:
    result = curves(case([(1, CAT, HERE)], []))

    assert not result.precision[:, :, 0].any()


def test_the_operating_point_has_the_best_f1() -> None:
    objects = [(1, CAT, HERE), (2, CAT, HERE), (3, DOG, HERE)]
    found = [(1, CAT, HERE, 0.9), (1, CAT, AWAY, 0.8), (2, CAT, HERE, 0.7), (2, DOG, AWAY, 0.6), (3, DOG, AWAY, 0.5)]
    point = operating_point(case(objects, found))

    # F1 as detections join: 2/4, 2/5, 4/6, 4/7, 4/8
    assert (point.score, point.precision, point.recall) == (0.7, 2 / 3, 2 / 3)
    assert point.f1 == pytest.approx(2 / 3)


def test_detections_of_one_score_count_together() -> None:
    point = operating_point(case([(1, CAT, HERE)], [(1, CAT, HERE, 0.9), (1, CAT, AWAY, 0.9)]))

    assert (point.score, point.precision) == (0.9, 1 / 2)


@pytest.mark.parametrize(
    ("objects", "found", "expected"),
    [
        ([(1, CAT, HERE)], [(1, CAT, AWAY, 0.9)], (0.5, 0.0, 0.0, 0.0)),
        ([(1, CAT, HERE)], [], (0.5, math.nan, 0.0, 0.0)),
        ([], [(1, CAT, HERE, 0.9)], (0.5, 0.0, math.nan, math.nan)),
        ([], [], (0.5, math.nan, math.nan, math.nan)),
    ],
)
def test_without_a_right_detection_the_operating_point_is_one_half(objects: Any, found: Any, expected: Any) -> None:
    point = operating_point(case(objects, found))

    assert (point.score, point.precision, point.recall, point.f1) == pytest.approx(expected, nan_ok=True)


def test_the_confusion_matrix_counts_each_object_and_each_detection_once() -> None:
    objects = [(1, CAT, HERE), (1, DOG, AWAY), (2, CAT, HERE), (2, DOG, HERE), (3, OWL, HERE)]
    found = [
        (1, CAT, HERE, 0.9),  # right
        (1, CAT, HERE, 0.8),  # again: background
        (1, CAT, AWAY, 0.7),  # the dog, taken for a cat
        (2, DOG, HERE, 0.9),  # right, though the cat is as near
        (3, OWL, HERE, 0.2),  # below the score
        (3, DOG, SHIFTED, 0.9),  # on nothing
    ]

    assert confusion(case(objects, found), score=0.5).tolist() == [
        # found as cat, dog, owl, missed
        [1, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],  # background
    ]


def test_crowds_are_not_confused() -> None:
    assert not confusion(case([(1, CAT, HERE)], [(1, CAT, HERE, 0.9)], crowds=(0,)), score=0.5).any()


def test_calibration_compares_scores_with_the_share_that_is_right() -> None:
    found = [(1, CAT, HERE, 0.62), (2, CAT, AWAY, 0.68), (2, DOG, AWAY, 1.0), (3, DOG, AWAY, 0.0)]
    result = calibration(case([(1, CAT, HERE)], found))

    assert result is not None
    assert result.counts.tolist() == [1, 0, 0, 0, 0, 0, 2, 0, 0, 1]
    assert result.scores[[0, 6, 9]] == pytest.approx([0, 0.65, 1])
    assert result.precision[[0, 6, 9]] == pytest.approx([0, 0.5, 0])
    assert result.error == pytest.approx((0 + 2 * 0.15 + 1) / 4)


@pytest.mark.parametrize("found", [[], [(1, CAT, HERE, 7.5)], [(1, CAT, HERE, -0.1)]])
def test_scores_that_are_no_probabilities_have_no_calibration(found: Any) -> None:
    assert calibration(case([(1, CAT, HERE)], found)) is None


def test_images_are_ranked_from_the_worst_to_the_best() -> None:
    objects = [(1, CAT, HERE), (2, CAT, HERE), (2, CAT, AWAY)]
    found = [(1, CAT, HERE, 0.9), (1, CAT, AWAY, 0.8), (1, CAT, AWAY, 0.1)]
    scores = image_scores(case(objects, found), score=0.5)

    assert [scores.true_positives.tolist(), scores.false_positives.tolist(), scores.false_negatives.tolist()] == [
        [1, 0, 0],
        [1, 0, 0],
        [0, 2, 0],
    ]
    assert scores.f1 == pytest.approx([2 / 3, 0, math.nan], nan_ok=True)
    assert scores.ranked().tolist() == [1, 0]  # there is nothing to say of the third


def test_of_equally_bad_images_the_one_with_more_mistakes_is_worse() -> None:
    scores = image_scores(case([(1, CAT, HERE), (2, CAT, HERE), (2, DOG, AWAY)], []), score=0.5)

    assert scores.ranked().tolist() == [1, 0]
