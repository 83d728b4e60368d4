"""Matching done once gives all of pycocotools' numbers."""

from typing import Any

import numpy as np
import pytest

from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.average_precision import average_precision
from detr_backbone.evaluation.matching import Matches
from tests.coco_sets import TOY, matched, plain_pycocotools, random_set


def numbers(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    result = average_precision(matches)
    return np.nan_to_num(result.stats[:, 0], nan=-1), np.nan_to_num(result.per_class[:, 0], nan=-1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_numbers_from_matches_are_those_of_pycocotools(seed: int, ties: bool) -> None:
    content, results = random_set(np.random.default_rng(seed), ties=ties)

    stats, per_class = numbers(matched(content, results))

    expected_stats, expected_per_class = plain_pycocotools(content, results)
    # sums in another order
    np.testing.assert_allclose(stats, expected_stats, rtol=0, atol=1e-12)
    np.testing.assert_allclose(per_class, expected_per_class, rtol=0, atol=1e-12)
    assert 0 < stats[0] < 1


@pytest.mark.parametrize("objects", [1, 3, 7, 10, 49, 90, 100, 101, 700])
def test_recall_reaches_a_step_by_the_rounding_of_pycocotools(objects: int) -> None:
    # one image with `objects` objects, of which the first 100 are found, one after the other among wrong detections
    content, _ = random_set(np.random.default_rng(0), objects=False)
    boxes = [[float(3 * (i % 40)), float(3 * (i // 40)), 2.0, 2.0] for i in range(objects)]
    content["annotations"] = [
        {"id": i, "image_id": 3, "category_id": 2, "bbox": box, "area": 4.0, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    results = [
        {"image_id": 3, "category_id": 2, "bbox": box, "score": 0.9 - 0.001 * i}
        for i, box in enumerate(b for right in boxes for b in (right, [120.0, 80.0, 4.0, 4.0]))
    ]

    np.testing.assert_allclose(
        numbers(matched(content, results))[0], plain_pycocotools(content, results)[0], rtol=0, atol=1e-12
    )


def test_without_objects_or_detections_there_are_no_numbers_or_zeros() -> None:
    rng = np.random.default_rng(0)
    no_objects, results = random_set(rng, objects=False)
    content, _ = random_set(rng)

    assert (numbers(matched(no_objects, results))[0] == -1).all()
    assert set(numbers(matched(content, []))[0].tolist()) == {0}


def cat(*box: float, score: float, image_id: int = 1) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": list(box), "score": score}


def test_the_best_detection_takes_the_object_and_the_next_one_is_wrong() -> None:
    matches = matched(TOY, [cat(10, 10, 20, 20, score=0.5), cat(10, 10, 20, 18, score=0.8)])

    assert matches.detection_index.tolist() == [1, 0]  # by score
    assert matches.scores.tolist() == [0.8, 0.5]
    assert matches.ranks.tolist() == [0, 1]
    # an IoU of 0.9 is enough up to the threshold 0.90, the ninth; then the other one takes it
    assert matches.matched[0, :, 0].tolist() == [0] * 9 + [-1]
    assert matches.matched[0, :, 1].tolist() == [-1] * 9 + [0]
    assert not matches.ignored[0].any()


def test_a_crowd_takes_any_number_of_detections_and_none_counts() -> None:
    matches = matched(TOY, [cat(110, 110, 10, 10, score=s) for s in (0.9, 0.8)])

    assert matches.matched.tolist() == np.full((4, 10, 2), 1).tolist()
    assert matches.ignored.all()
    assert matches.object_ignored.shape == (4, 3)
    assert matches.object_ignored[0].tolist() == [False, True, False]


def test_a_size_ignores_what_is_of_another_one() -> None:
    # the object of 20 x 20 is small; a detection of 50 x 50 that finds nothing is of medium size
    matches = matched(TOY, [cat(10, 10, 20, 20, score=0.9), cat(140, 10, 50, 50, score=0.8)])

    assert matches.ignored[:, 0].tolist() == [[False, False], [False, True], [True, False], [True, True]]
    assert matches.ignored.shape[1] == 10


def test_some_images_are_matched_as_all_are() -> None:
    content, results = random_set(np.random.default_rng(5))
    some = [3, 6, 9, 30]
    everywhere = matched(content, results)

    inside, alone = everywhere.subset(some), matched(content, results, image_ids=some)

    for name in ("image_ids", "image_index", "labels", "scores", "ranks", "detection_index", "matched", "ignored"):
        np.testing.assert_array_equal(getattr(inside, name), getattr(alone, name), name)
    for name in ("object_image_index", "object_labels", "object_index", "object_ignored"):
        np.testing.assert_array_equal(getattr(inside, name), getattr(alone, name), name)
    part = {**content, "images": [image for image in content["images"] if image["id"] in some]}
    part["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in some]
    expected, _ = plain_pycocotools(part, [one for one in results if one["image_id"] in some])
    np.testing.assert_allclose(numbers(inside)[0], expected, rtol=0, atol=1e-12)


def test_unknown_images_and_missing_masks_are_errors() -> None:
    with pytest.raises(EvaluationError, match=r"key=image_ids \| got 1 unknown, first \[7\]"):
        matched(TOY, [], image_ids=[1, 7])
    with pytest.raises(EvaluationError, match=r"key=image_ids \| got 1 unknown, first \[7\]"):
        matched(TOY, []).subset([7])
    with pytest.raises(EvaluationError, match=r"ground truth has no masks .* fix: load_annotations"):
        matched(TOY, [], iou_type="segm")
