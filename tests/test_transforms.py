"""From a picture and its boxes in pixels to what DETR trains on."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from detr_backbone.coco.dataset import Target
from detr_backbone.coco.transforms import (
    RandomCrop,
    ResizeShorterSide,
    TransformConfig,
    finish_target,
    make_transforms,
    resized_size,
)
from detr_backbone.errors import ConfigError

SIDES = st.integers(1, 5000)


def sample(height: int, width: int, boxes: list[list[float]]) -> tuple[tv_tensors.Image, Target]:
    """Noise with boxes xyxy, labelled 0, 1, 2, …"""
    target = Target(
        boxes=tv_tensors.BoundingBoxes(
            torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=(height, width), dtype=torch.float32
        ),
        labels=torch.arange(len(boxes)),
        image_id=7,
        orig_size=(height, width),
        size=(height, width),
    )
    return tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8)), target


def bright(image: Tensor) -> list[int]:
    """xyxy around the pixels above 0."""
    rows, columns = image.amax(dim=0).gt(0).nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((427, 640), (800, 1199)),
        ((500, 333), (1201, 800)),
        ((1000, 4000), (333, 1332)),
        ((1000, 1800), (741, 1333)),  # 1333 / 1.8 = 740.6 rounds up
        ((800, 800), (800, 800)),
        ((1, 1), (800, 800)),
        ((1, 5000), (1, 1333)),  # 0.27 rounds to no pixel at all
        ((5000, 1), (1333, 1)),
        ((2, 200), (13, 1300)),
    ],
)
def test_a_picture_gets_the_size_that_detr_gives_it(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 800, 1333) == expected


@given(height=SIDES, width=SIDES, shorter=st.integers(1, 1000))
def test_without_a_limit_the_shorter_side_is_as_asked(height: int, width: int, shorter: int) -> None:
    size = resized_size((height, width), shorter)

    assert min(size) == shorter
    assert 0 <= max(size) / shorter - max(height, width) / min(height, width) + 1 / shorter <= 1 / shorter + 1e-9


@given(height=SIDES, width=SIDES)
def test_the_longer_side_passes_its_limit_by_rounding_only(height: int, width: int) -> None:
    size = resized_size((height, width), 800, 1333)

    assert min(size) >= 1
    assert max(size) <= 1333 + 0.5 * max(height, width) / min(height, width)  # half a pixel of the shorter side
    assert (size[0] <= size[1]) == (height <= width) or size[0] == size[1]


def test_evaluation_resizes_normalises_and_keeps_boxes_in_place() -> None:
    image, target = sample(40, 80, [[8, 10, 40, 30]])
    image = tv_tensors.Image(torch.full_like(image, 255))
    config = TransformConfig(eval_size=60, mean=(0.5, 0.0, 1.0), std=(0.5, 0.25, 0.1))

    out, done = make_transforms(config, train=False)(image, target)

    assert out.shape == (3, 60, 120)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, 4.0, 0.0]))  # (1 - mean) / std
    torch.testing.assert_close(done["boxes"], torch.tensor([[0.3, 0.5, 0.4, 0.5]]))
    assert (done["orig_size"], done["size"], done["image_id"]) == ((40, 80), (60, 120), 7)
    assert type(out) is type(done["boxes"]) is Tensor


@pytest.mark.parametrize("train", [False, True])
def test_an_image_without_boxes_goes_through(train: bool) -> None:
    _, target = make_transforms(TransformConfig(), train=train)(*sample(40, 60, []))

    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].shape == (0,)


def test_a_resize_keeps_fractions_of_pixels() -> None:
    image, target = sample(10, 10, [[1, 1, 2, 2]])

    _, resized = ResizeShorterSide((15,))(image, target)

    assert resized["boxes"].tolist() == [[1.5, 1.5, 3.0, 3.0]]


@pytest.mark.parametrize("flip", ["horizontal_flip", "vertical_flip"])
def test_a_flip_moves_the_box_with_the_pixels(flip: str) -> None:
    image, target = sample(20, 40, [[4, 2, 14, 8]])
    image = tv_tensors.Image(torch.zeros_like(image))
    image[:, 2:8, 4:14] = 255
    only = {"horizontal_flip": 0.0, "crop": False, "scales": (20,), "mean": (0.0, 0.0, 0.0)} | {flip: 1.0}

    out, done = make_transforms(TransformConfig(**only), train=True)(image, target)  # type: ignore[arg-type]

    cx, cy, w, h = (done["boxes"][0] * torch.tensor([40, 20, 40, 20])).tolist()
    assert [round(v) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)] == bright(out)
    assert bright(out) != [4, 2, 14, 8]


def test_a_crop_moves_the_box_with_the_pixels_and_cuts_it() -> None:
    torch.manual_seed(0)
    cut = 0
    for _ in range(50):
        image, target = sample(60, 80, [[20, 15, 60, 45]])
        image = tv_tensors.Image(torch.zeros_like(image))
        image[:, 15:45, 20:60] = 255

        out, cropped = RandomCrop((20, 70))(image, target)

        assert 20 <= out.shape[-2] <= 60
        assert 20 <= out.shape[-1] <= 70
        if out.any():
            assert cropped["boxes"].tolist() == [bright(out)]
            cut += bright(out)[2:] == [out.shape[-1], out.shape[-2]]
    assert cut  # the draws of this seed include cut boxes


def test_a_crop_of_a_smaller_picture_takes_its_whole_side() -> None:
    out, _ = RandomCrop((50, 60))(*sample(30, 100, []))

    assert out.shape[-2] == 30
    assert 50 <= out.shape[-1] <= 60


def test_boxes_that_a_crop_emptied_go_with_their_labels() -> None:
    image, target = sample(10, 10, [[0, 0, 0, 5], [1, 1, 5, 5], [12, 0, 15, 4], [5, 5, 10, 10]])

    _, done = finish_target(image, target)

    assert done["labels"].tolist() == [1, 3]
    torch.testing.assert_close(done["boxes"], torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.75, 0.75, 0.5, 0.5]]))


def test_training_gives_boxes_within_the_image_and_one_of_the_scales() -> None:
    torch.manual_seed(0)
    transforms = make_transforms(TransformConfig(scales=(64, 96), max_size=150, color_jitter=0.4), train=True)
    seen = set()
    for _ in range(40):
        out, done = transforms(*sample(53, 71, [[0, 0, 71, 53], [10, 10, 30, 20]]))
        boxes = done["boxes"]
        assert done["size"] == tuple(out.shape[-2:])
        assert len(boxes) == len(done["labels"])
        assert ((boxes > 0) & (boxes <= 1)).all()
        seen.add(min(done["size"]))
    assert seen == {64, 96}


def test_the_seed_decides_every_draw() -> None:
    transforms = make_transforms(TransformConfig(scales=(64, 96), color_jitter=0.4), train=True)
    image, target = sample(53, 71, [[10, 10, 30, 20]])
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(transforms(image, target)[0])

    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scales", ()),
        ("scales", (0,)),
        ("max_size", 0),
        ("crop_scales", ()),
        ("crop_sides", (600, 384)),
        ("horizontal_flip", 1.5),
        ("vertical_flip", -0.5),
        ("color_jitter", 2.0),
        ("std", (1.0, 0.0, 1.0)),
        ("eval_size", 0),
    ],
)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be .* got"):
        TransformConfig(**{key: value})
