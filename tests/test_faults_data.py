"""Every kind of fault of a dataset is found and counted by the sweep, and loading refuses what the sweep refuses."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_backbone.coco.check import check_split, compare_splits
from detr_backbone.coco.check_report import DataReport
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.findings import KINDS, DataPolicies
from detr_backbone.coco.images import MAX_PIXELS
from detr_backbone.errors import DetrBackboneError

Change = Callable[[dict[str, Any], Path], Any]
OUTLINE = [2, 2, 12, 2, 12, 8]


def write(folder: Path, change: Change) -> tuple[Path, Path]:
    """Two noisy pictures of 20 x 16 pixels with one annotation each, and what `change` makes of them."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(images / name)
    annotation = {"category_id": 3, "bbox": [2, 2, 10, 6], "segmentation": [OUTLINE]}
    content = {
        "images": [
            {"id": 4, "file_name": "a.png", "width": 20, "height": 16},
            {"id": 9, "file_name": "b.png", "width": 20, "height": 16},
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 11, "image_id": 4, **annotation},
            {"id": 12, "image_id": 9, **annotation, "category_id": 4},
        ],
    }
    replaced = change(content, images)
    text = replaced if isinstance(replaced, str) else json.dumps(content)
    (folder / "x.json").write_text(text)
    return images, folder / "x.json"


def put(table: str, **values: Any) -> Change:
    """Other values in the second entry of a list."""
    return lambda content, _: content[table][1].update(values)


def take(table: str, key: str) -> Change:
    """The second entry of a list without a key."""

    def change(content: dict[str, Any], _: Path) -> None:
        del content[table][1][key]

    return change


def picture(picture: Image.Image, name: str = "b.png", **options: Any) -> Change:
    """Another picture in the second file, whose stated size follows it."""

    def change(content: dict[str, Any], images: Path) -> None:
        content["images"][1].update(file_name=name, width=picture.width, height=picture.height)
        content["annotations"][1].update(bbox=[0, 0, 1, 1], segmentation=[[0, 0, 1, 0, 1, 1]])
        picture.save(images / name, **options)

    return change


def damaged(change: Callable[[bytes], bytes]) -> Change:
    return lambda _, images: (images / "b.png").write_bytes(change((images / "b.png").read_bytes()))


def bomb(_: dict[str, Any], images: Path) -> None:
    """A header that promises 9,500 x 9,500 pixels."""
    data = bytearray((images / "b.png").read_bytes())
    data[16:24] = struct.pack(">II", 9_500, 9_500)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (images / "b.png").write_bytes(data)


def link(target: str) -> Change:
    def change(content: dict[str, Any], images: Path) -> None:
        (images / "link.png").symlink_to(target)
        content["images"][1]["file_name"] = "link.png"

    return change


def renamed(name: str) -> Change:
    def change(content: dict[str, Any], images: Path) -> None:
        (images / "b.png").rename(images / name)
        content["images"][1]["file_name"] = name

    return change


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def moved_often(content: dict[str, Any], _: Path) -> None:
    content["annotations"][1].update(bbox=[10, 2, 20, 6])


BIG = Image.effect_noise((32, 24), 50)
# The number in the matrix of faults is the first word of each name.
FAULTS: dict[str, tuple[str, int, str, Change]] = {
    "1 gaps between category ids": ("category_gaps", 1, "2 ids from 3 to 79", lambda c, _: [
        c["categories"][1].update(id=79), c["annotations"][1].update(category_id=79)]),
    "2 label without a category": ("unknown_category", 1, "ann_id=12 key=category_id | got 2 expected", put(
        "annotations", category_id=2)),
    "7 picture cut in half": ("picture_unreadable", 1, "b.png image_id=9 | got", damaged(lambda b: b[: len(b) // 2])),
    "7 picture without its end": ("picture_unreadable", 1, "b.png image_id=9", damaged(lambda b: b[:-60])),
    "7 web page as a picture": ("picture_unreadable", 1, "got no picture in one of", damaged(lambda _: b"<html>")),
    "7 empty file": ("picture_unreadable", 1, "got no picture in one of", damaged(lambda _: b"")),
    "8 rotated, annotated upright": ("picture_rotated", 1, "orientation 6, left as it is stored", picture(
        BIG, "c.jpg", exif=rotated())),
    "9 annotation id twice": ("duplicate_annotation", 1, "ann_id=11", put("annotations", id=11)),
    "12 box with a negative side": ("box_negative", 1, "ann_id=12 key=bbox | got [2, 2, -5, 3]", put(
        "annotations", bbox=[2, 2, -5, 3])),
    "12 box without area": ("box_without_area", 1, "image_id=9 ann_id=12 key=bbox", put(
        "annotations", bbox=[2, 2, 0, 3])),
    "12 box outside": ("box_outside", 1, "within 20 x 16", put("annotations", bbox=[20, 2, 5, 5])),
    "34 decompression bomb": ("picture_too_large", 1, f"expected at most {MAX_PIXELS}", bomb),
    "35 file missing": ("file_missing", 1, "got 1 of 2 missing, first ['b.png']", lambda _, i: (i / "b.png").unlink()),
    "36 stated size is another": ("picture_size", 1, "got (16, 30) expected (16, 20)", put("images", width=30)),
    "37 sixteen bits": ("picture_16_bit", 1, "got I;16", picture(
        Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 85))),
    "38 transparency": ("picture_alpha", 1, "got RGBA", picture(BIG.convert("RGBA"))),
    "38 transparency in a palette": ("picture_alpha", 1, "got P", picture(BIG.convert("P"), transparency=0)),
    "38 animation": ("picture_animated", 1, "got 2 frames", picture(
        BIG.convert("RGB"), save_all=True, append_images=[BIG.convert("RGB").rotate(90)])),
    "39 grey": ("picture_mode", 1, "got L", picture(BIG)),
    "39 CMYK": ("picture_mode", 1, "got CMYK", picture(BIG.convert("CMYK"), "c.jpg")),
    "40 one pixel high": ("picture_shape", 1, "got 500 x 1", picture(BIG.resize((500, 1)).convert("RGB"))),
    "41 area is no number": ("area_malformed", 1, "ann_id=12 key=area | got 'x'", put("annotations", area="x")),
    "42 iscrowd is no flag": ("crowd_malformed", 1, "ann_id=12 key=iscrowd | got 2", put("annotations", iscrowd=2)),
    "43 image id twice": ("duplicate_image", 1, "image_id=4 | got 'a.png' and 'b.png'", put("images", id=4)),
    "44 file twice": ("duplicate_file", 1, "'./a.png' again after image_id=4", put("images", file_name="./a.png")),
    "44 bytes twice": ("duplicate_picture", 1, "b.png image_id=9 | got the bytes of", lambda _, images: (
        images / "b.png").write_bytes((images / "a.png").read_bytes())),
    "45 unknown image": ("unknown_image", 1, "got 99 expected one of 2 ids", put("annotations", image_id=99)),
    "47 image id of another type": ("reference_malformed", 1, "key=image_id | got '9'", put(
        "annotations", image_id="9")),
    "48 image id in letters": ("id_malformed", 1, "key=images.id index=1 | got 'abc'", put("images", id="abc")),
    "49 no images": ("no_images", 1, "key=images | got []", lambda c, _: c.update(images=[], annotations=[])),
    "50 file cut off": ("file_unreadable", 1, "line=1 column=", lambda c, _: json.dumps(c)[:50]),
    "51 key missing": ("structure", 1, "key=annotations |", lambda c, _: c.pop("annotations") and None),
    "52 NaN": ("file_unreadable", 1, "NaN is not a number", lambda c, _: json.dumps(
        c).replace("[2, 2, 10", "[NaN, 2, 10")),
    "52 infinity by overflow": ("box_malformed", 2, "ann_id=11 key=bbox | got [inf, 2, 10, 6]", lambda c, _: json.dumps(
        c).replace("[2, 2, 10", "[1e400, 2, 10")),
    "53 three numbers": ("box_malformed", 1, "ann_id=12 key=bbox | got [1, 2, 3]", put("annotations", bbox=[1, 2, 3])),
    "54 box partly outside": ("box_partly_outside", 1, "within 20 x 16", put("annotations", bbox=[11, 2, 10, 5])),
    "54 boxes far outside": ("boxes_moved", 1, "got [10.0, 2.0, 20.0, 6.0]", moved_often),
    "55 only crowds": ("image_crowd_only", 1, "image_id=9", put("annotations", iscrowd=1)),
    "56 polygon of two points": ("segmentation_malformed", 1, "got [[1, 2, 3, 4]]", put(
        "annotations", segmentation=[[1, 2, 3, 4]])),
    "56 polygon of 7 numbers": ("segmentation_malformed", 1, "ann_id=12", put("annotations", segmentation=[[1] * 7])),
    "56 empty polygon": ("segmentation_malformed", 1, "got [[]]", put("annotations", segmentation=[[]])),
    "57 no segmentation": ("segmentation_missing", 1, "ann_id=12 key=segmentation | got None", take(
        "annotations", "segmentation")),
    "58 mask of another size": ("segmentation_size", 1, "got [20, 20] expected [16, 20]", put(
        "annotations", segmentation={"size": [20, 20], "counts": [400]})),
    "60 more boxes than queries": ("more_boxes_than_queries", 1, "image_id=9 | got 2 boxes expected 1", lambda c, _: c[
        "annotations"].append(c["annotations"][1] | {"id": 13})),
    "87 name of another encoding": ("file_name_not_text", 1, r"'\udcff.png'", renamed("\udcff.png")),
    "88 folder as a name": ("file_missing", 1, "first ['.']", put("images", file_name=".")),
    "88 number as a name": ("file_name_malformed", 1, "key=file_name | got 5", put("images", file_name=5)),
    "88 empty name": ("file_name_malformed", 1, "key=file_name | got ''", put("images", file_name="")),
    "95 name with ..": ("path_outside", 1, "image_id=9 key=file_name | got '../x.json'", put(
        "images", file_name="../x.json")),
    "95 absolute name": ("path_outside", 1, "got '/etc/hostname'", put("images", file_name="/etc/hostname")),
    "95 absolute name within": ("path_outside", 1, "image_id=9", lambda c, i: c["images"][1].update(
        file_name=str(i / "b.png"))),
    "95 link that leads out": ("path_outside", 1, "got 'link.png'", link("../x.json")),
    "97 vertex far away": ("segmentation_far", 1, "got coordinates from 1 to 1e+09 expected -40 to 60", put(
        "annotations", segmentation=[[1, 1, 1e9, 1, 5, 5]])),
    "97 outline without end": ("segmentation_far", 1, "got 1.6e+06 pixels along its polygons", put(
        "annotations", segmentation=[[-30, 1, 50, 1] * 10_000])),
    "98 runs that do not fill": ("segmentation_counts", 1, "got runs of 3 pixels together expected 320", put(
        "annotations", segmentation={"size": [16, 20], "counts": [0, 3]})),
    "98 empty runs": ("segmentation_malformed", 1, "ann_id=12", put(
        "annotations", segmentation={"size": [16, 20], "counts": ""})),
    "99 giant mask": ("segmentation_size", 1, "got [200000, 200000]", put(
        "annotations", segmentation={"size": [200_000, 200_000], "counts": [1]})),
    "100 nesting without end": ("file_unreadable", 1, "file is not usable JSON", lambda _c, _i: "[" * 100_000),
    "- no width": ("image_size_malformed", 1, "image_id=9 key=width | got None", take("images", "width")),
    "- category id twice": ("duplicate_category", 1, "category_id=3 | got 'dog' and 'cat'", lambda c, _: [
        c["categories"][1].update(id=3), c["annotations"][1].update(category_id=3)]),
    "- category without name": ("category_name_malformed", 1, "category_id=4 key=name", take("categories", "name")),
    "- categories of one name": ("duplicate_category_name", 1, "category_id=4 | got 'dog'", put(
        "categories", name="dog")),
    "- class without boxes": ("category_unused", 1, "category_id=5 | got 'cow'", lambda c, _: c["categories"].append(
        {"id": 5, "name": "cow"})),
    "- image without boxes": ("image_without_boxes", 1, "image_id=9", lambda c, _: c["annotations"].pop()),
    "- area of 0": ("area_mismatch", 1, "ann_id=12 key=area | got 0 expected 0.6 to 96", put("annotations", area=0)),
    "- area of 1 for all": ("area_mismatch", 2, "got 1 expected 2 to 264 for its box", lambda c, _: [
        one.update(area=1.0, bbox=[0, 0, 20, 10]) for one in c["annotations"]]),
    "- area of another scale": ("area_mismatch", 1, "got 1e+11 expected", put("annotations", area=1e11)),
    "- ignore flag": ("ignore_flag", 1, "ann_id=12 key=ignore | got 1", put("annotations", ignore=1)),
    "- box under two ids": ("duplicate_box", 1, "ann_id=13 | got the box of ann_id=12", lambda c, _: c[
        "annotations"].append(c["annotations"][1] | {"id": 13})),
    "- federated annotations": ("federated", 1, "image_id=9 | got the keys ['neg_category_ids', 'not_exhaus", put(
        "images", neg_category_ids=[4], not_exhaustive_category_ids=[])),
    "- class named by a number": ("category_named_by_number", 1, "category_id=4 | got '3'", put(
        "categories", name="3")),
    "- files that are not listed": ("image_not_listed", 2, "folder=", lambda _, i: [
        (i / name).write_bytes((i / "a.png").read_bytes()) for name in ("d.png", "e.jpeg", "._a.png", "notes.txt")]),
}  # fmt: skip
# One fault in a file, and all that may be said about it; the second entry of each list is damaged.
TOLD_ONCE: dict[str, tuple[set[str], Change]] = {
    "ids of images as floats": ({"id_malformed"}, lambda c, _: [
        *(one.update(id=float(one["id"])) for one in c["images"]),
        *(one.update(image_id=float(one["image_id"])) for one in c["annotations"])]),
    "ids of images as text": ({"id_malformed"}, lambda c, _: [
        *(one.update(id=str(one["id"])) for one in c["images"]),
        *(one.update(image_id=str(one["image_id"])) for one in c["annotations"])]),
    "ids of images in letters": ({"id_malformed", "unknown_image", "image_not_listed"}, lambda c, _: [
        one.update(id=f"i{one['id']}") for one in c["images"]]),
    "ids of categories as floats": ({"id_malformed"}, lambda c, _: [
        *(one.update(id=float(one["id"])) for one in c["categories"]),
        *(one.update(category_id=float(one["category_id"])) for one in c["annotations"])]),
    "no file names": ({"file_name_malformed", "image_not_listed"}, lambda c, _: [
        one.pop("file_name") for one in c["images"]]),
    "category ids that start at 0": ({"unknown_category"}, lambda c, _: [
        one.update(category_id=one["category_id"] - 3) for one in c["annotations"]]),
    "no category has an annotation": ({"reference_malformed"}, lambda c, _: [
        one.pop("category_id") for one in c["annotations"]]),
    "endings in another case": ({"file_missing"}, lambda c, _: [
        one.update(file_name=one["file_name"].upper().replace("A.", "a.").replace("B.", "b.")) for one in c["images"]]),
    "boxes outside": ({"box_outside"}, lambda c, _: [one.update(bbox=[30, 30, 5, 5]) for one in c["annotations"]]),
    "malformed boxes": ({"box_malformed"}, lambda c, _: [one.update(bbox=[1, 2]) for one in c["annotations"]]),
    "an annotation twice": ({"duplicate_annotation"}, lambda c, _: c["annotations"].append(c["annotations"][1])),
}  # fmt: skip
BETWEEN_SPLITS = {"shared_picture", "category_mismatch"}


@pytest.mark.parametrize(("kind", "count", "detail", "change"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_and_counted_and_training_refuses_what_the_sweep_does(
    tmp_path: Path, kind: str, count: int, detail: str, change: Change
) -> None:
    images, annotations = write(tmp_path, change)
    checked = check_split(images, annotations, num_queries=1)
    report = DataReport(splits=[checked], policies=DataPolicies(), segmentations=False)

    (one,) = (one for one in checked.findings if one.kind == kind)
    assert one.count == count
    assert detail in one.examples[0].detail
    if report.count("error"):
        with pytest.raises(DetrBackboneError):
            list(CocoDetection(images, annotations))
    else:
        assert len(list(CocoDetection(images, annotations))) == 2


@pytest.mark.parametrize(("kinds", "change"), TOLD_ONCE.values(), ids=TOLD_ONCE)
def test_one_fault_is_told_once(tmp_path: Path, kinds: set[str], change: Change) -> None:
    checked = check_split(*write(tmp_path, change), decode=False)

    assert {one.kind for one in checked.findings} == kinds
    assert all(one.count > 0 for one in checked.findings)


def test_what_another_split_lists_in_the_same_folder_is_no_finding(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, lambda c, i: (i / "c.png").write_bytes((i / "a.png").read_bytes()))
    content = json.loads(annotations.read_text())
    for name, chosen in (("train.json", 0), ("val.json", 1)):
        part = content | {"images": [content["images"][chosen]], "annotations": [content["annotations"][chosen]]}
        (tmp_path / name).write_text(json.dumps(part))
    splits = [check_split(images, tmp_path / name, decode=False) for name in ("train.json", "val.json")]

    counts = [
        {one.kind: one.count for one in split.findings}.get("image_not_listed")
        for split in (*splits, *compare_splits(*splits))
    ]

    assert counts == [2, 2, 1, 1]


def test_every_kind_of_fault_is_in_the_table() -> None:
    assert {kind for kind, *_ in FAULTS.values()} | BETWEEN_SPLITS == set(KINDS)


def test_a_dataset_without_faults_has_no_findings(tmp_path: Path) -> None:
    assert check_split(*write(tmp_path, lambda *_: None), num_queries=1).findings == []


def test_a_picture_and_categories_that_splits_do_not_share_rightly_are_found(tmp_path: Path) -> None:
    train = check_split(*write(tmp_path / "train", lambda *_: None))
    same = (tmp_path / "train" / "images" / "a.png").read_bytes()
    another = write(tmp_path / "val", put("categories", name="wolf"))
    (another[0] / "b.png").write_bytes(same)
    val = check_split(*another)

    found = {one.kind: one.examples[0].detail for one in compare_splits(train, val)[1].findings}

    assert set(found) == BETWEEN_SPLITS
    assert (
        f"file={tmp_path}/val/images/b.png | got the bytes of {tmp_path}/train/images/a.png" in found["shared_picture"]
    )
    assert "got {4: 'wolf'} of 2 expected {4: 'cat'} of 2" in found["category_mismatch"]
