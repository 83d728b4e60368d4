"""Masks of annotations, checked and packed before any C code sees them."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO

from detr_backbone.coco.annotations import parse_annotations
from detr_backbone.coco.findings import DataPolicies
from detr_backbone.coco.segmentations import decoded_counts
from detr_backbone.errors import AnnotationError

HEIGHT, WIDTH = 30, 40


def content(*segmentations: Any) -> dict[str, Any]:
    """One annotation for each segmentation, in the later of two images and the earlier one by turns."""
    fields = {"category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (2, 1)],
        "categories": [{"id": 1, "name": "any"}],
        "annotations": [
            {"id": number, "image_id": 2 - number % 2, "segmentation": segmentation, **fields}
            for number, segmentation in enumerate(segmentations, start=1)
        ],
    }


def random_mask(rng: np.random.Generator) -> np.ndarray:
    return np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.random(), dtype=np.uint8)


def runs_of(pixels: np.ndarray) -> list[int]:
    """The lengths of the runs, by columns, background first, counted one by one."""
    runs, value = [0], 0
    for pixel in pixels.ravel(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_masks_are_those_of_pycocotools_in_the_order_of_the_annotations() -> None:
    rng = np.random.default_rng(0)
    polygons = [[rng.uniform(-5, 45, 2 * n).tolist() for n in (3, 7)], [rng.uniform(0, 30, 20).tolist()]]
    masks = [random_mask(rng) for _ in range(4)]
    runs = [{"size": [HEIGHT, WIDTH], "counts": runs_of(masks[0])}, {"size": [HEIGHT, WIDTH], "counts": [1200]}]
    strings = [{"size": [HEIGHT, WIDTH], "counts": mask.encode(m)["counts"].decode()} for m in masks[1:]]
    given = content(polygons[0], runs[0], strings[0], polygons[1], strings[1], runs[1], strings[2])

    annotations = parse_annotations(given, source="x.json", segmentations=True)

    coco = COCO()
    coco.dataset = given
    coco.createIndex()
    packed = annotations.segmentations
    assert packed is not None
    assert len(packed) == 7
    for index, annotation_id in enumerate(annotations.annotation_ids.tolist()):
        expected = coco.annToRLE(coco.anns[annotation_id])
        if isinstance(expected["counts"], str):  # as the file has it
            expected = {**expected, "counts": expected["counts"].encode()}
        assert packed[index] == expected


def test_a_part_of_the_segmentations_is_taken_without_the_others() -> None:
    squares = [[[x, 0, x + 4, 0, x + 4, 4, x, 4]] for x in (0, 10, 20)]
    packed = parse_annotations(content(*squares), source="x.json", segmentations=True).segmentations
    assert packed is not None

    part = packed.take(np.array([2, 0]))

    assert [part[0], part[1]] == [packed[2], packed[0]]


def test_segmentations_are_left_out_unless_they_are_asked_for() -> None:
    assert parse_annotations(content("nonsense"), source="x.json").segmentations is None


@pytest.mark.parametrize("seed", range(20))
def test_compressed_runs_are_read_as_pycocotools_writes_them(seed: int) -> None:
    pixels = random_mask(np.random.default_rng(seed))

    assert decoded_counts(mask.encode(pixels)["counts"].decode()) == runs_of(pixels)


def test_a_run_of_millions_is_read() -> None:
    text = mask.frPyObjects({"size": [9000, 9000], "counts": [5, 40_000_000, 3, 40_999_992]}, 9000, 9000)["counts"]

    assert decoded_counts(text.decode()) == [5, 40_000_000, 3, 40_999_992]


@pytest.mark.parametrize("text", ["", "o", "0o", "\x2f", "p", "é", "ooooooo0", "O", "00O"])
def test_a_string_that_holds_no_runs_is_none(text: str) -> None:
    assert decoded_counts(text) is None


WRONG = {
    "nothing": (None, "annotation has no segmentation | where: file=x.json ann_id=1 key=segmentation | got None"),
    "no polygons": ([], "has no segmentation | where: file=x.json ann_id=1 key=segmentation | got []"),
    "a polygon of four numbers": ([[1, 2, 3, 4]], "ann_id=1 key=segmentation | got [[1, 2, 3, 4]] expected polygons"),
    "numbers without a list": ([1, 2, 3, 4, 5, 6], "segmentation is malformed | where: file=x.json ann_id=1"),
    "not a number": ([[1, 2, 3, 4, 5, float("nan")]], "segmentation is malformed"),
    "true as a coordinate": ([[1, 2, 3, 4, 5, True]], "segmentation is malformed"),
    "beyond doubles": ([[1, 2, 3, 4, 5, 10**400]], "segmentation is malformed"),
    "far to the left": ([[1, 2, -81, 4, 5, 6]], "key=segmentation | got coordinates from -81 to 6 expected -80 to 120"),
    "far to the right": ([[1, 2, 121, 4, 5, 6]], "coordinates from 1 to 121"),
    "size without a width": ({"size": [30], "counts": [1200]}, "segmentation is malformed"),
    "a negative run": ({"size": [30, 40], "counts": [-1, 1201]}, "segmentation is malformed"),
    "half a run": ({"size": [30, 40], "counts": [0.5, 1199.5]}, "segmentation is malformed"),
    "no runs": ({"size": [30, 40], "counts": []}, "segmentation.counts | got runs of 0 pixels together expected"),
    "too many runs": ({"size": [30, 40], "counts": [0, 1201]}, "got runs of 1201 pixels together expected 1200"),
    "sides exchanged": ({"size": [40, 30], "counts": [1200]}, "key=segmentation.size | got [40, 30] expected [30, 40]"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_what_would_harm_pycocotools_is_refused_by_name(wrong: Any, message: str) -> None:
    with pytest.raises(AnnotationError) as error:
        parse_annotations(content(wrong), source="x.json", segmentations=True)

    assert message in str(error.value)


def test_an_image_of_any_stated_size_gets_no_mask() -> None:
    given = content({"size": [200_000, 200_000], "counts": [40_000_000_000]}, [[1, 1, 5, 1, 5, 5]])
    for image in given["images"]:
        image.update(height=200_000, width=200_000)

    dropping = DataPolicies(segmentation_malformed="drop", segmentation_size="drop", segmentation_far="drop")
    annotations = parse_annotations(given, source="x.json", segmentations=True, policies=dropping)

    assert len(annotations.boxes) == 0


def test_a_long_outline_is_measured_before_it_is_refused() -> None:
    steps = np.linspace(0, 2 * np.pi, 30_000)  # 40 pixels across: three hundred revolutions of at most one step each
    circle = np.stack([20 + 20 * np.cos(steps), 15 + 15 * np.sin(steps)], axis=1).ravel().tolist()

    packed = parse_annotations(content([circle]), source="x.json", segmentations=True).segmentations

    assert packed is not None
    assert mask.area(packed[0]) == pytest.approx(np.pi * 20 * 15, rel=0.02)  # rasterised to whole pixels


def test_a_dropped_segmentation_takes_its_annotation_along_and_is_counted() -> None:
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    policies = DataPolicies(segmentation_malformed="drop")

    annotations = parse_annotations(
        content(square, "?", square), source="x.json", segmentations=True, policies=policies
    )

    assert sorted(annotations.annotation_ids.tolist()) == [1, 3]
    assert annotations.findings["segmentation_malformed"] == 1
