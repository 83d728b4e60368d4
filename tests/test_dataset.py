"""COCO images and their boxes as samples for a detector."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from detr_backbone.coco.dataset import CocoDetection, collate
from detr_backbone.errors import AnnotationError, DataError

BOX = {"id": 1, "image_id": 4, "category_id": 3, "bbox": [5, 1, 4, 6]}


def write(folder: Path, *annotations: dict[str, Any], **image: Any) -> tuple[Path, Path]:
    """Two images of 10 x 20 (h, w), the second one with the given annotations; its entry changed by `image`."""
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "red").save(folder / "images" / name)
    content = {
        "images": [
            {"id": 4, "file_name": "b.png", "width": 20, "height": 10} | image,
            {"id": 2, "file_name": "a.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 79, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": annotations,
    }
    (folder / "x.json").write_text(json.dumps(content))
    return folder / "images", folder / "x.json"


def test_a_sample_holds_the_picture_and_its_boxes_in_pixels(tmp_path: Path) -> None:
    image, target = CocoDetection(*write(tmp_path, BOX, BOX | {"id": 2, "category_id": 79}))[1]

    assert isinstance(image, tv_tensors.Image)
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [255, 0, 0]
    assert target["boxes"].tolist() == [[5, 1, 9, 7], [5, 1, 9, 7]]
    assert target["labels"].tolist() == [0, 1]
    assert (target["image_id"], target["orig_size"], target["size"]) == (4, (10, 20), (10, 20))


def test_each_image_has_its_own_boxes(tmp_path: Path) -> None:
    first, second = CocoDetection(*write(tmp_path, BOX, BOX | {"id": 2, "image_id": 2, "bbox": [0, 0, 1, 1]}))

    assert first[1]["boxes"].tolist() == [[0, 0, 1, 1]]
    assert second[1]["boxes"].tolist() == [[5, 1, 9, 7]]


def test_an_image_without_annotations_has_no_boxes(tmp_path: Path) -> None:
    _, target = CocoDetection(*write(tmp_path, BOX))[0]

    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64


def test_the_dataset_knows_its_images_and_categories(tmp_path: Path) -> None:
    dataset = CocoDetection(*write(tmp_path, BOX))

    assert len(dataset) == 2
    assert dataset.image_ids == (2, 4)
    assert dataset.category_ids == (3, 79)
    assert dataset.category_names == ("dog", "cat")
    assert dataset.num_classes == 2


def test_crowds_are_left_out(tmp_path: Path) -> None:
    dataset = CocoDetection(*write(tmp_path, BOX | {"iscrowd": 1}, BOX | {"id": 2}))

    assert len(dataset[1][1]["labels"]) == 1
    assert dataset.dropped_boxes == 0


def test_a_box_without_area_is_left_out_and_counted(tmp_path: Path) -> None:
    dataset = CocoDetection(*write(tmp_path, BOX | {"bbox": [5, 1, 4, 0]}, BOX | {"id": 2}))

    assert dataset.dropped_boxes == 1
    assert dataset[1][1]["boxes"].tolist() == [[5, 1, 9, 7]]


@pytest.mark.parametrize(
    ("bbox", "expected", "clipped"),
    [
        ([-3, -1, 5, 4], [0, 0, 2, 3], 1),
        ([15, 5, 50, 50], [15, 5, 20, 10], 1),
        ([0, 0, 20.001, 10], [0, 0, 20, 10], 0),
        ([0, 0, 20, 10], [0, 0, 20, 10], 0),
    ],
)
def test_a_box_that_reaches_outside_is_clipped_and_counted(
    tmp_path: Path, bbox: list[float], expected: list[float], clipped: int
) -> None:
    dataset = CocoDetection(*write(tmp_path, BOX | {"bbox": bbox}))

    assert dataset[1][1]["boxes"].tolist() == [expected]
    assert dataset.clipped_boxes == clipped


def test_a_box_outside_its_image_is_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path, BOX | {"bbox": [20, 0, 3, 3]})

    with pytest.raises(AnnotationError, match=r"image_id=4 ann_id=1 key=bbox \| got \[20.0, 0.0, 3.0, 3.0\]"):
        CocoDetection(*paths)


@pytest.mark.parametrize("name", ["../x.json", "/etc/hostname", "sub/../../x.json", "link.png"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    paths = write(tmp_path, file_name=name)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "x.json")

    with pytest.raises(AnnotationError, match="image_id=4 key=file_name"):
        CocoDetection(*paths)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    paths = write(tmp_path, file_name="link.png")
    (tmp_path / "images" / "link.png").symlink_to("b.png")

    assert CocoDetection(*paths)[1][0].shape == (3, 10, 20)


@pytest.mark.parametrize("name", ["c.png", "."])
def test_missing_files_are_found_when_the_dataset_is_opened(tmp_path: Path, name: str) -> None:
    paths = write(tmp_path, file_name=name)

    with pytest.raises(DataError, match=r"key=file_name folder=.*images \| got 1 of 2 missing, first \["):
        CocoDetection(*paths)


@pytest.mark.parametrize("name", ["ü.png", "new\nline.png", "\udcff.png"])
def test_odd_file_names_are_read(tmp_path: Path, name: str) -> None:
    paths = write(tmp_path, file_name=name)
    (tmp_path / "images" / "b.png").rename(tmp_path / "images" / name)

    assert CocoDetection(*paths)[1][0].shape == (3, 10, 20)


def test_a_dataset_without_images_is_an_error(tmp_path: Path) -> None:
    images, annotations = write(tmp_path)
    annotations.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')

    with pytest.raises(DataError, match=r"no images \| where: file=.*x\.json key=images"):
        CocoDetection(images, annotations)


def test_a_stated_size_that_is_not_the_pictures_is_an_error(tmp_path: Path) -> None:
    dataset = CocoDetection(*write(tmp_path, width=30))

    with pytest.raises(AnnotationError, match=r"b\.png image_id=4 .*got \(10, 30\) expected \(10, 20\)"):
        dataset[1]


def test_an_error_crosses_from_a_worker_with_its_message(tmp_path: Path) -> None:
    images, annotations = write(tmp_path)
    loader = DataLoader(CocoDetection(images, annotations), num_workers=1, batch_size=None)
    (images / "a.png").write_bytes(b"")

    with pytest.raises(DataError, match=r"a\.png image_id=2"):
        next(iter(loader))


def test_transforms_get_image_and_target(tmp_path: Path) -> None:
    paths = write(tmp_path, BOX)
    dataset = CocoDetection(*paths, transforms=lambda image, target: (image.float() / 255, {**target, "size": (1, 1)}))

    image, target = dataset[1]

    assert image.max() == 1
    assert target["size"] == (1, 1)


def test_collate_pads_images_and_keeps_targets_in_order(tmp_path: Path) -> None:
    dataset = CocoDetection(*write(tmp_path, BOX), transforms=lambda image, target: (image.float(), target))

    batch, targets = collate([dataset[1], dataset[0]])

    assert batch.sizes == ((10, 20), (10, 20))
    assert [target["image_id"] for target in targets] == [4, 2]
