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
from detr_backbone.visualize.features import principal_components
from detr_backbone.visualize.fonts import font_warning
from detr_backbone.visualize.panels import WIDTH, Panels

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


@pytest.mark.parametrize(("side", "line"), [(500, 3), (1000, 3), (4000, 12)])
def test_lines_grow_with_the_picture(side: int, line: int) -> None:
    drawn = draw(Image.new("RGB", (side, side)), [[side // 4, side // 4, side // 2, side // 2]], label=7)
    row = drawn[3 * side // 8, : side // 3]  # white where the left side of the box is

    assert (row == 255).all(axis=1).sum() == line


def test_names_grow_with_the_picture() -> None:
    heights = []
    for side in (1000, 4000):
        drawn = draw(Image.new("RGB", (side, side)), [[side // 4, side // 2, side // 2, side]], label=7)
        above = drawn[: side // 2 - side // 250]  # the ground of the name, and no line of the box
        heights.append((above == 255).all(axis=2).any(axis=1).sum())

    assert 14 < heights[0] < 20  # letters of 14 pixels with their descent
    assert heights[1] == pytest.approx(4 * heights[0], abs=4)  # each is rounded to whole pixels


def test_a_name_at_the_edge_stays_in_the_picture() -> None:
    widths = []
    for left in (500, 990):
        drawn = draw(Image.new("RGB", (1000, 1000)), [[left, 500, left + 10, 520]], label=7)
        widths.append((drawn[:496] == 255).all(axis=2).any(axis=0).sum())

    assert widths[0] == widths[1] > 50


def test_a_long_strip_is_not_enlarged_beyond_reason() -> None:
    assert draw_detections(Image.new("RGB", (3000, 2)), torch.zeros(0, 4), [], [], []).size == (3000, 2)
    assert draw_detections(Image.new("RGB", (300, 20)), torch.zeros(0, 4), [], [], []).size == (1500, 100)


def test_a_name_in_any_script_has_a_font_or_is_reported() -> None:
    assert font_warning(["cell", "Größe", "клетка"]) == ""
    assert "['\\U0010fffd']" in font_warning(["cell", "\U0010fffd"])  # private use: no font has it


def test_captions_are_plain_text_whatever_names_hold() -> None:
    """Of the name of a category, matplotlib would read what stands between dollars as a formula."""
    drawn = Panels(["$\\fish$ 0.9", "\U0010fffd"], columns=2, aspect=1.0, title="$\\fish$").picture()

    assert drawn.width == WIDTH


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


def feature_panels(features: torch.Tensor) -> list[np.ndarray]:
    """What the panels of norm, principal components and one channel show, row by row, in pixels of 269."""
    picture = np.asarray(draw_feature_maps(features, title="layer", count=1, columns=3)).astype(int)
    side = round((850 - 4 * 12) / 3)
    return [picture[-12 - side : -12, 12 + number * (side + 12) :][:, :side] for number in range(3)]


def test_the_channel_that_varies_most_is_shown_where_its_values_are() -> None:
    features = torch.zeros(3, 4, 4)
    features[0, 0] = 1.0
    features[1, :, 3] = 5.0
    _, _, channel = feature_panels(features)

    assert share_of(channel[:, :195], LOW) > 0.98
    assert share_of(channel[:, 210:260], HIGH) > 0.98


def test_the_norm_is_brightest_where_all_channels_are_largest() -> None:
    features = torch.full((3, 4, 4), 1.0)
    features[:, :2] = -4.0
    norm, _, _ = feature_panels(features)

    assert share_of(norm[8:130, 8:260], HIGH) > 0.98
    assert share_of(norm[140:260, 8:260], LOW) > 0.98


def test_cells_that_are_alike_have_one_colour_in_the_principal_components() -> None:
    directions = torch.eye(6)[:, :3]
    cells = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0]).view(2, 4)
    colors, explained = principal_components((directions[:, cells] + 3).double().numpy())

    assert explained == pytest.approx(1.0)
    assert len(np.unique(colors.reshape(-1, 3).round(6), axis=0)) == 3
    assert all(len(np.unique(colors[cells == kind].round(6), axis=0)) == 1 for kind in range(3))


def test_a_channel_that_is_not_finite_comes_first_with_its_cells_in_magenta() -> None:
    features = torch.zeros(3, 4, 4)
    features[0, 0] = 1.0
    features[2, :2, :2] = torch.tensor([[torch.nan, torch.inf], [-torch.inf, torch.nan]])
    panels = feature_panels(features)

    for panel in panels:
        assert share_of(panel[4:130, 4:130], [255, 0, 255]) > 0.98
        assert share_of(panel[140:260, 140:260], [255, 0, 255]) == 0


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
    box = torch.tensor([[0.5, 0.5, 1.0, 1.0]])  # the close-up is the whole picture
    points = draw_sampling_points(
        BLACK, locations, weights, box, boxes=box, captions=["query"], strides=[8], title="layer"
    )
    side = round((850 - 3 * 12) / 2)
    close_up = np.asarray(points).astype(int)[-12 - side : -12, -12 - side : -12]

    third = [round(255 * part) for part in colormaps["viridis"](1 / 3)[:3]]
    quarter, rest = round(side / 4), round(3 * side / 4)
    assert share_of(close_up[rest - 1 : rest + 2, quarter - 1 : quarter + 2], HIGH) == 1
    assert share_of(close_up[quarter - 1 : quarter + 2, rest - 1 : rest + 2], third) == 1
    assert share_of(close_up[quarter - 1 : quarter + 2, quarter - 1 : quarter + 2], 0) == 1


def test_every_level_has_a_close_up_around_the_points_of_its_query() -> None:
    picture = Image.new("RGB", (40, 40))
    picture.paste("#ff0000", (0, 0, 8, 8))
    locations = torch.full((1, 1, 3, 2, 2), 0.1)
    box = torch.tensor([[0.1, 0.1, 0.1, 0.1]])
    points = draw_sampling_points(
        picture,
        locations,
        torch.full((1, 1, 3, 2), 1 / 6),
        box,
        boxes=box,
        captions=["query"],
        strides=[8, 16, 32],
        title="layer",
    )
    drawn = np.asarray(points).astype(int)
    side = round((850 - 5 * 12) / 4)
    red = [(drawn[-12 - side : -12, 12 + i * (side + 12) :][:, :side, 0] > 60).mean() for i in range(4)]

    assert red[0] < 0.2  # the picture: 8 x 8 of 40 x 40, beside lines and points
    assert min(red[1:]) > 0.8  # the close-ups: red nearly alone
