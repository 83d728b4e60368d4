"""Parts of a COCO dataset: the same images for everyone, smaller within larger."""

import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detr_backbone.coco.annotations import CocoAnnotations, parse_annotations
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.subset import image_ids_sha256, only, take_subset, write_subset
from detr_backbone.errors import ConfigError, DataError
from detr_backbone.evaluation.evaluator import CocoEvaluator


def content(images: int = 40, first: int = 1) -> dict[str, Any]:
    """Images with the ids 3 i: a person where 5 does not divide i, a cat where 3 does; a zebra in 36, a crowd in 45."""
    ids = [3 * i for i in range(first, first + images)]
    objects = [(i, 1) for i in ids if i // 3 % 5] + [(i, 17) for i in ids if i // 3 % 3 == 0] + [(36, 24)]
    outline = {"segmentation": [[0, 0, 4, 0, 4, 2]]}
    boxes = [
        {"id": number, "image_id": i, "category_id": category, "bbox": [0, 0, number % 7 + 1, 2], "mine": [number]}
        | outline
        for number, (i, category) in enumerate(objects)
    ]
    crowd = {"id": 999, "image_id": 45, "category_id": 24, "bbox": [0, 0, 9, 9], "iscrowd": 1} | outline
    return {
        "info": {"year": 2017, "mine": None},
        "licenses": [{"id": 1}],
        "images": [{"id": i, "file_name": f"{i:04d}.png", "height": 10, "width": 20, "mine": i / 3} for i in ids],
        "annotations": [*boxes, crowd],
        "categories": [{"id": i, "name": name} for i, name in ((1, "person"), (17, "cat"), (24, "zebra"), (90, "bus"))],
        "mine": {"also": 1.5},
    }


WHOLE = parse_annotations(content(), source="x.json", segmentations=True)


def ids_of(whole: CocoAnnotations = WHOLE, **options: Any) -> list[int]:
    return take_subset(whole, SubsetConfig(**options)).image_ids.tolist()


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"seed": 5}, {"categories": ("cat", "zebra")}])
def test_a_smaller_subset_lies_within_every_larger_one(options: dict[str, Any]) -> None:
    most = len(ids_of(categories=options.get("categories", ())))
    sets = [set(ids_of(count=count, **options)) for count in range(1, most + 1)]

    assert [len(taken) for taken in sets] == list(range(1, most + 1))
    assert all(small < large for small, large in pairwise(sets))


def test_the_draw_is_the_same_for_all_time() -> None:
    # the five of the 40 ids with the smallest `printf '0 ID' | b2sum -l 64`, in ascending order of that
    assert ids_of(count=5) == sorted([15, 111, 30, 42, 45])


def test_another_seed_draws_other_images() -> None:
    assert len({tuple(ids_of(count=20, seed=seed)) for seed in range(10)}) == 10


def test_every_image_is_drawn_as_often_as_the_others() -> None:
    drawn = np.array([np.isin(WHOLE.image_ids, ids_of(count=10, seed=seed)) for seed in range(400)]).sum(axis=0)

    # binomial, 400 draws of 1 in 4: 100 with a deviation of 8.7; the seeds are fixed, so this holds always or never
    assert np.abs(drawn - 100).max() < 4 * 8.7


def test_the_order_of_the_records_does_not_matter() -> None:
    shuffled = content()
    shuffled["images"].reverse()
    shuffled["annotations"].reverse()
    other = parse_annotations(shuffled, source="x.json")

    for options in ({"count": 7}, {"count": 7, "balanced": True}):
        assert ids_of(other, **options) == ids_of(**options)


def test_where_the_dataset_grows_only_new_images_push_old_ones_out() -> None:
    grown = parse_annotations(content(60), source="x.json")
    old, new = set(ids_of(count=20)), set(ids_of(grown, count=20))

    assert 0 < len(new - old) < 20
    assert all(image_id > 120 for image_id in new - old)


def test_a_share_is_rounded_and_at_least_one_image() -> None:
    assert len(ids_of(share=0.26)) == 10
    assert ids_of(share=0.0001) == ids_of(count=1)
    assert ids_of(share=0.5) == ids_of(count=20)
    assert ids_of(share=1.0) == WHOLE.image_ids.tolist()


def test_categories_go_by_name_or_id() -> None:
    assert ids_of(categories=("cat",)) == ids_of(categories=(17,)) == [9 * i for i in range(1, 14)]


def test_an_image_with_one_of_the_categories_is_enough_but_a_crowd_is_not() -> None:
    assert ids_of(categories=("zebra",)) == [36]
    assert set(ids_of(categories=("person", "cat"))) == {3 * i for i in range(1, 41) if i % 5 or i % 3 == 0}


def test_areas_are_those_of_the_objects_that_are_asked_for() -> None:
    areas = {i: [] for i in WHOLE.image_ids.tolist()}
    for box in content()["annotations"][:-1]:
        if box["category_id"] == 17:
            areas[box["image_id"]].append(box["bbox"][2] * box["bbox"][3])

    wanted = [i for i, of_cats in areas.items() if any(4 <= area < 10 for area in of_cats)]
    assert 0 < len(wanted) < 13
    assert ids_of(categories=("cat",), min_area=4, max_area=10) == wanted


def test_images_are_named_by_id_or_by_a_list_of_names_and_ids(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf0009.png\r\n\n  3\n000120\n0009.png\n")

    assert ids_of(image_ids=(120, 3, 9, 3)) == ids_of(image_list=str(tmp_path / "list.txt")) == [3, 9, 120]


def test_conditions_add_up(tmp_path: Path) -> None:
    assert ids_of(image_ids=(3, 9, 18, 36), categories=("cat",)) == [9, 18, 36]
    assert set(ids_of(categories=("cat",), count=5)) < set(ids_of(categories=("cat",)))


def test_a_balanced_draw_takes_the_rarest_first_and_keeps_the_categories_level() -> None:
    assert ids_of(count=1, balanced=True) == [36]  # the only zebra; there is no bus

    chosen = take_subset(WHOLE, SubsetConfig(count=13, balanced=True))
    held = {name: set(chosen.image_index[chosen.labels == label]) for label, name in enumerate(chosen.category_names)}
    assert abs(len(held["person"]) - len(held["cat"])) <= 2  # most cats bring a person
    plain = take_subset(WHOLE, SubsetConfig(count=13))
    assert len(held["cat"]) > len(set(plain.image_index[plain.labels == 1]))


def test_a_balanced_draw_comes_to_images_without_objects_last() -> None:
    empty = {3 * i for i in range(1, 41) if i % 5 == 0 and i % 3}

    assert not empty & set(ids_of(count=40 - len(empty), balanced=True))
    assert len(ids_of(count=39, balanced=True)) == 39


def test_a_subset_holds_its_images_with_all_that_is_theirs() -> None:
    chosen = only(WHOLE, [36, 9])

    assert chosen.image_ids.tolist() == [9, 36]
    assert chosen.file_names.tolist() == ["0009.png", "0036.png"]
    for image_id in (9, 36):
        (here,), (there,) = (np.flatnonzero(part.image_ids == image_id) for part in (chosen, WHOLE))
        for name in ("annotation_ids", "labels", "boxes", "areas", "is_crowd"):
            mine = getattr(chosen, name)[chosen.image_index == here]
            assert np.array_equal(mine, getattr(WHOLE, name)[WHOLE.image_index == there])


def test_every_field_of_the_annotations_is_taken_by_image_or_by_annotation_or_kept() -> None:
    chosen = only(WHOLE, [3])
    lengths = {
        f.name: len(getattr(chosen, f.name))
        for f in fields(chosen)
        if f.name not in ("source", "part", "findings", "warnings")
    }

    per_image = {"image_ids", "file_names", "sizes"}
    per_category = {"category_ids", "category_names"}
    assert lengths == {name: 4 if name in per_category else 1 for name in lengths}  # image 3 holds one person
    assert per_image | per_category < set(lengths)
    assert chosen.segmentations is not None
    assert WHOLE.segmentations is not None
    assert chosen.segmentations[0] == WHOLE.segmentations[0]


def test_categories_stay_those_of_the_dataset_unless_they_are_dropped() -> None:
    kept = take_subset(WHOLE, SubsetConfig(image_ids=(9, 36)))
    dropped = take_subset(WHOLE, SubsetConfig(image_ids=(9, 45), drop_unused_categories=True))

    assert kept.category_ids == WHOLE.category_ids
    assert (dropped.category_ids, dropped.category_names) == ((1, 17, 24), ("person", "cat", "zebra"))
    dropped = take_subset(WHOLE, SubsetConfig(image_ids=(45,), drop_unused_categories=True))
    assert (dropped.category_ids, dropped.labels.tolist()) == ((17, 24), [0, 1])  # a cat, and a crowd of zebras


def test_without_options_it_is_the_dataset_itself() -> None:
    assert take_subset(WHOLE, SubsetConfig()) is WHOLE


def test_an_evaluation_says_which_part_it_is_of() -> None:
    chosen = take_subset(WHOLE, SubsetConfig(count=5, seed=2))
    evaluator = CocoEvaluator(chosen)

    lines = str(evaluator.compute(allow_partial=True)).splitlines()

    assert evaluator.image_ids == tuple(ids_of(count=5, seed=2))
    ids = image_ids_sha256(evaluator.image_ids)[:12]
    assert lines[:2] == ["images 0 of 5", f"subset 5 of 40 images (seed 2, ids sha256 {ids})"]


CONTRADICTIONS = [
    ({"count": 0}, r"`subset.count` must be at least 1, got 0"),
    ({"share": 0.0}, r"`subset.share` must be above 0 and at most 1, got 0.0"),
    ({"share": 1.5}, r"`subset.share` must be above 0 and at most 1, got 1.5"),
    ({"count": 1, "seed": -1}, r"`subset.seed` must be at least 0, got -1"),
    ({"min_area": -1.0}, r"`subset.min_area` must be at least 0, got -1.0"),
    ({"min_area": 5.0, "max_area": 5.0}, r"`subset.max_area` must be above `subset.min_area`, got 5.0"),
    ({"count": 2, "share": 0.5}, r"`subset.count` and `subset.share` exclude each other, got 2 and 0.5"),
    ({"image_ids": (3,), "image_list": "x"}, r"`subset.image_ids` and `subset.image_list` exclude each other"),
    ({"balanced": True}, r"`subset.balanced` decides what `subset.count` or `subset.share` draws: set one of them"),
    ({"seed": 3}, r"`subset.seed` decides what `subset.count` or `subset.share` draws: .* got 3 alone"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SubsetConfig(**options)


IMPOSSIBLE = [
    ({"count": 41}, r"file=x.json key=subset \| got 40 of 40 \(seed 0\) expected 41 or more"),
    ({"categories": ("bus",)}, r"subset has no images .* got 0 of 40 \(with bus\)"),
    ({"image_ids": (4, 9, 500)}, r"key=subset.image_ids \| got 2 unknown: 4 \(nearest 3\), 500 \(nearest 120\)"),
    (
        {"categories": ("cta", 91, "cat")},
        r"key=subset.categories \| got 2 unknown: 'cta' \(nearest 'cat'\), 91 \(near.*90",
    ),
    ({"categories": ("?",)}, r"got 1 unknown: '\?'$"),
    ({"image_list": "missing.txt"}, r"file=missing.txt key=subset.image_list \| got .*No such file"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_a_subset_that_cannot_be_taken_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ids_of(**options)


def test_listed_images_that_are_unknown_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(["0003.png", "0004.png", *"abcdef"]))

    with pytest.raises(ConfigError, match=r"got 7 unknown: '0004.png' \(nearest '00.*'b', 'c', 'd', \.\.\.$"):
        ids_of(image_list=str(tmp_path / "list.txt"))


def test_a_list_without_images_and_a_subset_without_categories_are_errors(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n")

    with pytest.raises(ConfigError, match=r"subset has no images .* \(listed in .*list.txt\)"):
        ids_of(image_list=str(tmp_path / "list.txt"))
    with pytest.raises(ConfigError, match="subset has no annotations, and so no categories"):
        ids_of(image_ids=(30,), drop_unused_categories=True)


def test_the_hash_is_that_of_the_sorted_ids_one_per_line() -> None:
    # printf '1\n2\n10\n' | sha256sum
    assert image_ids_sha256([10, 1, 2]) == "29186ee59865abdf5f37da40cefc9e7f345e49860aefd7a8f43438cdaf88f856"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with pictures in `pictures` and the annotations in `x.json`."""
    (tmp_path / "pictures").mkdir()
    for image in content()["images"]:
        Image.new("RGB", (20, 10), "red").save(tmp_path / "pictures" / image["file_name"])
    (tmp_path / "x.json").write_text(json.dumps(content()), encoding="utf-8")
    return tmp_path


def write(source: Path, **options: Any) -> dict[str, Any]:
    given = {"images": source / "pictures", "config": SubsetConfig(count=8)} | options
    return write_subset(source / "x.json", source / "out", **given)


@pytest.mark.parametrize("pictures", ["link", "copy"])
def test_a_written_subset_is_a_dataset(source: Path, pictures: str) -> None:
    write(source, pictures=pictures)

    out = source / "out"
    dataset = CocoDetection(out / "pictures", out / "annotations" / "x.json")
    assert list(dataset.image_ids) == ids_of(count=8)
    assert dataset[0][0].shape == (3, 10, 20)
    assert dataset.category_ids == WHOLE.category_ids
    assert len(list((out / "pictures").iterdir())) == 8
    name = next((out / "pictures").iterdir()).name
    assert (out / "pictures" / name).samefile(source / "pictures" / name) == (pictures == "link")
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_a_written_subset_loads_in_pycocotools(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(source)

    coco = COCO(source / "out" / "annotations" / "x.json")

    assert sorted(coco.getImgIds()) == ids_of(count=8)
    assert len(coco.getCatIds()) == 4


def test_records_are_written_as_they_were(source: Path) -> None:
    write(source)

    whole = content()
    part = json.loads((source / "out" / "annotations" / "x.json").read_text(encoding="utf-8"))
    chosen = set(ids_of(count=8))
    assert list(part) == list(whole)
    assert {key: part[key] for key in ("info", "licenses", "categories", "mine")} == {
        key: whole[key] for key in ("info", "licenses", "categories", "mine")
    }
    assert part["images"] == [image for image in whole["images"] if image["id"] in chosen]
    assert part["annotations"] == [box for box in whole["annotations"] if box["image_id"] in chosen]


def test_the_manifest_says_what_the_subset_is(source: Path) -> None:
    manifest = write(source, config=SubsetConfig(image_ids=(9, 36, 45)))

    assert json.loads((source / "out" / "manifest.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(manifest)
    )
    assert manifest["options"]["image_ids"] == (9, 36, 45)
    assert (manifest["images"], manifest["boxes"], manifest["crowds"]) == (3, 6, 1)
    assert manifest["per_class"] == {
        "person": {"images": 2, "boxes": 2},
        "cat": {"images": 3, "boxes": 3},
        "zebra": {"images": 1, "boxes": 1},
        "bus": {"images": 0, "boxes": 0},
    }
    assert manifest["image_ids_sha256"] == image_ids_sha256([9, 36, 45])


def test_pictures_may_be_left_out(source: Path) -> None:
    write(source, images=None, pictures="none", config=SubsetConfig(image_ids=(9,), drop_unused_categories=True))

    assert {path.name for path in (source / "out").iterdir()} == {"annotations", "manifest.json"}
    part = json.loads((source / "out" / "annotations" / "x.json").read_text(encoding="utf-8"))
    assert [category["name"] for category in part["categories"]] == ["person", "cat"]


def test_an_output_that_holds_something_is_left_alone(source: Path) -> None:
    (source / "out").mkdir()
    write(source)  # an empty folder will do

    with pytest.raises(DataError, match=r"output holds something \| where: folder=.*out"):
        write(source)


def test_what_fails_leaves_nothing_behind(source: Path) -> None:
    (source / "pictures" / f"{ids_of(count=8)[-1]:04d}.png").unlink()
    before = sorted(source.iterdir())

    with pytest.raises(DataError, match="image files are missing"):
        write(source)

    assert sorted(source.iterdir()) == before


def test_a_subset_of_everything_and_pictures_from_nowhere_are_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="needs an option that says which images"):
        write(source, config=SubsetConfig())
    with pytest.raises(ConfigError, match="`images` must be given unless `pictures` is 'none', got None and 'copy'"):
        write(source, images=None, pictures="copy")


NUMBERED = parse_annotations(
    {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "7"}, {"id": 2, "name": "1"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": i, "image_id": i, "category_id": i, "bbox": [1, 1, 4, 4]} for i in (1, 2, 3)],
    },
    source="numbered.json",
)


@pytest.mark.parametrize(
    ("category", "image"),
    [("id:1", 1), ("name:1", 2), (2, 2), ("2", 2), (7, 1), ("7", 1), ("name:7", 1), ("id:3", 3), ("cat", 3)],
)
def test_a_category_is_chosen_by_id_or_name_also_where_names_are_numbers(category: int | str, image: int) -> None:
    assert take_subset(NUMBERED, SubsetConfig(categories=(category,))).image_ids.tolist() == [image]


@pytest.mark.parametrize("category", [1, "1"])
def test_a_number_that_is_an_id_and_the_name_of_another_category_is_refused(category: int | str) -> None:
    with pytest.raises(ConfigError, match=r"key=subset.categories \| got .* expected 'id:1' or 'name:1'"):
        take_subset(NUMBERED, SubsetConfig(categories=(category,)))
