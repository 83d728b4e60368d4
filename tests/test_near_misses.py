"""File names that nearly match: the error names the change, and a corrected copy is written on request only."""

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.near_misses import near_misses, rename_files
from detr_backbone.errors import DataError
from tests.processes import Command

CASES = {
    "backslash": ("a\\1.jpg", "a/1.jpg", "slashes for backslashes"),
    "escape": ("my%20cat.jpg", "my cat.jpg", "%-escapes decoded"),
    "composed": (unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg"), "Unicode"),
    "decomposed": (unicodedata.normalize("NFD", "café.jpg"), unicodedata.normalize("NFC", "café.jpg"), "Unicode"),
    "upper case": ("1.JPG", "1.jpg", "the ending in another case"),
    "lower case": ("1.jpg", "1.JPG", "the ending in another case"),
    "folder too many": ("images/train/1.jpg", "1.jpg", "another folder"),
    "folder missing": ("1.jpg", "deep/er/1.jpg", "another folder"),
    "several": ("C:\\data\\my%20cat.JPG", "train/my cat.jpg", "several of these changes"),
}


def dataset(folder: Path, names: list[str], files: list[str]) -> Path:
    for file in files:
        path = folder / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path, format="JPEG")
    content = {
        "info": {"stays": True},
        "images": [{"id": i, "file_name": name, "width": 20, "height": 20} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }
    (folder / "x.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "x.json"


@pytest.mark.parametrize(("name", "file", "change"), CASES.values(), ids=CASES)
def test_the_error_says_which_change_would_find_how_many(tmp_path: Path, name: str, file: str, change: str) -> None:
    annotations = dataset(tmp_path, [name, "gone.jpg", "there.jpg"], [file, "there.jpg"])

    with pytest.raises(DataError, match=r"key=file_name") as error:
        CocoDetection(tmp_path / "images", annotations)

    assert "got 2 of 3 missing" in str(error.value)
    assert f"; 1 would be found with {change}" in str(error.value)


@pytest.mark.parametrize(("name", "file", "change"), CASES.values(), ids=CASES)
def test_a_corrected_copy_finds_the_file_and_the_original_stays(
    tmp_path: Path, name: str, file: str, change: str
) -> None:
    annotations = dataset(tmp_path, [name, "there.jpg"], [file, "there.jpg"])
    before = annotations.read_text(encoding="utf-8")

    renamed = rename_files(annotations, tmp_path / "images", tmp_path / "y.json")

    assert renamed == {name: file}
    assert annotations.read_text(encoding="utf-8") == before
    assert json.loads((tmp_path / "y.json").read_text(encoding="utf-8")) == {
        **(content := json.loads(before)),
        "images": [{**content["images"][0], "file_name": file}, content["images"][1]],
    }
    assert len(CocoDetection(tmp_path / "images", tmp_path / "y.json")) == 2


def test_a_name_that_could_be_several_files_is_left(tmp_path: Path) -> None:
    dataset(tmp_path, ["1.jpg"], ["a/1.jpg", "b/1.jpg"])

    assert near_misses(tmp_path / "images", ["1.jpg"]) == {}


def test_without_near_misses_or_over_another_file_nothing_is_written(tmp_path: Path) -> None:
    annotations = dataset(tmp_path, ["1.jpg"], ["2.jpg"])

    with pytest.raises(DataError, match=r"no file name nearly matches .* got 1 missing"):
        rename_files(annotations, tmp_path / "images", tmp_path / "y.json")
    with pytest.raises(DataError, match="output exists"):
        rename_files(annotations, tmp_path / "images", annotations)
    assert not (tmp_path / "y.json").exists()


def test_the_command_renames_and_checks_the_copy(script: Command, tmp_path: Path) -> None:
    dataset(tmp_path, ["a\\1.jpg", "a\\2.jpg"], ["a/1.jpg", "a/2.jpg"])
    words = ("check_data.py", "--images", "images", "--annotations", "x.json")

    refused, renamed = script(tmp_path, *words), script(tmp_path, *words, "--rename", "y.json")

    assert (refused.returncode, renamed.returncode) == (2, 0), renamed.stdout + renamed.stderr
    assert refused.stdout.count("2 would be found with slashes for backslashes") == 1  # one fault is told once
    assert "2 file names corrected, such as 'a\\\\1.jpg' to 'a/1.jpg': y.json" in renamed.stdout
    assert "2 images, 1 annotations, 1 categories in y.json" in renamed.stdout
