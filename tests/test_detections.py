"""A COCO results file, read and checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from detr_backbone.coco.annotations import parse_annotations
from detr_backbone.errors import EvaluationError
from detr_backbone.evaluation.box_format import refuse_other_formats
from detr_backbone.evaluation.detections import load_detections
from tests.coco_sets import TOY, packed

GOOD = {"image_id": 2, "category_id": 5, "bbox": [1, 2.5, 3, 4], "score": 0.5}
TRUTH = parse_annotations(TOY, source="<test>")


def test_a_results_file_is_packed(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([GOOD, {**GOOD, "image_id": 1, "category_id": 1}]))

    detections = load_detections(tmp_path / "x.json", TRUTH)

    assert len(detections) == 2
    assert detections.image_index.tolist() == [1, 0]
    assert detections.labels.tolist() == [1, 0]
    assert detections.boxes[0].tolist() == [1, 2.5, 3, 4]
    assert detections.areas.tolist() == [12, 12]


def test_an_empty_results_file_has_no_detections(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")

    assert load_detections(tmp_path / "x.json", TRUTH).boxes.shape == (0, 4)


WRONG = {
    "no JSON": ('[{"image_id": 2,', "line=1"),
    "NaN": ('[{"image_id": 2, "category_id": 5, "bbox": [0, 0, 1, 1], "score": NaN}]', "NaN is not a number"),
    "an object": ("{}", "results are not a list | where: file="),
    "no score": ([GOOD, {"image_id": 2, "category_id": 5, "bbox": [0, 0, 1, 1]}], "index=1 key=score | got None"),
    "three numbers": ([{**GOOD, "bbox": [1, 2, 3]}], "index=0 key=bbox | got [1, 2, 3] expected four numbers"),
    "a text": ([GOOD, {**GOOD, "score": "0.5"}], "index=1 key=score | got '0.5' expected a number"),
    "a number": ([7], "index=0 key=image_id | got None"),
    "half an id": ([{**GOOD, "image_id": 1.5}], "index=0 key=image_id | got 1.5"),
    "unknown image": ([{**GOOD, "image_id": 3}], "key=image_id | got 1 unknown, first [3] expected among the 2"),
    "unknown category": ([{**GOOD, "category_id": 2}], "key=category_id | got 1 unknown, first [2]"),
    "negative side": ([{**GOOD, "bbox": [5, 5, -1, 2]}], "index=0 key=bbox | got [5.0, 5.0, -1.0, 2.0]"),
    "beyond doubles": ([{**GOOD, "score": 10**400}], "number is too large | where: "),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_results_file_that_is_wrong_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "x.json").write_text(text)

    with pytest.raises(EvaluationError) as error:
        load_detections(tmp_path / "x.json", TRUTH)

    assert message in str(error.value)


FAR = parse_annotations(
    TOY | {"annotations": [{**entry, "bbox": [120, 90, 40, 50], "iscrowd": 0} for entry in TOY["annotations"][::2]]},
    source="<far>",
)
"""Two objects away from the corner of their image."""


def boxes_of(read: Any) -> list[dict[str, Any]]:
    """What a detector that finds both gives in another format."""
    return [{**entry, "bbox": read(120.0, 90.0, 40.0, 50.0), "score": 0.9} for entry in TOY["annotations"][::2]]


FORMATS = {
    "fractions": (lambda x, y, w, h: [x / 200, y / 200, w / 200, h / 200], "look like fractions of the image"),
    "scaled twice": (lambda x, y, w, h: [x * 200, y * 200, w * 200, h * 200], "by the image's size once more"),
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "look like x1, y1, x2, y2"),
}


@pytest.mark.parametrize(("read", "message"), FORMATS.values(), ids=FORMATS)
def test_boxes_in_another_format_are_refused_by_its_name(read: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=f"{message}.* match 0 of 2 objects as they are and 2 as"):
        refuse_other_formats(FAR, packed(FAR, boxes_of(read)), "file=x")


LEGITIMATE = {
    "right": lambda x, y, w, h: [x, y, w, h],
    "collapsed into the first pixel": lambda *_: [0.2, 0.3, 0.4, 0.4],
    "nothing but points": lambda *_: [0.0, 0.0, 0.0, 0.0],
    "the whole image": lambda *_: [0.0, 0.0, 200.0, 200.0],
    "far outside": lambda *_: [5000.0, 5000.0, 10.0, 10.0],
    "half of it in the middle": lambda *_: [50.0, 50.0, 100.0, 100.0],
    "beside every object": lambda x, y, w, h: [x - 100, y - 80, w, h],
}


@pytest.mark.parametrize("read", LEGITIMATE.values(), ids=LEGITIMATE)
def test_a_bad_detector_is_not_taken_for_another_format(read: Any) -> None:
    refuse_other_formats(FAR, packed(FAR, boxes_of(read)), "file=x")


def test_boxes_of_a_pixel_are_right_in_tiny_images() -> None:
    tiny = parse_annotations(
        TOY
        | {
            "images": [{**image, "width": 4, "height": 4} for image in TOY["images"]],
            "annotations": [{**entry, "bbox": [0, 0, 1, 1], "area": 1} for entry in TOY["annotations"]],
        },
        source="<tiny>",
    )

    refuse_other_formats(tiny, packed(tiny, boxes_of(lambda *_: [0.0, 0.0, 0.25, 0.25])), "file=x")
