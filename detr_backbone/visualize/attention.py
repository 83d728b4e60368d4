"""Pictures of what the queries of a detector look at: attention maps, and sampling points."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from detr_backbone.visualize.panels import Array, Panels

_WEIGHTS = colormaps["viridis"]
_BOX = "#56B4E9"


def draw_attention(
    picture: Image.Image, maps: Tensor, *, boxes: Tensor, captions: Sequence[str], title: str, columns: int = 4
) -> Image.Image:
    """Draw attention maps over the picture, brightest at their own largest weight, with the predicted boxes.

    Args:
        picture: RGB; the image that the maps cover.
        maps: weights [N, h, w] of N queries over the cells of the image, not negative.
        boxes: [N, 4] cxcywh as fractions of the image.
        captions: one for each query.
        title: what is seen: layer, cells, stride, which queries.
        columns: panels in a row.
    """
    dimmed = _dimmed(picture)
    about = [f"{caption}\nlargest weight {look.max():.2g}" for caption, look in zip(captions, maps, strict=True)]
    panels = Panels(about, columns=columns, aspect=picture.width / picture.height, title=title)
    extent = (0.0, float(picture.width), float(picture.height), 0.0)
    for panel, look, box in zip(panels.axes, maps.double().cpu().numpy(), boxes, strict=True):
        relative = look / max(look.max(), 1e-12)
        heat = np.dstack([_WEIGHTS(relative)[..., :3], 0.65 * relative**0.5])
        panel.imshow(dimmed, extent=extent, aspect="auto")
        panel.imshow(heat, extent=extent, interpolation="nearest", aspect="auto")
        _draw_box(panel, box, picture)
        panel.set(xlim=extent[:2], ylim=extent[2:])
    return panels.picture()


def draw_sampling_points(
    picture: Image.Image,
    locations: Tensor,
    weights: Tensor,
    references: Tensor,
    *,
    boxes: Tensor,
    captions: Sequence[str],
    strides: Sequence[int],
    title: str,
) -> Image.Image:
    """Draw where queries sample each level: a row for each query, its box in the picture and a close-up of each level.

    Points are larger and brighter with their weight. A cross is the query's reference point; a dotted box is its
    reference box, the solid box is what it predicts.

    Args:
        picture: RGB; the image that the points look at.
        locations: (x, y) [N, M, L, J, 2] of N queries, M heads, L levels, J points, as fractions of the image.
        weights: [N, M, L, J], adding up to 1 over L and J.
        references: points [N, 2] or boxes cxcywh [N, 4], as fractions of the image.
        boxes: predicted, [N, 4] cxcywh as fractions of the image.
        captions: one for each query.
        strides: pixels per cell of each of L levels.
        title: what is seen: layer, which queries.
    """
    dimmed = _dimmed(picture)
    most = float(weights.max())
    beyond = ((locations < 0) | (locations > 1)).any(dim=-1).flatten(1).sum(dim=1).tolist()
    parts = (weights.sum(dim=(1, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-12)[:, None]).tolist()
    about = []
    for text, outside, part in zip(captions, beyond, parts, strict=True):
        about.append(f"{text}, {outside} points outside" if outside else text)
        about += [f"stride {stride}: {level:.0%} of the weight" for stride, level in zip(strides, part, strict=True)]
    title = (
        f"{title}\nthe query's box, and close-ups of its sampling points; size and brightness: weight, 0 … {most:.2g}"
    )
    aspect = picture.width / picture.height
    panels = Panels(about, columns=1 + len(strides), aspect=aspect, title=title)
    scale = np.array([picture.width, picture.height])
    axes = iter(panels.axes)
    for index in range(len(boxes)):
        points = locations[index].double().cpu().numpy() * scale
        weight = weights[index].double().cpu().numpy()
        left, right, lower, upper = _close_up(points[weight > 0.05 * most], boxes[index], picture)
        for level in range(-1, len(strides)):
            panel = next(axes)
            panel.imshow(dimmed, extent=(0, picture.width, picture.height, 0), aspect="auto")
            if references.shape[-1] == 4:
                _draw_box(panel, references[index], picture, linewidth=1.0, linestyle=":")
            _draw_box(panel, boxes[index], picture, linewidth=2.0 if level < 0 else 1.2)
            if level < 0:
                frame = Rectangle((left, upper), right - left, lower - upper, fill=False, edgecolor="white", ls="--")
                panel.add_patch(frame)
                panel.set(xlim=(0, picture.width), ylim=(picture.height, 0))
                continue
            x, y = references[index, :2].double().cpu().numpy() * scale
            for width, color in ((4, "white"), (2, "#009E73")):
                panel.add_line(Line2D([x], [y], marker="x", markersize=7, markeredgewidth=width, color=color))
            at, size = points[:, level].reshape(-1, 2), weight[:, level].ravel()
            order = size.argsort()
            panel.scatter(
                at[order, 0],
                at[order, 1],
                s=8 + 100 * size[order] / max(most, 1e-12),
                c=size[order],
                cmap=_WEIGHTS,
                vmin=0,
                vmax=most,
                edgecolors="white",
                linewidths=0.4,
                clip_on=True,
            )
            panel.set(xlim=(left, right), ylim=(lower, upper))
    return panels.picture()


def _close_up(points: Array, box: Tensor, picture: Image.Image) -> tuple[float, float, float, float]:
    """Return left, right, lower, upper of the part of the picture around points and a box, of the picture's aspect."""
    cx, cy, w, h = box.double().cpu().numpy() * np.array([picture.width, picture.height] * 2)
    x = np.append(points[:, 0], (cx - w / 2, cx + w / 2)).clip(0, picture.width)
    y = np.append(points[:, 1], (cy - h / 2, cy + h / 2)).clip(0, picture.height)
    part = max(np.ptp(x) / picture.width, np.ptp(y) / picture.height)
    part = min(max(1.2 * part, 0.1), 1.0)
    width, height = part * picture.width, part * picture.height
    left = min(max((x.min() + x.max() - width) / 2, 0.0), picture.width - width)
    upper = min(max((y.min() + y.max() - height) / 2, 0.0), picture.height - height)
    return left, left + width, upper + height, upper


def _draw_box(panel: Axes, box: Tensor, picture: Image.Image, *, linewidth: float = 2.0, linestyle: str = "-") -> None:
    cx, cy, w, h = box.double().cpu().numpy() * np.array([picture.width, picture.height] * 2)
    panel.add_patch(
        Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, edgecolor=to_rgb(_BOX), linewidth=linewidth, ls=linestyle)
    )


def _dimmed(picture: Image.Image) -> Array:
    """The picture [h, w, 3] within 0 .. 1, dark and pale, so that what is drawn over it stands out."""
    values = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    dimmed: Array = 0.7 * (0.6 * values + 0.4 * values.mean(axis=2, keepdims=True))
    return dimmed
