"""A COCO annotation file, checked from end to end and packed into arrays."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_backbone.coco.annotations import MAX_BYTES, load_annotations, parse_annotations
from detr_backbone.coco.findings import DataPolicies
from detr_backbone.errors import AnnotationError


def content(**changes: Any) -> dict[str, Any]:
    """Two images, two categories whose ids have a gap, two annotations, in no order."""
    return {
        "images": [
            {"id": 9, "file_name": "b.png", "width": 64, "height": 48},
            {"id": 4, "file_name": "a.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 79, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 12, "image_id": 9, "category_id": 79, "bbox": [1, 2, 3, 4], "area": 7.5, "iscrowd": 1},
            {"id": 11, "image_id": 4, "category_id": 3, "bbox": [5.5, 0, 2, 2]},
        ],
    } | changes


def with_annotation(**changes: Any) -> dict[str, Any]:
    """The same with another second annotation; None removes a key."""
    first, second = content()["annotations"]
    changed = {key: value for key, value in (second | changes).items() if value is not None}
    return content(annotations=[first, changed])


def test_images_come_in_the_order_of_their_ids() -> None:
    annotations = parse_annotations(content(), source="x.json")

    assert annotations.image_ids.tolist() == [4, 9]
    assert annotations.file_names.tolist() == ["a.png", "b.png"]
    assert annotations.sizes.tolist() == [[10, 20], [48, 64]]


def test_annotations_come_in_the_order_of_their_images() -> None:
    records = [
        {"id": n, "image_id": i, "category_id": 3, "bbox": [n, 0, 1, 1]} for n, i in enumerate([9, 4, 9, 4], start=1)
    ]
    annotations = parse_annotations(content(annotations=records), source="x.json")

    assert annotations.annotation_ids.tolist() == [2, 4, 1, 3]
    assert annotations.image_index.tolist() == [0, 0, 1, 1]
    assert annotations.boxes[:, 0].tolist() == [2, 4, 1, 3]


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 2, 3], [1, 44, 90], [79], [3, 1, 2]])
def test_labels_count_the_categories_in_the_order_of_their_ids(ids: list[int]) -> None:
    records = [{"id": n, "image_id": 4, "category_id": i, "bbox": [0, 0, 1, 1]} for n, i in enumerate(ids)]
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    annotations = parse_annotations(content(categories=categories, annotations=records), source="x.json")

    assert annotations.category_ids == tuple(sorted(ids))
    assert [annotations.category_ids[label] for label in annotations.labels] == ids
    assert annotations.category_names == tuple(f"class {i}" for i in sorted(ids))


def test_a_missing_area_is_that_of_the_box_and_a_missing_iscrowd_is_no() -> None:
    annotations = parse_annotations(content(), source="x.json")

    assert annotations.areas.tolist() == [4.0, 7.5]
    assert annotations.is_crowd.tolist() == [False, True]


def test_categories_that_share_a_name_are_told_apart_by_id() -> None:
    categories = [{"id": 3, "name": "dog"}, {"id": 79, "name": "dog"}]

    names = parse_annotations(content(categories=categories), source="x.json").category_names

    assert names == ("dog (id 3)", "dog (id 79)")


def test_a_file_without_annotations_packs_into_empty_arrays() -> None:
    annotations = parse_annotations(content(annotations=[]), source="x.json")

    assert annotations.boxes.shape == (0, 4)
    assert annotations.labels.dtype == np.int64


IMAGE = {"id": 4, "file_name": "a.png", "width": 20, "height": 10}
WRONG = {
    "not an object": ([], "file=x.json | got list"),
    "no keys": ({}, "file=x.json key=images, annotations, categories |"),
    "no categories key": ({"images": [], "annotations": []}, "file=x.json key=categories |"),
    "a list that is none": (content(images={}), "file=x.json key=images | got dict"),
    "no categories": (content(categories=[]), "file=x.json key=categories | got []"),
    "string image id": (content(images=[IMAGE | {"id": "abc"}]), "file=x.json key=images.id index=0 | got 'abc'"),
    "true as an id": (content(images=[IMAGE | {"id": True}]), "file=x.json key=images.id index=0 | got True"),
    "id beyond 64 bits": (content(images=[IMAGE | {"id": 2**63}]), "key=images.id index=0 | got 9223372036854775808"),
    "image that is no object": (content(images=[5]), "file=x.json key=images.id index=0 | got int"),
    "duplicate image": (
        content(images=[IMAGE, IMAGE | {"file_name": "c.png"}]),
        "file=x.json image_id=4 | got 'a.png' and 'c.png'",
    ),
    "empty file name": (content(images=[IMAGE | {"file_name": ""}]), "file=x.json image_id=4 key=file_name | got ''"),
    "number as a file name": (content(images=[IMAGE | {"file_name": 5}]), "image_id=4 key=file_name | got 5"),
    "zero byte in a file name": (content(images=[IMAGE | {"file_name": "a\0"}]), "image_id=4 key=file_name |"),
    "half a surrogate pair": (content(images=[IMAGE | {"file_name": "\ud800"}]), "image_id=4 key=file_name |"),
    "no width": (content(images=[IMAGE | {"width": None}]), "file=x.json image_id=4 key=width | got None"),
    "height 0": (content(images=[IMAGE | {"height": 0}]), "file=x.json image_id=4 key=height | got 0"),
    "duplicate category": (
        content(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]),
        "file=x.json category_id=3 | got 'a' and 'b'",
    ),
    "category without name": (content(categories=[{"id": 3}]), "file=x.json category_id=3 key=name | got None"),
    "duplicate annotation": (with_annotation(id=12), "file=x.json ann_id=12 | fix"),
    "unknown image": (
        with_annotation(image_id=99),
        "file=x.json ann_id=11 key=image_id | got 99 expected one of 2 ids",
    ),
    "unknown image counted": (with_annotation(image_id=99), "so have 1 of 2 annotations"),
    "image id of another type": (with_annotation(image_id="4"), "file=x.json ann_id=11 key=image_id | got '4'"),
    "unknown category": (with_annotation(category_id=77), "file=x.json ann_id=11 key=category_id | got 77"),
    "no box": (with_annotation(bbox=None), "file=x.json ann_id=11 key=bbox | got None"),
    "empty box": (with_annotation(bbox=[]), "file=x.json ann_id=11 key=bbox | got []"),
    "three numbers": (with_annotation(bbox=[1, 2, 3]), "file=x.json ann_id=11 key=bbox | got [1, 2, 3]"),
    "text in a box": (with_annotation(bbox=[1, 2, 3, "1"]), "file=x.json ann_id=11 key=bbox | got [1, 2, 3, '1']"),
    "infinite box": (with_annotation(bbox=[1, 2, 3, 1e400]), "file=x.json ann_id=11 key=bbox | got [1, 2, 3, inf]"),
    "box beyond doubles": (with_annotation(bbox=[10**400, 2, 3, 1]), "file=x.json ann_id=11 key=bbox |"),
    "negative side": (with_annotation(bbox=[1, 2, -3, 4]), "file=x.json ann_id=11 key=bbox | got [1, 2, -3, 4]"),
    "negative area": (with_annotation(area=-1), "file=x.json ann_id=11 key=area | got -1"),
    "text as area": (with_annotation(area="7"), "file=x.json ann_id=11 key=area | got '7'"),
    "iscrowd 2": (with_annotation(iscrowd=2), "file=x.json ann_id=11 key=iscrowd | got 2"),
}


@pytest.mark.parametrize(("wrong", "where"), WRONG.values(), ids=WRONG)
def test_an_error_names_the_place(wrong: Any, where: str) -> None:
    with pytest.raises(AnnotationError) as error:
        parse_annotations(wrong, source="x.json")

    assert where in str(error.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"images": [],\n "annot', "line=2 column=2 | got Unterminated string"),
        ("", "line=1 column=1 |"),
        ('{"a": "NaN",\n "b": NaN}', "line=2 column=7 | got NaN is not a number"),
        ("[1, -Infinity]", "line=1 column=5 | got -Infinity is not a number"),
        ("[1, NaN2]", "line=1 column=5 | got NaN is not a number"),
        ("[" * 100_000, "where: file="),
    ],
)
def test_a_file_that_is_no_json_is_named_with_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)

    with pytest.raises(AnnotationError) as error:
        load_annotations(path)

    assert where in str(error.value)
    assert f"file={path}" in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())

    assert load_annotations(tmp_path / "x.json").image_ids.tolist() == [4, 9]


@pytest.mark.parametrize("data", [None, b"\xff\xfe{}"])
def test_a_file_that_cannot_be_read_as_text_is_named(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "x.json").write_bytes(data)

    with pytest.raises(AnnotationError, match=r"where: file=.*x\.json"):
        load_annotations(tmp_path / "x.json")


DROPPED = {
    "unknown_image": {"image_id": 99},
    "unknown_category": {"category_id": 77},
    "duplicate_annotation": {"id": 12},
    "box_malformed": {"bbox": [1, 2, 3]},
    "box_negative": {"bbox": [1, 2, -3, 4]},
    "area_malformed": {"area": -1},
    "crowd_malformed": {"iscrowd": 2},
}


@pytest.mark.parametrize(("kind", "change"), DROPPED.items(), ids=DROPPED)
def test_an_annotation_is_left_out_and_counted_where_its_policy_says_so(kind: str, change: dict[str, Any]) -> None:
    policies = DataPolicies(**{kind: "drop"})  # type: ignore[arg-type]

    annotations = parse_annotations(with_annotation(**change), source="x.json", policies=policies)

    assert annotations.annotation_ids.tolist() == [12]
    assert annotations.boxes.tolist() == [[1, 2, 3, 4]]
    assert annotations.findings == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "bbox"),
    [("box_partly_outside", [15, 0, 6, 2]), ("box_without_area", [5, 0, 0, 2]), ("box_outside", [20, 0, 2, 2])],
)
def test_a_box_that_training_could_clip_or_drop_is_refused_where_its_policy_says_so(kind: str, bbox: list[int]) -> None:
    with pytest.raises(AnnotationError, match=r"file=x\.json image_id=4 ann_id=11 key=bbox"):
        parse_annotations(with_annotation(bbox=bbox), source="x.json", policies=DataPolicies(**{kind: "error"}))  # type: ignore[arg-type]


def test_boxes_stay_as_the_file_has_them_for_the_evaluation() -> None:
    policies = DataPolicies(box_outside="drop")
    boxes = [[15, 0, 6, 2], [5, 0, 0, 2], [20, 0, 2, 2]]
    records = [{"id": n, "image_id": 4, "category_id": 3, "bbox": box} for n, box in enumerate(boxes, start=1)]

    annotations = parse_annotations(content(annotations=records), source="x.json", policies=policies)

    assert annotations.boxes.tolist() == boxes
    expected = {"box_outside": 1, "box_partly_outside": 1, "boxes_moved": 0, "box_without_area": 1}
    assert annotations.findings == {kind: count for kind, count in expected.items() if count}


def test_polygons_that_are_not_asked_for_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(with_annotation(segmentation=[[1, 2.5, -3e1], [4, 5]])))

    assert load_annotations(path).annotation_ids.tolist() == [11, 12]


@pytest.mark.parametrize("text", ['"segmentation": [[1]]]', '"segmentation": [[1]', '"segmentation": [[1, NaN]]'])
def test_what_is_no_json_around_a_polygon_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(with_annotation(segmentation=[[1]])).replace('"segmentation": [[1]]', text))

    with pytest.raises(AnnotationError, match=r"line=1 column="):
        load_annotations(path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    with pytest.raises(AnnotationError, match=rf"file is too large .* expected {MAX_BYTES} at most"):
        load_annotations(path)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path, *, enabled: bool) -> None:
    (tmp_path / "right.json").write_text(json.dumps(content()))
    (tmp_path / "wrong.json").write_text("{")
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        load_annotations(tmp_path / "right.json")
        after_success = gc.isenabled()
        with pytest.raises(AnnotationError):
            load_annotations(tmp_path / "wrong.json")
        assert (after_success, gc.isenabled()) == (enabled, enabled)
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize(
    ("policy", "ids", "crowds", "warned"),
    [("keep", [11, 12], [False, True], 1), ("crowd", [11, 12], [True, True], 0), ("drop", [12], [True], 0)],
)
def test_an_ignore_flag_is_kept_taken_as_a_crowd_or_dropped(
    policy: Any, ids: list[int], crowds: list[bool], warned: int
) -> None:
    policies = DataPolicies(ignore_flag=policy)

    annotations = parse_annotations(with_annotation(ignore=1), source="x.json", policies=policies)

    assert annotations.annotation_ids.tolist() == ids
    assert annotations.is_crowd.tolist() == crowds
    assert annotations.findings == {"ignore_flag": 1}
    assert len(annotations.warnings) == warned


@pytest.mark.parametrize(("policy", "ids", "warned"), [("warn", [11, 12, 13], 1), ("drop", [11, 12], 0)])
def test_a_box_under_two_ids_is_named_or_dropped(policy: Any, ids: list[int], warned: int) -> None:
    again = content()
    again["annotations"].append({**again["annotations"][1], "id": 13})

    annotations = parse_annotations(again, source="x.json", policies=DataPolicies(duplicate_box=policy))

    assert sorted(annotations.annotation_ids.tolist()) == ids
    assert annotations.findings == {"duplicate_box": 1}
    assert len(annotations.warnings) == warned


@pytest.mark.parametrize("change", [{"image_id": 9}, {"category_id": 79}, {"bbox": [1, 2, 3, 4.5]}, {"iscrowd": 1}])
def test_a_box_of_another_image_category_or_size_is_no_duplicate(change: dict[str, Any]) -> None:
    both = content()
    both["annotations"].append({**both["annotations"][1], "id": 13, **change})

    assert "duplicate_box" not in parse_annotations(both, source="x.json").findings
