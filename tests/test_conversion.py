"""Datasets in other layouts become one COCO file: each written here after the description of its format."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detr_backbone.coco.conversion import convert_dataset
from detr_backbone.errors import AnnotationError, ConfigError, DataError, DetrBackboneError
from tests.processes import Command

XML = """<annotation><filename>{name}</filename><size><width>100</width><height>80</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>cat</name><difficult>{difficult}</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>"""
CVAT = """<annotations><version>1.1</version><meta><task><labels><label><name>cat</name></label><label><name>dog</name>
</label></labels></task></meta><image id="0" name="a.jpg" width="100" height="80">
<box label="cat" occluded="0" xtl="10" ytl="20" xbr="30" ybr="40" {more}></box></image>
<image id="1" name="b.jpg" width="100" height="80"></image></annotations>"""


def draw(path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((100, 80), 50).convert("RGB").save(path, **options)


def yolo(folder: Path, images: str, labels: str, config: str) -> None:
    """a.jpg with one cat as a box, b.jpg with the same as a polygon, c.jpg without a label file."""
    for name in ("a", "b", "c"):
        draw(folder / images / f"{name}.jpg")
    (folder / labels).mkdir(parents=True)
    (folder / labels / "a.txt").write_text("0 0.2 0.375 0.2 0.25\n")
    (folder / labels / "b.txt").write_text("0 0.1 0.25 0.3 0.25 0.3 0.5 0.1 0.5\n")
    (folder / "data.yaml").write_text(config)


def roboflow(folder: Path) -> None:
    yolo(
        folder, "train/images", "train/labels", "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"
    )


def ultralytics(folder: Path) -> None:
    yolo(folder, "images/train/x", "labels/train/x", "path: .\ntrain: images/train\nnames:\n  0: cat\n")


def voc(folder: Path) -> None:
    for name, objects in (("a", OBJECT), ("b", OBJECT), ("c", "")):
        draw(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        text = XML.format(name=f"{name}.jpg", objects=objects.format(difficult=0))
        (folder / "Annotations" / f"{name}.xml").write_text(text)


def roboflow_voc(folder: Path) -> None:
    for name, objects in (("a", OBJECT), ("b", OBJECT), ("c", "")):
        draw(folder / f"{name}.jpg")
        (folder / f"{name}.xml").write_text(XML.format(name=f"{name}.jpg", objects=objects.format(difficult=0)))


def cvat(folder: Path, more: str = "") -> None:
    for name in ("a", "b"):
        draw(folder / "images" / f"{name}.jpg")
    (folder / "annotations.xml").write_text(CVAT.format(more=more))


LAYOUTS = {"roboflow": roboflow, "ultralytics": ultralytics, "voc": voc, "roboflow voc": roboflow_voc, "cvat": cvat}
LAYOUT_OF = {name: "voc" if "voc" in name else "cvat" if name == "cvat" else "yolo" for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_becomes_an_ap_in_two_commands(script: Command, tmp_path: Path, name: str) -> None:
    LAYOUTS[name](tmp_path / "data")
    converted = script(
        tmp_path, "convert_data.py", "--layout", LAYOUT_OF[name], "--folder", "data", "--output", "x.json"
    )
    assert converted.returncode == 0, converted.stdout + converted.stderr
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 20, 20, 20], "score": 0.9}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    options = ("--detections", "found.json", "--annotations", "x.json", "--intervals", "0")
    evaluated = script(tmp_path, "evaluate.py", *options)

    # pixels 11 to 30 and 21 to 40, counted from 1, and the fractions of 100 x 80 pixels, are the same box
    assert content["annotations"][0]["bbox"] == pytest.approx([10, 20, 20, 20])
    assert {one["name"]: one["id"] for one in content["categories"]}["cat"] == 1
    assert "training takes this dataset" in converted.stdout
    assert "image_without_boxes" in converted.stdout  # the last image
    # one of the objects is found: of one, or of two, at precision 1
    assert ("AP        100.0" if name == "cvat" else "AP         50.5") in evaluated.stdout


def test_the_manifest_says_where_the_images_are_and_what_was_changed(tmp_path: Path) -> None:
    ultralytics(tmp_path / "data")

    manifest = convert_dataset(tmp_path / "data", tmp_path / "x.json", "yolo")

    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "x.manifest.json").read_text(encoding="utf-8")) == manifest
    assert [one["file_name"] for one in content["images"]] == ["x/a.jpg", "x/b.jpg", "x/c.jpg"]
    assert manifest["images"] == str(tmp_path / "data" / "images" / "train")
    assert manifest["counts"] == {"images": 3, "annotations": 2, "categories": 1}
    assert manifest["remarks"] == [
        "1 images without a label file, listed without boxes",
        "1 polygons, taken as the boxes around them",
    ]


def test_fractions_are_of_the_upright_image(tmp_path: Path) -> None:
    roboflow(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "train" / "images" / "a.jpg", exif=exif)

    convert_dataset(tmp_path, tmp_path / "x.json", "yolo")

    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (80, 100)
    assert content["annotations"][0]["bbox"] == pytest.approx([8, 25, 16, 25])


def test_objects_marked_difficult_are_crowds_and_said_so(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text(XML.format(name="a.jpg", objects=OBJECT.format(difficult=1)))

    manifest = convert_dataset(tmp_path, tmp_path / "x.json", "voc")

    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [one["iscrowd"] for one in content["annotations"]] == [1, 0]
    assert manifest["remarks"] == ["1 objects marked difficult, taken as crowds"]


def test_a_list_of_voc_is_a_split(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b  1\nc -1\n")

    manifest = convert_dataset(tmp_path, tmp_path / "x.json", "voc", split="val")

    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [one["file_name"] for one in content["images"]] == ["b.jpg", "c.jpg"]
    assert [one["image_id"] for one in content["annotations"]] == [content["images"][0]["id"]]
    assert manifest["source"]["split"] == "val"


def test_a_list_of_voc_may_come_from_windows_and_name_files_with_spaces(tmp_path: Path) -> None:
    voc(tmp_path)
    for folder, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (tmp_path / folder / f"a.{ending}").rename(tmp_path / folder / f"a 1 b.{ending}")
    xml = tmp_path / "Annotations" / "a 1 b.xml"
    xml.write_text(xml.read_text().replace("a.jpg", "a 1 b.jpg"))
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("\ufeffa 1 b\r\nc.jpg\r\n", encoding="utf-8")

    convert_dataset(tmp_path, tmp_path / "x.json", "voc", split="val")

    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [one["file_name"] for one in content["images"]] == ["a 1 b.jpg", "c.jpg"]


def test_a_listed_image_without_annotations_is_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b\nd\n")

    with pytest.raises(DataError, match=r"val\.txt line=2 \| got 'd'"):
        convert_dataset(tmp_path, tmp_path / "x.json", "voc", split="val")

    assert not (tmp_path / "x.json").exists()


def test_what_is_no_image_of_yolo_is_left_out_and_counted(tmp_path: Path) -> None:
    ultralytics(tmp_path)
    folder = tmp_path / "images" / "train" / "x"
    for name in ("._a.jpg", ".DS_Store", "raw.dng", "a.txt"):  # labels may lie beside their images
        (folder / name).touch()

    manifest = convert_dataset(tmp_path, tmp_path / "x.json", "yolo")

    assert manifest["counts"]["images"] == 3
    assert manifest["remarks"][2] == "1 files that are no images by their endings, left out"


def test_images_of_yolo_in_avif_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("PIL._avif")
    ultralytics(tmp_path)
    folder = tmp_path / "images" / "train" / "x"
    Image.open(folder / "a.jpg").save(folder / "a.avif")
    (folder / "a.jpg").unlink()

    manifest = convert_dataset(tmp_path, tmp_path / "x.json", "yolo")

    assert manifest["counts"] == {"images": 3, "annotations": 2, "categories": 1}


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
LAUGHS += "names: *a19"
REFUSED: dict[str, tuple[str, type[DetrBackboneError], str, Any]] = {
    "class beyond the names": (
        "yolo",
        AnnotationError,
        "labels/a.txt line=1 | got '7'",
        write("train/labels/a.txt", "7 0.5 0.5 0.1 0.1"),
    ),
    "half a polygon": ("yolo", AnnotationError, "a.txt line=2 |", write("train/labels/a.txt", "\n0 0.5 0.5 0.1")),
    "comma": ("yolo", AnnotationError, "a.txt line=1 |", write("train/labels/a.txt", "0 0,5 0.5 0.1 0.1")),
    "words": ("yolo", AnnotationError, "cat", write("train/labels/a.txt", "cat 0.5 0.5 0.1 0.1")),
    "names from 1": ("yolo", AnnotationError, "got [1, 2]", write("data.yaml", "names: {1: cat, 2: dog}")),
    "more classes than names": ("yolo", AnnotationError, "key=nc", write("data.yaml", "nc: 2\nnames: [cat]")),
    "no names": ("yolo", AnnotationError, "key=names", write("data.yaml", "train: train/images")),
    "no such split": ("yolo", DataError, "key=train", write("data.yaml", "names: [cat]")),
    "names that refer to themselves": ("yolo", AnnotationError, "key=names", write("data.yaml", "names: &a [*a]")),
    "names in letters": ("yolo", AnnotationError, "key=names", write("data.yaml", "train: train/images\nnames: cat")),
    "billion laughs": ("yolo", AnnotationError, "key=names", write("data.yaml", LAUGHS)),
    "no YAML": ("yolo", AnnotationError, "data.yaml", write("data.yaml", "names: [cat")),
    "several folders": ("yolo", DataError, "key=train", write("data.yaml", "train: [a, b]\nnames: [cat]")),
    "list of files": ("yolo", DataError, "file=", write("data.yaml", "train: data.yaml\nnames: [cat]")),
    "damaged image": ("yolo", DataError, "a.jpg", write("train/images/a.jpg", "<html>")),
    "XML cut off": ("voc", AnnotationError, "folder=", write("Annotations/a.xml", "<annotation><size>")),
    "rotated box": ("cvat", AnnotationError, "line=3", lambda folder: cvat(folder, 'rotation="30.0"')),
    "tracks": ("cvat", AnnotationError, "line=1", write("annotations.xml", '<annotations><track id="0">')),
    "no annotations": ("cvat", DataError, "annotations.xml", lambda folder: (folder / "annotations.xml").unlink()),
    "output exists": ("cvat", DataError, "file=", lambda folder: (folder / "x.json").write_text("")),
}


@pytest.mark.parametrize(("layout", "error", "where", "change"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_with_its_place(
    tmp_path: Path, layout: Any, error: type[DetrBackboneError], where: str, change: Any
) -> None:
    {"yolo": roboflow, "voc": voc, "cvat": cvat}[layout](tmp_path)
    change(tmp_path)

    with pytest.raises(error) as raised:
        convert_dataset(tmp_path, tmp_path / "x.json", layout)

    assert where in str(raised.value)
    assert not (tmp_path / "x.manifest.json").exists()


def test_a_split_is_refused_where_the_layout_has_none(tmp_path: Path) -> None:
    cvat(tmp_path)

    with pytest.raises(ConfigError, match=r"`split` .*got 'val'"):
        convert_dataset(tmp_path, tmp_path / "x.json", "cvat", split="val")
    voc(tmp_path)
    with pytest.raises(DataError, match=r"list .*val\.txt, nor a folder, of val"):
        convert_dataset(tmp_path, tmp_path / "x.json", "voc", split="val")


def test_a_box_that_is_not_rotated_is_converted(tmp_path: Path) -> None:
    cvat(tmp_path, 'rotation="0.00"')

    assert convert_dataset(tmp_path, tmp_path / "x.json", "cvat")["counts"]["annotations"] == 1
