"""Pictures of what a network holds and of what a detector finds: what they show, where, in which colour."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from detr_backbone import nested_tensor_from_tensor_list
from detr_backbone.visualize import (
    COLORS,
    draw_attention,
    draw_detections,
    draw_feature_maps,
    draw_levels,
    draw_sampling_points,
)

LOW, HIGH = ([round(255 * part) for part in colormaps["viridis"](share)[:3]] for share in (0.0, 1.0))
BLACK = Image.new("RGB", (40, 40))
BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2]])


def draw(picture: Image.Image, boxes: list[list[float]], label: int = 0) -> np.ndarray:
    count = len(boxes)
    tensor = torch.tensor(boxes).reshape(-1, 4)
    return np.asarray(draw_detections(picture, tensor, ["cell"] * count, [0.9] * count, [label] * count))


def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_label() -> None:
    drawn = draw(Image.new("RGB", (500, 450)), [[100, 200, 300, 400]], label=2)
    color = tuple(int(COLORS[2][place : place + 2], 16) for place in (1, 3, 5))

    assert tuple(drawn[300, 100]) == tuple(drawn[400, 200]) == color
    assert not drawn[300, 150].any()


def test_a_small_picture_is_enlarged_with_its_boxes() -> None:
    drawn = draw(Image.new("RGB", (100, 120)), [[10, 60, 50, 100]])

    assert drawn.shape == (480, 400, 3)
    assert drawn[320, 40].any()


def test_a_picture_without_detections_stays_as_it_is() -> None:
    picture = Image.effect_noise((640, 480), 50).convert("RGB")

    assert np.array_equal(draw(picture, []), np.asarray(picture))


def only_panel(picture: Image.Image, height: int = 826) -> np.ndarray:
    """What the only panel of a picture shows: 12 pixels inside of 850, above the lower edge."""
    assert picture.width == 850
    drawn = np.asarray(picture).astype(int)
    return drawn[-12 - height : -12, 12:-12]


def share_of(drawn: np.ndarray, color: list[int] | int) -> float:
    return (np.abs(drawn - np.asarray(color)).max(axis=-1) <= 3).mean()


def test_the_channel_that_varies_most_is_shown_where_its_values_are() -> None:
    features = torch.zeros(3, 4, 4)
    features[0, 0] = 1.0
    features[1, :, 3] = 5.0
    panel = only_panel(draw_feature_maps(features, title="layer", count=1, columns=1))

    assert share_of(panel[:, :600], LOW) > 0.99
    assert share_of(panel[:, 630:], HIGH) > 0.99


def test_a_channel_that_is_not_finite_comes_first_with_its_cells_in_magenta() -> None:
    features = torch.zeros(3, 4, 4)
    features[0, 0] = 1.0
    features[2, :2, :2] = torch.tensor([[torch.nan, torch.inf], [-torch.inf, torch.nan]])
    panel = only_panel(draw_feature_maps(features, title="layer", count=1, columns=1))

    assert share_of(panel[:410, :410], [255, 0, 255]) > 0.99
    assert share_of(panel[420:, 420:], [255, 0, 255]) == 0


@pytest.mark.parametrize("features", [torch.zeros(2, 3, 5), torch.full((2, 1, 40), torch.nan), torch.ones(1, 1, 1)])
def test_maps_without_a_range_can_be_drawn(features: torch.Tensor) -> None:
    assert draw_feature_maps(features, title="layer " * 40, picture=BLACK).width == 850


def test_padding_is_dark_in_the_mask_of_its_image() -> None:
    images = nested_tensor_from_tensor_list([torch.rand(3, 64, 64), torch.rand(3, 32, 32)])
    level = nested_tensor_from_tensor_list([torch.rand(2, 8, 8), torch.rand(2, 4, 4)])
    drawn = np.asarray(draw_levels(images, [level], [torch.rand(2, 4, 8, 8)], strides=[8])).astype(int)
    columns = [drawn[:, 12 + round(number * 167.6) :][:, :155] for number in range(5)]

    dark = [48, 48, 48]  # 0 in greys from -0.3 to 1.3
    assert share_of(columns[1], dark) * columns[1].size / 3 == pytest.approx(0.75 * 155.6**2, rel=0.02)
    assert all(share_of(column, dark) < 0.01 for column in columns[2:])  # letters have such pixels too


def test_attention_is_brightest_where_its_weight_is() -> None:
    look = torch.zeros(1, 4, 4)
    look[0, 0, 3] = 0.4
    panel = only_panel(draw_attention(BLACK, look, boxes=BOX, captions=["query"], title="layer", columns=1))

    assert share_of(panel[:200, 630:], [round(0.65 * part) for part in HIGH]) > 0.99
    assert share_of(panel[:200, :600], 0) > 0.99
    assert share_of(panel[300:500, 320:340], [86, 180, 233]) > 0.03  # left side of the box


def test_a_point_is_drawn_where_it_is_sampled_and_brighter_with_its_weight() -> None:
    locations = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).reshape(1, 1, 1, 2, 2)
    weights = torch.tensor([0.75, 0.25]).reshape(1, 1, 1, 2)
    points = draw_sampling_points(
        BLACK, locations, weights, BOX, boxes=BOX, captions=["query"], strides=[8], title="layer", columns=1
    )
    panel = only_panel(points)

    third = [round(255 * part) for part in colormaps["viridis"](1 / 3)[:3]]
    assert share_of(panel[618:621, 205:208], HIGH) == 1
    assert share_of(panel[205:208, 618:621], third) == 1
    assert share_of(panel[205:208, 205:208], 0) == 1
