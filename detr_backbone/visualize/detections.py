"""What a detector finds, on the picture."""

from collections.abc import Sequence
from importlib.resources import files

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

# Okabe and Ito's palette, told apart by colour-blind readers too: https://jfly.uni-koeln.de/color/
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
SHORTEST_SIDE = 400
"""Pixels below which a picture is enlarged, so that the text on it can be read."""


def draw_detections(
    picture: Image.Image, boxes: Tensor, names: Sequence[str], scores: Sequence[float], labels: Sequence[int]
) -> Image.Image:
    """A picture with boxes, names and scores on it; one below 400 pixels is enlarged by a whole factor.

    Args:
        picture: RGB.
        boxes: [N, 4] xyxy in pixels of `picture`.
        names: of the class of each box.
        scores: of each box, 0 to 1.
        labels: of each box; boxes of one label have one colour.
    """
    factor = -(-SHORTEST_SIDE // min(picture.size)) if min(picture.size) < SHORTEST_SIDE else 1
    enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    if not len(boxes):
        return enlarged
    colors = [COLORS[label % len(COLORS)] for label in labels]
    drawn = draw_bounding_boxes(
        pil_to_tensor(enlarged),
        torch.as_tensor(boxes) * factor,
        labels=[f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)],
        colors=colors,
        width=2,
        font=str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"),
        font_size=14,
        label_colors="black",
        label_background_colors=colors,
        fill_labels=True,
    )
    return to_pil_image(drawn)
