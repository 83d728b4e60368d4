"""Pictures of what a detector finds."""

import numpy as np
import torch
from PIL import Image

from detr_backbone.visualize import COLORS, draw_detections


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
