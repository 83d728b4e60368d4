"""What a detector's queries look at, over the picture: attention maps, and sampling points."""

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
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_attention(
    picture: Image.Image, maps: Tensor, *, boxes: Tensor, captions: Sequence[str], title: str, columns: int = 4
) -> Image.Image:
    """Attention maps over the picture, brightest at their own largest weight, with the boxes that came of them.

    Args:
        picture: RGB; the image that the maps cover.
        maps: weights [N, h, w] of N queries over the cells of the image, not negative.
        boxes: [N, 4] cxcywh as shares of the image.
        captions: one for each query.
        title: what is seen: layer, cells, stride, which queries.
        columns: panels in a row.
    """
    dimmed = _dimmed(picture)
    about = [f"{caption}\nlargest weight {look.max():.2g}" for caption, look in zip(captions, maps, strict=True)]
    panels = Panels(about, columns=columns, aspect=picture.width / picture.height, title=title)
    extent = (0.0, float(picture.width), float(picture.height), 0.0)
    for panel, look, box in zip(panels.axes, maps.double().cpu().numpy(), boxes, strict=True):
        share = look / max(look.max(), 1e-12)
        heat = np.dstack([_WEIGHTS(share)[..., :3], 0.65 * share**0.5])
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
    columns: int = 2,
) -> Image.Image:
    """Sampling points over the picture: a marker per level, larger and brighter with its weight.

    A cross is where a query stood, a thin box what it took the object for before; the strong box is what it predicts.

    Args:
        picture: RGB; the image that the points look at.
        locations: (x, y) [N, M, L, J, 2] of N queries, as shares of the image.
        weights: [N, M, L, J].
        references: points [N, 2] or boxes cxcywh [N, 4], as shares of the image.
        boxes: predicted, [N, 4] cxcywh as shares of the image.
        captions: one for each query.
        strides: pixels per cell of each of L levels.
        title: what is seen: layer, which queries.
        columns: panels in a row.
    """
    dimmed = _dimmed(picture)
    most = float(weights.max())
    beyond = ((locations < 0) | (locations > 1)).any(dim=-1).flatten(1).sum(dim=1).tolist()
    captions = [f"{text}, {n} points outside" if n else text for text, n in zip(captions, beyond, strict=True)]
    levels = ", ".join(f"{name} stride {stride}" for name, stride in zip("○□△◇▽✚", strides, strict=False))
    title = f"{title}\npoints: {levels}; size and brightness: weight, 0 … {most:.2g}"
    panels = Panels(captions, columns=columns, aspect=picture.width / picture.height, title=title)
    scale = np.array([picture.width, picture.height])
    for index, panel in enumerate(panels.axes):
        panel.imshow(dimmed, extent=(0, picture.width, picture.height, 0), aspect="auto")
        if references.shape[-1] == 4:
            _draw_box(panel, references[index], picture, linewidth=1.0, linestyle=":")
        _draw_box(panel, boxes[index], picture)
        for level in range(locations.shape[2]):
            x, y = locations[index, :, level].flatten(0, 1).double().cpu().numpy().T * scale[:, None]
            weight = weights[index, :, level].flatten().double().cpu().numpy()
            order = weight.argsort()
            panel.scatter(
                x[order],
                y[order],
                s=5 + 90 * weight[order],
                c=weight[order],
                cmap=_WEIGHTS,
                vmin=0,
                vmax=most,
                marker=_MARKERS[level % len(_MARKERS)],
                edgecolors="white",
                linewidths=0.3,
                clip_on=True,
            )
        x, y = references[index, :2].double().cpu().numpy() * scale
        panel.add_line(Line2D([x], [y], marker="x", markersize=9, markeredgewidth=2.5, color="#009E73"))
        panel.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    return panels.picture()


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
