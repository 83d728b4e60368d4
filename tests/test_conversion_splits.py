"""Datasets that come in several folders or lists: every split has the same categories under the same ids."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detr_backbone.coco.conversion import convert_dataset
from detr_backbone.training import load_checkpoint
from tests.processes import Ended

Run = Callable[..., Ended]
VOC = """<annotation><filename>{name}</filename><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>{category}</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""
CVAT = """<annotations><version>1.1</version><meta><{of}><labels><label><name>dog</name></label><label><name>cat</name>
</label></labels></{of}></meta><image id="0" name="a.jpg" width="64" height="48">
<box label="cat" occluded="0" xtl="10" ytl="20" xbr="30" ybr="40"></box></image></annotations>"""


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((64, 48), 50).convert("RGB").save(path)


def roboflow_coco(folder: Path) -> Path:
    """Write an export of Roboflow: category 0 is the group of the others and has no objects; all ids start at 0."""
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
        {"id": number, "name": name, "supercategory": "pets"} for number, name in ((1, "cat"), (2, "dog"))
    ]
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        names = [f"{split}{number}_jpg.rf.0a1b2c3d.jpg" for number in range(count)]
        for name in names:
            draw(folder / split / name)
        content = {
            "info": {"year": "2026", "version": "1", "description": "Exported from roboflow.com"},
            "licenses": [{"id": 1, "url": "https://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}],
            "categories": categories,
            "images": [
                {"id": i, "license": 1, "file_name": name, "height": 48, "width": 64, "date_captured": "2026-01-01"}
                for i, name in enumerate(names)
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 1 + i % 2,
                    "bbox": [10, 20, 20, 20.5],
                    "area": 410,
                    "segmentation": [],
                    "iscrowd": 0,
                }
                for i in range(count)
            ],
        }
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def splits_of(folder: str, **annotations: str) -> list[str]:
    words: list[str] = []
    for key, split in (("train", "train"), ("val", "valid")):
        file = annotations.get(key, f"{folder}/{split}/_annotations.coco.json")
        words += [f"--data.{key}.images", f"{folder}/{split}", f"--data.{key}.annotations", file]
    return words


def test_a_coco_export_of_roboflow_becomes_an_ap_in_two_commands(command: Run, tiny_run: Path, tmp_path: Path) -> None:
    roboflow_coco(tmp_path / "mine")
    trained = command(tmp_path, "train", "--config", str(tiny_run / "tiny.yaml"), *splits_of("mine"))
    test = ("--images", "mine/test", "--annotations", "mine/test/_annotations.coco.json")
    evaluated = command(tmp_path, "evaluate", "--checkpoint", "run/checkpoint.pt", *test, "--output", "judged")

    assert (trained.code, evaluated.code) == (0, 0), trained.err + evaluated.err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").categories == {0: "pets", 1: "cat", 2: "dog"}
    results = json.loads((tmp_path / "judged" / "results.json").read_text(encoding="utf-8"))
    assert 0 <= results["stats"]["AP"] <= 1
    detections = json.loads((tmp_path / "judged" / "detections.json").read_text(encoding="utf-8"))
    assert {one["image_id"] for one in detections} == {0}


def test_the_group_of_a_coco_export_of_roboflow_takes_no_part_in_its_ap(command: Run, tmp_path: Path) -> None:
    folder = roboflow_coco(tmp_path / "mine") / "valid"
    truth = json.loads((folder / "_annotations.coco.json").read_text(encoding="utf-8"))["annotations"]
    found = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in truth]
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    options = ("--images", str(folder), "--annotations", str(folder / "_annotations.coco.json"))
    checked = command(tmp_path, "check-data", *options)
    evaluated = command(tmp_path, "evaluate", "--detections", "found.json", *options[2:], "--intervals", "0")

    assert checked.code == 0, checked.out
    assert "category_id=0 | got 'pets'" in checked.out  # has no boxes
    assert "image_not_listed" not in checked.out  # the JSON file among the images is none
    assert "AP        100.0" in evaluated.out  # the mean of the two classes that have objects


def test_all_splits_of_a_yolo_export_of_roboflow_are_converted(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        draw(tmp_path / split / "images" / f"{split}_jpg.rf.0a1b2c3d.jpg")
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / f"{split}_jpg.rf.0a1b2c3d.txt").write_text("1 0.5 0.5 0.25 0.25\n")
    (tmp_path / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n\n"
        "roboflow:\n  workspace: mine\n  project: pets\n  version: 1\n  license: CC BY 4.0\n"
    )
    manifests, contents = {}, {}
    for split in ("train", "val", "test"):
        manifests[split] = convert_dataset(tmp_path, tmp_path / f"{split}.json", "yolo", split=split)
        contents[split] = json.loads((tmp_path / f"{split}.json").read_text(encoding="utf-8"))

    assert [Path(one["images"]).parent.name for one in manifests.values()] == ["train", "valid", "test"]
    for content in contents.values():
        assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        assert [one["category_id"] for one in content["annotations"]] == [2]


def voc_folders(folder: Path, objects: Mapping[str, str]) -> Path:
    """Write an image with one object into a folder for each split, as Roboflow does."""
    for split, category in objects.items():
        draw(folder / split / f"{split}.jpg")
        (folder / split / f"{split}.xml").write_text(VOC.format(name=f"{split}.jpg", category=category))
    return folder


def categories_and_objects(folder: Path, layout: Any, split: str | None) -> tuple[dict[int, str], list[str]]:
    output = folder / f"{split}.json"
    convert_dataset(folder, output, layout, split=split)
    content = json.loads(output.read_text(encoding="utf-8"))
    names = {one["id"]: one["name"] for one in content["categories"]}
    return names, [names[one["category_id"]] for one in content["annotations"]]


def test_folders_of_voc_with_other_classes_get_the_same_categories(tmp_path: Path) -> None:
    voc_folders(tmp_path, {"train": "zebra", "valid": "cat", "test": "dog"})
    every = {1: "cat", 2: "dog", 3: "zebra"}

    for split, category in (("train", "zebra"), ("val", "cat"), ("test", "dog")):
        assert categories_and_objects(tmp_path, "voc", split) == (every, [category])


def test_lists_of_voc_with_other_classes_get_the_same_categories(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for split, category in (("train", "zebra"), ("val", "cat")):
        draw(tmp_path / "JPEGImages" / f"{split}.jpg")
        text = VOC.format(name=f"{split}.jpg", category=category)
        (tmp_path / "Annotations" / f"{split}.xml").write_text(text)
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{split}\n")

    assert categories_and_objects(tmp_path, "voc", "train") == ({1: "cat", 2: "zebra"}, ["zebra"])
    assert categories_and_objects(tmp_path, "voc", "val") == ({1: "cat", 2: "zebra"}, ["cat"])


def test_folders_that_were_converted_alone_and_differ_are_one_error(
    command: Run, tiny_run: Path, tmp_path: Path
) -> None:
    voc_folders(tmp_path / "mine", {"train": "zebra", "valid": "cat"})
    for split in ("train", "valid"):
        convert_dataset(tmp_path / "mine" / split, tmp_path / f"{split}.json", "voc")
    ended = command(
        tmp_path,
        "train",
        "--config",
        str(tiny_run / "tiny.yaml"),
        *splits_of("mine", train="train.json", val="valid.json"),
    )

    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "file=valid.json key=categories | got {1: 'cat'} of 1 expected {1: 'zebra'} of 1 | fix: " in ended.err


@pytest.mark.parametrize("of", ["task", "project", "job"])
def test_labels_of_cvat_that_have_no_object_are_categories_too(tmp_path: Path, of: str) -> None:
    draw(tmp_path / "images" / "a.jpg")
    (tmp_path / "annotations.xml").write_text(CVAT.format(of=of))

    assert categories_and_objects(tmp_path, "cvat", None) == ({1: "dog", 2: "cat"}, ["cat"])
