"""A small COCO dataset drawn from a seed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask

from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.shapes import CLASSES, _draw_image, draw_shapes, main
from detr_backbone.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("drawn") / "shapes"
    draw_shapes(folder, train=60, val=20)
    return folder


def annotations(folder: Path, split: str = "train") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    return content


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_splits_are_datasets_that_hold_up_to_the_checks(drawn: Path) -> None:
    for split, count in (("train", 60), ("val", 20)):
        dataset = CocoDetection(drawn / split, drawn / "annotations" / f"instances_{split}.json")

        assert len(dataset) == count
        assert dataset.category_names == CLASSES
        assert all(image.shape == (3, 128, 128) for image, _ in dataset)
        assert dataset.clipped_boxes == dataset.dropped_boxes == 0


def test_the_same_arguments_give_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "again", train=60, val=20)

    assert contents(tmp_path / "again") == contents(drawn)


def test_another_seed_and_the_other_split_give_other_pictures(drawn: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "other", train=1, val=1, seed=1)

    first = {(drawn / "train/000001.png").read_bytes(), (drawn / "val/000001.png").read_bytes()}
    assert len(first | {path.read_bytes() for path in (tmp_path / "other").rglob("*.png")}) == 4


def test_more_images_leave_the_first_ones_as_they_are(drawn: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "fewer", train=5, val=1)

    assert (tmp_path / "fewer/train/000005.png").read_bytes() == (drawn / "train/000005.png").read_bytes()


def raster(entry: dict[str, Any]) -> Any:
    """The polygon of an annotation on cells four times finer than pixels, drawn by pycocotools."""
    return mask.frPyObjects((np.array(entry["segmentation"]) * 4).tolist(), 512, 512)[0]


def test_areas_are_those_of_the_polygons(drawn: Path) -> None:
    for entry in annotations(drawn)["annotations"]:
        # half a cell, an eighth of a pixel, on either side of an outline that is no longer than twice that of the box
        slack = 4 * sum(entry["bbox"][2:]) / 8
        assert mask.area(raster(entry)) / 16 == pytest.approx(entry["area"], abs=slack)


def test_boxes_are_tight_around_what_was_painted() -> None:
    # pixels that the tip of a shape, stretched to half its width, covers too little to take its colour
    tip = {"ellipse": 1.5, "rectangle": 1.5, "triangle": 3, "star": 5}
    for seed in range(20):
        image, objects = _draw_image(np.random.default_rng(seed), 128, 1)
        picture = np.asarray(image).astype(int)
        for label, polygon in objects:
            column, row = polygon.mean(axis=0).astype(int)
            colour = picture[row - 1 : row + 2, column - 1 : column + 2].mean(axis=(0, 1))
            # one colour and noise with a standard deviation of 4, of which 20 are five
            rows, columns = np.nonzero(_connected(np.abs(picture - colour).max(axis=2) < 20, row, column))
            painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(painted, [*polygon.min(axis=0), *polygon.max(axis=0)], atol=tip[CLASSES[label]])


def _connected(cells: np.ndarray, row: int, column: int) -> np.ndarray:
    """The cells that hang together with one of them."""
    region = np.zeros_like(cells)
    region[row, column] = True
    while True:
        grown = region.copy()
        grown[1:] |= region[:-1]
        grown[:-1] |= region[1:]
        grown[:, 1:] |= region[:, :-1]
        grown[:, :-1] |= region[:, 1:]
        grown &= cells
        if (grown == region).all():
            return region
        region = grown


def test_shapes_do_not_hide_each_other(drawn: Path) -> None:
    content = annotations(drawn)
    for image in content["images"]:
        rasters = [raster(entry) for entry in content["annotations"] if entry["image_id"] == image["id"]]
        if rasters:
            twice = sum(map(mask.area, rasters)) - mask.area(mask.merge(rasters))
            assert twice <= 16  # where two outlines touch, the two libraries may round a few cells differently


def test_there_are_all_classes_and_up_to_four_objects_and_empty_images(drawn: Path) -> None:
    content = annotations(drawn)
    counts = {image["id"]: 0 for image in content["images"]}
    for entry in content["annotations"]:
        counts[entry["image_id"]] += 1

    assert set(counts.values()) == {0, 1, 2, 3, 4}
    assert {entry["category_id"] for entry in content["annotations"]} == {1, 2, 3, 4}


def test_drawing_again_changes_nothing(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "x", train=1, val=1, image_size=32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    draw_shapes(tmp_path / "x", train=1, val=1, image_size=32)

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    draw_shapes(tmp_path, train=1, val=1, image_size=32)

    assert (tmp_path / "val/000001.png").is_file()


def test_another_dataset_is_not_overwritten(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "x", train=1, val=1, image_size=32)

    with pytest.raises(DataError, match=r"where: folder=.*x \| got .*'seed': 0.* expected .*'seed': 1.* fix: choose"):
        draw_shapes(tmp_path / "x", train=1, val=1, image_size=32, seed=1)


@pytest.mark.parametrize("file", ["thesis.tex", "annotations/instances_val.json"])
def test_a_folder_of_other_files_is_not_touched(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("[]")

    with pytest.raises(DataError, match="got other files"):
        draw_shapes(tmp_path, train=1, val=1, image_size=32)


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda _: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        draw_shapes(tmp_path / "x", train=1, val=1, image_size=32)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["train", "val", "seed", "image_size", "max_objects"])
def test_a_number_out_of_range_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be at least .*, got -1"):
        draw_shapes(tmp_path / "x", **{key: -1})


def test_the_module_is_a_command(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "x"), "--train", "1", "--val=1", "--image_size=32"]

    subprocess.run([sys.executable, "-W", "error", "-m", "detr_backbone.coco.shapes", *arguments], check=True)

    assert CocoDetection(tmp_path / "x/val", tmp_path / "x/annotations/instances_val.json")[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--tra", "1"], "--tra"), (["--seed=-1"], "`seed` must be at least 0, got -1")]
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "x"), *arguments])

    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_other_shapes_can_be_asked_for(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "x", train=3, val=1, image_size=32, classes=("hexagon", "cross"))
    content = json.loads((tmp_path / "x" / "annotations" / "instances_train.json").read_text())

    assert [category["name"] for category in content["categories"]] == ["hexagon", "cross"]
    corners = {1: 6, 2: 8}
    for entry in content["annotations"]:
        assert len(entry["segmentation"][0]) == 2 * corners[entry["category_id"]]


@pytest.mark.parametrize("classes", [(), ("star", "star"), ("star", "moon")])
def test_shapes_that_do_not_exist_are_refused(tmp_path: Path, classes: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="`classes` must be different ones of"):
        draw_shapes(tmp_path / "x", classes=classes)
