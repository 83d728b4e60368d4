"""COCO average precision that is not inflated by missing images or NaN."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detr_backbone.coco.annotations import parse_annotations
from detr_backbone.errors import ConfigError, EvaluationError
from detr_backbone.evaluation.evaluator import Backend, CocoEvaluator
from detr_backbone.evaluation.intervals import Interval, Intervals
from detr_backbone.evaluation.matching import match
from detr_backbone.evaluation.result import CocoResult
from detr_backbone.evaluation.settings import COCO_SETTINGS, EvaluationSettings
from tests import coco_sets

HALF = 51 / 101
"""AP when one of two objects is found first: precision 1 at the recalls 0, 0.01 .. 0.5 of 101."""


def toy(**changes: Any) -> dict[str, Any]:
    """Two images with one box of 20 x 20 each."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20]} for i in (1, 2)],
    } | changes


def found(*boxes: list[float], label: int = 1, score: float = 0.9) -> dict[str, Tensor]:
    return {
        "scores": torch.full((len(boxes),), score),
        "labels": torch.full((len(boxes),), label),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
    }


RIGHT = [10.0, 10.0, 30.0, 30.0]


def plain_pycocotools(content: dict[str, Any], detections: Any) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(found) for found in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_perfect_detections_score_one() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT)})
    evaluator.update({2: found(RIGHT)})

    result = evaluator.compute()

    assert result.stats["AP"] == result.stats["AP_small"] == result.stats["AR_1"] == pytest.approx(1)
    assert result.stats["AP_large"] == -1  # there is no large object
    assert result.per_class == {"cat": pytest.approx(1)}
    assert (result.num_images, result.num_expected) == (2, 2)


def test_a_ground_truth_with_the_id_zero_is_matched() -> None:
    boxes = [{"id": i, "image_id": i + 1, "category_id": 1, "bbox": [10, 10, 20, 20]} for i in (0, 1)]
    evaluator = CocoEvaluator(toy(annotations=boxes))
    evaluator.update({1: found(RIGHT), 2: found(RIGHT)})

    assert evaluator.compute().stats["AP"] == pytest.approx(1)


def test_a_part_of_the_images_is_refused() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT)})

    with pytest.raises(EvaluationError, match=r"image_id=2 \| got 1 of 2 images, first missing \[2\]"):
        evaluator.compute()


def test_images_that_were_not_seen_count_as_images_without_detections() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT)})

    result = evaluator.compute(allow_partial=True)

    assert result.stats["AP"] == pytest.approx(HALF)
    assert (result.num_images, result.num_expected) == (1, 2)


def test_a_subset_is_evaluated_over_its_own_images() -> None:
    evaluator = CocoEvaluator(toy(), image_ids=[2])
    evaluator.update({2: found(RIGHT)})

    result = evaluator.compute()

    assert result.stats["AP"] == pytest.approx(1)
    assert result.num_expected == 1


def test_no_detections_at_all_score_zero() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(), 2: found()})

    assert evaluator.compute().stats["AP"] == 0


def test_without_ground_truth_there_is_no_score() -> None:
    evaluator = CocoEvaluator(toy(annotations=[]))
    evaluator.update({1: found(RIGHT), 2: found()})

    assert evaluator.compute().stats["AP"] == -1


def test_a_detection_on_a_crowd_is_ignored() -> None:
    crowd = {"id": 3, "image_id": 1, "category_id": 1, "bbox": [50, 50, 40, 40], "iscrowd": 1}
    evaluator = CocoEvaluator(toy(annotations=[*toy()["annotations"], crowd]))
    evaluator.update({1: found([55, 55, 60, 60], [70, 70, 80, 80], score=1.0)} | {2: found(RIGHT)})

    assert evaluator.compute(allow_partial=True).stats["AP"] == pytest.approx(HALF)


def test_the_hundred_best_detections_count() -> None:
    wrong = [[60.0, 60.0, 70.0, 70.0]] * 100
    scores = torch.linspace(0.9, 0.5, 101)
    stats = []
    for right in (99, 100):  # the place of the right one by its score
        boxes = torch.tensor([*wrong[:right], RIGHT, *wrong[right:]])
        evaluator = CocoEvaluator(toy(), image_ids=[1])
        evaluator.update({1: {"scores": scores, "labels": torch.ones(101, dtype=torch.int64), "boxes": boxes}})
        stats.append(evaluator.compute().stats["AP"])

    assert stats == [pytest.approx(0.01), 0]  # one right in 100; none


def random_set(rng: np.random.Generator) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """30 images, 5 categories with gaps, boxes of all sizes, crowds; predictions near them and far too many others."""
    categories = (1, 3, 7, 8, 90)
    content = toy(
        images=[{"id": i * 3, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(1, 31)],
        categories=[{"id": i, "name": f"class {i}"} for i in categories],
        annotations=[],
    )
    predictions = {}
    for image in content["images"]:
        boxes, labels = [], []
        for _ in range(rng.integers(0, 8)):
            box = [*rng.uniform(0, 300, 2), *np.exp(rng.uniform(2, 5, 2))]
            label = int(rng.choice(categories[:-1]))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.7,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            near = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            boxes += [near + rng.normal(0, 2, 4) for _ in range(rng.integers(0, 3))]
            labels += [label if rng.random() < 0.9 else 90] * (len(boxes) - len(labels))
        for _ in range(rng.integers(0, 150)):
            corner = rng.uniform(0, 300, 2)
            boxes.append(np.concatenate([corner, corner + rng.uniform(0, 200, 2)]))
            labels.append(1)
        predictions[image["id"]] = {
            "scores": torch.from_numpy(rng.random(len(boxes))).float(),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.from_numpy(np.array(boxes).reshape(-1, 4)).float(),
        }
    return content, predictions


@pytest.mark.parametrize("seed", range(3))
def test_valid_input_scores_as_with_pycocotools(seed: int) -> None:
    content, predictions = random_set(np.random.default_rng(seed))
    evaluator = CocoEvaluator(content)
    evaluator.update(predictions)

    stats = evaluator.compute().stats

    detections = [
        {"image_id": i, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
        for i, fields in predictions.items()
        for label, score, (x1, y1, x2, y2) in zip(
            fields["labels"], fields["scores"], fields["boxes"].double().numpy(), strict=True
        )
    ]
    # the same arithmetic on the same doubles: no tolerance
    assert list(stats.values()) == plain_pycocotools(content, detections).tolist()
    assert tuple(stats) == COCO_SETTINGS.stat_names
    assert 0 < stats["AP"] < 1


def test_the_mean_over_the_classes_is_the_ap() -> None:
    content, predictions = random_set(np.random.default_rng(0))
    evaluator = CocoEvaluator(content)
    evaluator.update(predictions)

    result = evaluator.compute()

    assert result.per_class["class 90"] == -1  # predicted, but never there
    there = [value for value in result.per_class.values() if value >= 0]
    assert len(there) == 4
    assert np.mean(there) == pytest.approx(result.stats["AP"])


def test_detections_are_a_coco_results_file() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({2: found([1.0, 2.0, 4.0, 8.0], score=0.5)})
    evaluator.update({1: found()})

    assert evaluator.detections == [{"image_id": 2, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}]


def test_the_table_gives_percent() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT)})

    lines = str(evaluator.compute(allow_partial=True)).splitlines()

    assert lines[:2] == ["images 1 of 2", "AP         50.5"]
    assert "AP_large      -" in lines
    assert lines[-1] == "cat  50.5"


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = CocoEvaluator(toy(), image_ids=[1])
    evaluator.update({1: found(RIGHT)})
    evaluator.compute()

    assert capsys.readouterr() == ("", "")


NAN, INF = float("nan"), float("inf")
WRONG = {
    "NaN score": ({1: found(RIGHT, score=NAN)}, "image_id=1 key=scores | got 1 of 1"),
    "NaN box": ({1: found(RIGHT, [NAN, 1, 2, 3])}, "image_id=1 key=boxes | got 1 of 8"),
    "infinite box": ({1: found([1, 1, INF, INF])}, "image_id=1 key=boxes | got 2 of 4"),
    "x2 before x1": ({1: found(RIGHT, [5, 1, 4, 9])}, "image_id=1 key=boxes index=1 | got [5.0, 1.0, 4.0, 9.0]"),
    "y2 before y1": ({1: found([1, 5, 9, 4])}, "image_id=1 key=boxes index=0 |"),
    "unknown images": (
        {i: found() for i in range(1, 9)},
        "key=image_id | got 6 unknown, first [3, 4, 5, 6, 7] expected",
    ),
    "unknown category": ({1: found(RIGHT, label=2)}, "image_id=1 key=labels | got 1 unknown, first [2]"),
    "label as a float": ({1: found(RIGHT) | {"labels": torch.ones(1)}}, "image_id=1 key=labels | got torch.float32"),
    "fewer labels": ({1: found(RIGHT) | {"labels": torch.ones(0).long()}}, "key=labels | got [0] expected [1]"),
    "flat boxes": ({1: found(RIGHT) | {"boxes": torch.tensor(RIGHT)}}, "key=boxes | got [4] expected [1, 4]"),
    "no scores": ({1: {"labels": torch.ones(0), "boxes": torch.ones(0, 4)}}, "image_id=1 key=scores | got ['boxes', "),
}


@pytest.mark.parametrize(("predictions", "where"), WRONG.values(), ids=WRONG)
def test_predictions_that_are_wrong_are_named(predictions: dict[int, dict[str, Tensor]], where: str) -> None:
    evaluator = CocoEvaluator(toy())

    with pytest.raises(EvaluationError) as error:
        evaluator.update(predictions)

    assert where in str(error.value)
    assert evaluator.detections == []


def test_an_image_that_comes_twice_is_an_error() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT)})

    with pytest.raises(EvaluationError, match=r"image_id=1 \| got 1 again, first \[1\]"):
        evaluator.update({1: found(RIGHT), 2: found(RIGHT)})


def results_file(folder: Path, *changes: dict[str, Any]) -> Path:
    entry = {"image_id": 2, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.5}
    (folder / "found.json").write_text(json.dumps([entry | change for change in changes]))
    return folder / "found.json"


def test_a_results_file_scores_as_with_pycocotools(tmp_path: Path) -> None:
    content, predictions = random_set(np.random.default_rng(0))
    source = CocoEvaluator(content)
    source.update(predictions)
    (tmp_path / "found.json").write_text(json.dumps(source.detections))
    evaluator = CocoEvaluator(content)
    evaluator.load(tmp_path / "found.json")

    # read as written, so the same doubles
    expected = plain_pycocotools(content, json.loads((tmp_path / "found.json").read_text()))
    assert list(evaluator.compute().stats.values()) == expected.tolist()


def test_images_that_a_results_file_does_not_name_have_no_detections(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.load(results_file(tmp_path, {}))

    assert evaluator.compute().stats["AP"] == pytest.approx(HALF)


def test_a_results_file_of_other_images_is_an_error(tmp_path: Path) -> None:
    path = results_file(tmp_path, {})

    with pytest.raises(EvaluationError, match=r"found.json key=image_id \| got 1 unknown, first \[2\]"):
        CocoEvaluator(toy(), image_ids=[1]).load(path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"image_id": 9}, "key=image_id | got 1 unknown, first [9]"),
        ({"category_id": 9}, "key=category_id | got 1 unknown, first [9]"),
        ({"image_id": 1.5}, "index=1 key=image_id | got 1.5"),
        ({"bbox": [1, 2, 3]}, "index=1 key=bbox | got [1, 2, 3]"),
        ({"bbox": [1, 2, -3, 4]}, "index=1 key=bbox | got [1.0, 2.0, -3.0, 4.0]"),
        ({"score": "high"}, "index=1 key=score | got 'high'"),
        ({"score": None}, "index=1 key=score"),
        ({"score": float("nan")}, "NaN"),
    ],
)
def test_an_entry_of_a_results_file_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    path = results_file(tmp_path, {}, change)

    with pytest.raises(EvaluationError) as error:
        CocoEvaluator(toy()).load(path)

    assert where in str(error.value)
    assert "found.json" in str(error.value)


def test_a_subset_of_unknown_images_is_an_error() -> None:
    with pytest.raises(EvaluationError, match=r"key=image_ids \| got 1 unknown, first \[5\]"):
        CocoEvaluator(toy(), image_ids=[1, 5])


def test_annotations_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(toy()))

    assert CocoEvaluator(tmp_path / "x.json").image_ids == (1, 2)


BACKENDS: tuple[Backend, ...] = ("pycocotools", "matching")


def predictions_of(content: dict[str, Any], results: list[dict[str, Any]], regions: str) -> dict[int, dict[str, Any]]:
    """What a results file says, as the evaluator takes it."""
    predictions = {}
    for image in content["images"]:
        mine = [one for one in results if one["image_id"] == image["id"]]
        boxes = torch.tensor([one["bbox"] for one in mine], dtype=torch.float64).reshape(-1, 4)
        predictions[image["id"]] = {
            "scores": torch.tensor([one["score"] for one in mine], dtype=torch.float64),
            "labels": torch.tensor([one["category_id"] for one in mine], dtype=torch.int64),
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        }
        if regions == "segm":
            predictions[image["id"]]["masks"] = [one["segmentation"] for one in mine]
    return predictions


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("ties", [False, True])
def test_every_backend_gives_the_numbers_of_pycocotools(ties: bool, iou_type: Any) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        content, results = coco_sets.random_set(rng, ties=ties)
        if iou_type == "segm":
            content = content | {"annotations": coco_sets.with_masks(rng, content["annotations"])}
            results = coco_sets.with_masks(rng, results)
        truth = parse_annotations(content, source="<test>", segmentations=iou_type == "segm")
        for backend in BACKENDS:
            evaluator = CocoEvaluator(truth, iou_type=iou_type, backend=backend)
            evaluator.update(predictions_of(content, results, iou_type))

            result = evaluator.compute()

            stats, per_class = coco_sets.plain_pycocotools(content, evaluator.detections, iou_type)
            # sums are taken in another order
            assert list(result.stats.values()) == pytest.approx(stats.tolist(), abs=1e-12)
            assert list(result.per_class.values()) == pytest.approx(per_class.tolist(), abs=1e-12)
            assert 0 < stats[0] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_knows_nothing_to_find_and_nothing_found(backend: Backend) -> None:
    empty = CocoEvaluator(toy(annotations=[]), backend=backend)
    empty.update({1: found(RIGHT), 2: found()})
    missed = CocoEvaluator(toy(), backend=backend)
    missed.update({1: found(), 2: found()})

    assert set(empty.compute().stats.values()) == {-1}
    assert (missed.compute().stats["AP"], missed.compute().stats["AP_large"]) == (0, -1)


def test_unknown_options_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"`backend` must be one of \('pycocotools', 'matching'\), got 'hotcoco'; matching gives the same",
    ):
        CocoEvaluator(toy(), backend="hotcoco")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`iou_type` must be one of \('bbox', 'segm'\), got 'mask'"):
        CocoEvaluator(toy(), iou_type="mask")  # type: ignore[arg-type]


def test_matches_are_computed_once_for_what_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    from detr_backbone.evaluation import evaluator as module

    calls = []
    monkeypatch.setattr(module, "match", lambda *args, **options: calls.append(1) or match(*args, **options))
    evaluator = CocoEvaluator(toy(), backend="matching")
    evaluator.update({1: found(RIGHT)})

    first = evaluator.compute(allow_partial=True).stats["AP"]
    evaluator.matches(allow_partial=True)
    with pytest.raises(EvaluationError, match="got 1 of 2 images"):
        evaluator.compute()
    evaluator.update({2: found(RIGHT)})

    assert (first, evaluator.compute().stats["AP"]) == (pytest.approx(HALF), pytest.approx(1))
    assert len(calls) == 2


@pytest.mark.parametrize("library", ["faster_coco_eval", "hotcoco"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_other_libraries_compute_the_same(library: str, iou_type: Any) -> None:
    rng = np.random.default_rng(3)
    content, results = coco_sets.random_set(rng)
    if iou_type == "segm":
        content = content | {"annotations": coco_sets.with_masks(rng, content["annotations"])}
        results = coco_sets.with_masks(rng, results)
    truth = parse_annotations(content, source="<test>", segmentations=iou_type == "segm")
    evaluator = CocoEvaluator(truth, iou_type=iou_type, backend="matching")
    evaluator.update(predictions_of(content, results, iou_type))

    stats = evaluator.compute().stats

    # faster_coco_eval and hotcoco state 1e-9 themselves
    expected = coco_sets.peer_stats(library, content, evaluator.detections, iou_type)
    assert list(stats.values()) == pytest.approx(expected, abs=1e-9)


SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]
"""The polygon around RIGHT."""


def masked_toy() -> Any:
    boxes = [{**entry, "segmentation": SQUARE} for entry in toy()["annotations"]]
    return parse_annotations(toy(annotations=boxes), source="<test>", segmentations=True)


def test_masks_are_evaluated_from_tensors() -> None:
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    evaluator = CocoEvaluator(masked_toy(), iou_type="segm", image_ids=[1])
    evaluator.update({1: {"scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64), "masks": mask}})

    assert evaluator.compute().stats["AP"] == pytest.approx(1)
    (detection,) = evaluator.detections
    assert detection["segmentation"]["size"] == [100, 100]
    assert "bbox" not in detection
    assert evaluator.collected.boxes.tolist() == [[10, 10, 20, 20]]


WRONG_MASKS = {
    "another size": (
        torch.zeros(1, 50, 50, dtype=torch.bool),
        "key=masks | got [1, 50, 50] of torch.bool expected [1, ",
    ),
    "probabilities": (torch.zeros(1, 100, 100), "got [1, 100, 100] of torch.float32 expected"),
    "two": ([{}, {}], "key=masks | got 2 expected 1"),
    "size of an encoding": (
        [{"size": [50, 50], "counts": b"_i2"}],
        "index=0 key=size | got [50, 50] expected [100, 100]",
    ),
    "short runs": (
        [{"size": [100, 100], "counts": b"03"}],
        "index=0 key=counts | got runs of 3 pixels together expected",
    ),
    "no runs": ([{"size": [100, 100], "counts": [0, 10_000]}], "index=0 key=counts | got no compressed runs"),
    "no mask": ([7], "index=0 key=size | got int"),
}


@pytest.mark.parametrize(("masks", "message"), WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_masks_that_are_wrong_never_reach_pycocotools(masks: Any, message: str) -> None:
    evaluator = CocoEvaluator(masked_toy(), iou_type="segm")

    with pytest.raises(EvaluationError) as error:
        evaluator.update({1: {"scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.int64), "masks": masks}})

    assert message in str(error.value)


def test_masks_need_masks_in_the_ground_truth() -> None:
    with pytest.raises(EvaluationError, match="ground truth has no masks"):
        CocoEvaluator(toy(), iou_type="segm")


@pytest.mark.parametrize(
    ("boxes", "hint"),
    [
        ([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.9, 0.9]], "cxcywh in fractions of the image"),
        ([[50.0, 50.0, 20.0, 20.0], [10.0, 10.0, 20.0, 20.0]], "xywh or cxcywh: torchvision.ops.box_convert"),
    ],
)
def test_boxes_that_end_before_they_start_are_told_what_they_look_like(boxes: list[list[float]], hint: str) -> None:
    with pytest.raises(EvaluationError) as error:
        CocoEvaluator(toy()).update({1: found(*boxes)})

    assert "so do 1 of 2 boxes" in str(error.value)
    assert hint in str(error.value)


def test_fractions_of_the_image_are_refused_when_all_are_there() -> None:
    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found([0.1, 0.1, 0.3, 0.3]), 2: found([0.1, 0.1, 0.3, 0.3])})

    with pytest.raises(EvaluationError, match=r"fractions of the image .* match 0 of 2 objects as they are and 2 as"):
        evaluator.compute()


def test_an_untrained_detector_is_evaluated() -> None:
    generator = torch.Generator().manual_seed(0)
    evaluator = CocoEvaluator(toy())
    centre, sides = torch.rand(2, 300, 2, generator=generator) * 100
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    evaluator.update({i: {"scores": torch.rand(300), "labels": torch.ones(300).long(), "boxes": boxes} for i in (1, 2)})

    assert evaluator.compute().stats["AP"] < 0.1


def test_the_table_shows_intervals_beside_the_numbers() -> None:
    from detr_backbone.evaluation.intervals import resample_intervals

    evaluator = CocoEvaluator(toy())
    evaluator.update({1: found(RIGHT), 2: found()})

    lines = evaluator.compute().table(resample_intervals(evaluator.matches(), resamples=100)).splitlines()

    assert lines[1].startswith("AP         50.5 [")
    assert lines[6] == "AP_large      -"


TINY = EvaluationSettings(
    iou_thresholds=(0.3, 0.5, 0.9), area_ranges={"tiny": (0, 20**2), "rest": (20**2, 1e5**2)}, max_dets=(2, 5)
)


@pytest.mark.parametrize("seed", range(2))
def test_other_settings_give_the_numbers_of_pycocotools_by_their_names(seed: int) -> None:
    content, results = coco_sets.random_set(np.random.default_rng(seed))
    expected = coco_sets.pycocotools_precision_and_recall(content, results, TINY)
    numbers = []
    for backend in BACKENDS:
        evaluator = CocoEvaluator(content, backend=backend, settings=TINY)
        evaluator.update(predictions_of(content, results, "bbox"))
        numbers.append(evaluator.compute())

    precision, recall = expected
    names = ("AP", "AP30", "AP50", "AP90", "AP_tiny", "AP_rest", "AR_2", "AR_5", "AR_tiny", "AR_rest")
    by_hand = [
        *(precision[..., 0, 1], precision[0, ..., 0, 1], precision[1, ..., 0, 1], precision[2, ..., 0, 1]),
        *(precision[..., 1, 1], precision[..., 2, 1]),
        *(recall[..., 0, 0], recall[..., 0, 1], recall[..., 1, 1], recall[..., 2, 1]),
    ]
    for result in numbers:
        assert tuple(result.stats) == names
        # sums are taken in another order
        assert list(result.stats.values()) == pytest.approx([v[v > -1].mean() for v in by_hand], abs=1e-12)
    assert "settings IoU 0.3, 0.5, 0.9, areas tiny 0 to 400, rest 400 to 1e+10, at most 2, 5 detections" in str(result)
    assert len({round(value, 6) for value in result.stats.values()}) > 7  # the settings make a difference


@pytest.mark.parametrize(
    "wrong",
    [
        {"iou_thresholds": ()},
        {"iou_thresholds": (0.5, 0.5)},
        {"iou_thresholds": (0.0, 0.5)},
        {"iou_thresholds": (50,)},
        {"max_dets": (100, 10)},
        {"max_dets": (0,)},
        {"area_ranges": {"small": (9, 1)}},
        {"area_ranges": {"all": (0, 1)}},
        {"area_ranges": {"100": (0, 1)}},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` must "):
        EvaluationSettings(**wrong)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("area contradicts", {"area": 1e11}), ("to be ignored", {"ignore": 1}), ("annotated twice", {"image_id": 2})],
)
def test_the_table_says_what_makes_its_numbers_misleading(kind: str, change: dict[str, Any]) -> None:
    annotations = toy()["annotations"]
    annotations[0] |= change
    evaluator = CocoEvaluator(toy(annotations=annotations))
    evaluator.update({1: found(RIGHT), 2: found(RIGHT)})

    (line,) = (line for line in str(evaluator.compute()).splitlines() if line.startswith("warning: "))

    assert kind in line
    assert ": 1 | fix: " in line


def interval(low: float, high: float) -> Interval:
    return Interval(estimate=0.5, low=low, high=high)


@pytest.mark.parametrize(
    ("of_ap", "shown", "said"),
    [
        ((0.4, 0.6), "50.0 [40.0, 60.0]", False),
        ((0.3, 0.45), "50.0 [30.0, 45.0]", True),
        ((0.55, 0.6), "50.0 [55.0, 60.0]", True),
        ((math.nan, math.nan), "50.0 -", False),
    ],
)
def test_an_interval_is_shown_or_a_dash_and_one_without_its_number_is_explained(
    of_ap: tuple[float, float], shown: str, said: bool
) -> None:
    result = CocoResult(stats={"AP": 0.5, "AP_large": -1}, per_class={"cat": 0.5}, num_images=1, num_expected=1)
    intervals = Intervals(
        stats={"AP": interval(*of_ap), "AP_large": interval(math.nan, math.nan)},
        per_class={"cat": interval(0.4, 0.6)},
        level=0.95,
        resamples=2,
    )

    lines = result.table(intervals).splitlines()

    assert lines[1] == f"AP        {shown}"
    assert lines[2] == "AP_large     -"
    assert [line.endswith(": AP") for line in lines if line.startswith("outside of the interval")] == [True] * said
