"""Detections on their picture: boxes, names and scores that can be read at every size."""

from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from detr_backbone.visualize.fonts import load_font

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
"""Okabe and Ito's, told apart by colour-blind readers too. Source: https://jfly.uni-koeln.de/color/"""
SHORTEST_SIDE = 400
"""Pixels below which a picture is enlarged, so that the text on it can be read."""
LONGEST_ENLARGED = 1600
"""Pixels beyond which no side is enlarged."""

_Rectangle = tuple[float, float, float, float]


def draw_detections(
    picture: Image.Image, boxes: Tensor, names: Sequence[str], scores: Sequence[float], labels: Sequence[int]
) -> Image.Image:
    """Return a picture with boxes, names and scores on it, lines and letters as large as the picture needs.

    A picture whose shorter side is below 400 pixels is enlarged by a whole factor, as long as no side passes 1600.
    Every line stands on a dark one, so that it can be seen on any ground. Names are set where they cover no other
    name, those of the highest scores first.

    Args:
        picture: RGB.
        boxes: [N, 4] xyxy in pixels of `picture`.
        names: of the class of each box.
        scores: of each box, 0 to 1.
        labels: of each box; boxes of one label have one colour.
    """
    short, long = min(picture.size), max(picture.size)
    factor = max(1, min(-(-SHORTEST_SIDE // short), LONGEST_ENLARGED // long))
    size = (picture.width * factor, picture.height * factor)
    drawn = picture.resize(size, Image.Resampling.BICUBIC) if factor > 1 else picture.copy()
    if not len(boxes):
        return drawn
    scale = max(1.0, min(factor * long / 1000, factor * short / 400))
    line = round(3 * scale)
    draw = ImageDraw.Draw(drawn)
    corners = [tuple(box) for box in (boxes.double() * factor).tolist()]
    order = sorted(range(len(corners)), key=lambda index: scores[index])
    for index in order:
        _draw_box(draw, corners[index], line, COLORS[labels[index] % len(COLORS)])
    taken: list[_Rectangle] = []
    for index in reversed(order):
        text, color = f"{names[index]} {scores[index]:.2f}", COLORS[labels[index] % len(COLORS)]
        font = load_font(text, round(14 * scale))
        ground = _ground(text, font, corners[index], line=line, taken=taken, size=size)
        draw.rectangle(ground, fill=color)
        draw.text((ground[0] + line // 2, ground[1]), text, font=font, fill=_ink(color))
        taken.append(ground)
    return drawn


def _draw_box(draw: ImageDraw.ImageDraw, corners: Sequence[float], line: int, color: str) -> None:
    """Draw a box whose line is centred on its border, on a dark line that is wider by a quarter on each side."""
    rim = max(1, line // 4)
    x1, y1, x2, y2 = (round(value) for value in corners)
    for around, width, fill in ((line // 2 + rim, line + 2 * rim, "#000000"), (line // 2, line, color)):
        outer = (x1 - around, y1 - around, max(x2, x1) + around, max(y2, y1) + around)
        draw.rectangle(outer, outline=fill, width=width)


def _ground(
    text: str,
    font: ImageFont.FreeTypeFont,
    corners: Sequence[float],
    *,
    line: int,
    taken: Sequence[_Rectangle],
    size: tuple[int, int],
) -> _Rectangle:
    """Return where a name stands: above or below its box, within it where neither is free, always in the picture."""
    ascent, descent = font.getmetrics()
    width, height = font.getlength(text) + 2 * (line // 2), ascent + descent
    x = max(0.0, min(corners[0] - line // 2, size[0] - width))
    heights = (corners[1] - line - height, corners[3] + line, corners[1] + line, corners[3] - line - height)
    within = [max(0.0, min(y, size[1] - height)) for y in heights if -line <= y <= size[1] - height + line] or [0.0]
    grounds = [(x, y, x + width, y + height) for y in within]
    return next((one for one in grounds if not any(_overlap(one, other) for other in taken)), grounds[0])


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(color: str) -> str:
    """Return black or white, whichever stands out; luma as in ITU-R BT.601."""
    red, green, blue = ImageColor.getrgb(color)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
