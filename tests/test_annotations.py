"""A COCO annotation file, checked from end to end and packed into arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_backbone.coco.annotations import load_annotations, parse_annotations
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
