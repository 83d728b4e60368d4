"""Pictures of what a backbone gives: feature maps, and the masks and positions of its levels."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.visualize.panels import NOT_FINITE, VALUES, Array, Panels, robust_range

_PADDING = 0.85  # grey, light
_POSITIONS = VALUES.with_extremes(bad=str(_PADDING))


def draw_feature_maps(
    features: Tensor, *, title: str, picture: Image.Image | None = None, count: int = 13, columns: int = 4
) -> Image.Image:
    """Draw a feature map: its norm, its principal components, and its most active channels.

    The norm of each cell over the channels shows where something is; cells that are alike have like colours in the
    first three principal components, shown as red, green and blue. Active is what varies most over the cells, by
    standard deviation. Every panel spans its own 1st to its 99th percentile. A channel with NaN or infinity comes
    before all, and such cells are magenta.

    Args:
        features: [C, h, w] of one image.
        title: what is seen: layer, shape, stride.
        picture: what the network was given, as the first panel.
        count: the most channels that are shown.
        columns: panels in a row.
    """
    values = _array(features)
    values[~np.isfinite(values)] = np.nan
    missing = np.isnan(values).sum(axis=(1, 2))
    flat = values.reshape(len(values), -1)
    activity = np.array([np.std(row[np.isfinite(row)]) if np.isfinite(row).any() else 0.0 for row in flat])
    chosen = np.lexsort((-activity, missing == 0))[:count].tolist()
    norm = np.sqrt((values**2).sum(axis=0))
    components, explained = principal_components(values)
    maps = [norm, *(values[channel] for channel in chosen)]
    ranges = [robust_range(one) for one in maps]
    names = ["norm", *(f"channel {channel}" for channel in chosen)]
    captions = [f"{name}: {low:.2g} … {high:.2g}" for name, (low, high) in zip(names, ranges, strict=True)]
    captions.insert(1, f"PCA: {explained:.0%} of the variance")
    about = (
        f"norm over the channels, the first three principal components as red, green, blue,\n"
        f"and the {len(chosen)} of {len(values)} channels that vary most (standard deviation), 1st … 99th percentile"
    )
    if missing.any():
        about += f"\nNOT FINITE: {missing.sum()} cells of {np.count_nonzero(missing)} channels, in magenta"
    if picture is not None:
        captions = ["input", *captions]
    panels = Panels(captions, columns=columns, aspect=values.shape[2] / values.shape[1], title=f"{title}\n{about}")
    axes = iter(panels.axes)
    if picture is not None:
        next(axes).imshow(np.asarray(picture), aspect="auto")
    for index, (one, (low, high)) in enumerate(zip(maps, ranges, strict=True)):
        next(axes).imshow(one, cmap=VALUES, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
        if index == 0:
            next(axes).imshow(components, interpolation="nearest", aspect="auto")
    return panels.picture()


def principal_components(values: Array) -> tuple[Array, float]:
    """Return the first three principal components of the cells as colours [h, w, 3], and their part of the variance.

    Each component spans 0 .. 1 from its 1st to its 99th percentile; its largest loading is positive. Cells that are not
    finite are magenta.

    Args:
        values: [C, h, w].
    """
    cells = values.reshape(len(values), -1).T
    finite = np.isfinite(cells).all(axis=1)
    colors = np.full((len(cells), 3), to_rgb(NOT_FINITE))
    centred = cells[finite] - cells[finite].mean(axis=0) if finite.any() else cells[finite]
    total = float((centred**2).sum())
    if total > 0:
        with torch.random.fork_rng(devices=[]):  # the algorithm draws its start
            torch.manual_seed(0)
            _, _, loadings = torch.pca_lowrank(torch.from_numpy(centred), q=min(6, *centred.shape), center=False)
        directions = loadings[:, :3].numpy()
        directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
        scores = centred @ directions
        bounds = [robust_range(column) for column in scores.T]
        scaled = np.column_stack([(c - low) / (high - low) for c, (low, high) in zip(scores.T, bounds, strict=True)])
        colors[finite] = 0.5
        colors[finite, : scaled.shape[1]] = scaled.clip(0, 1)
        return colors.reshape(*values.shape[1:], 3), float((scores**2).sum() / total)
    colors[finite] = 0.5
    return colors.reshape(*values.shape[1:], 3), 1.0


def draw_levels(
    images: NestedTensor, levels: Sequence[NestedTensor], positions: Sequence[Tensor], *, strides: Sequence[int]
) -> Image.Image:
    """Draw the masks and the position encodings of a padded batch.

    A row for each image and level: the image in its batch with the cells that count as its own, dashed; the mask; the
    channel of the position encoding that varies most along rows, and the one along columns; and how similar every
    position is to that of the middle cell, as a cosine.

    Args:
        images: the batch [B, C, H, W].
        levels: [B, C, h, w], finest first.
        positions: [B, 2P, h, w] of each level.
        strides: pixels per cell of each level.
    """
    height, width = images.tensors.shape[2:]
    rows = [(image, level) for image in range(len(images)) for level in range(len(levels))]
    captions = []
    drawn = []
    for image, level in rows:
        (h, w), (cells_h, cells_w) = levels[level].sizes[image], levels[level].mask.shape[1:]
        position = _array(positions[level][image])
        vertical, horizontal = _varies_along(position[:, :h, :w], 1), _varies_along(position[:, :h, :w], 2)
        middle = position[:, h // 2, w // 2]
        lengths = np.linalg.norm(position, axis=0) * np.linalg.norm(middle)
        similarity = np.tensordot(middle, position, 1) / np.maximum(lengths, 1e-12)
        mask = levels[level].mask[image].cpu().numpy()
        names = (f"position, channel {vertical}", f"position, channel {horizontal}", "cosine with the middle")
        maps = (position[vertical], position[horizontal], similarity)
        drawn.append((mask, [np.where(mask, np.nan, values) for values in maps]))
        size = images.sizes[image]
        captions += [
            f"image {image}: {size[0]} x {size[1]}\nin {height} x {width} pixels",
            f"level {level}, stride {strides[level]}\n{h} x {w} of {cells_h} x {cells_w} cells",
            *(
                f"{name}\n{values[:h, :w].min():.2g} … {values[:h, :w].max():.2g}"
                for name, values in zip(names, maps, strict=True)
            ),
        ]
    title = (
        "Masks and positions of a padded batch\n"
        "image, valid cells dashed | mask, padding dark | positions along rows, along columns, their cosine"
    )
    panels = Panels(captions, columns=5, aspect=width / height, title=title)
    axes = iter(panels.axes)
    for (image, level), (mask, shown) in zip(rows, drawn, strict=True):
        panel = next(axes)
        panel.imshow(_as_rgb(images, image), aspect="auto", extent=(0, width, height, 0))
        h, w = (side * strides[level] for side in levels[level].sizes[image])
        panel.add_patch(Rectangle((0, 0), w, h, fill=False, edgecolor="#D55E00", linestyle="--", linewidth=1.5))
        panel.set(xlim=(0, width), ylim=(height, 0))
        next(axes).imshow(~mask, cmap="gray", vmin=-0.3, vmax=1.3, interpolation="nearest", aspect="auto")
        for values in shown:
            next(axes).imshow(values, cmap=_POSITIONS, interpolation="nearest", aspect="auto")
    return panels.picture()


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().cpu().numpy().copy()
    return array


def _varies_along(position: Array, axis: int) -> int:
    """The channel [C, h, w] of the largest variance along an axis, of which the other one knows nothing."""
    variance = position.var(axis=axis).mean(axis=1) - position.var(axis=3 - axis).mean(axis=1)
    return int(variance.argmax())


def _as_rgb(images: NestedTensor, index: int) -> Array:
    """An image of a batch [H, W, 3] within 0 .. 1, in grey where it does not have three channels; padding is light."""
    values = _array(images.tensors[index])
    h, w = images.sizes[index]
    if len(values) != 3:
        values = np.repeat(values.mean(axis=0, keepdims=True), 3, axis=0)
    low, high = robust_range(values[:, :h, :w])
    shown = np.full(values.shape, _PADDING)
    shown[:, :h, :w] = ((values[:, :h, :w] - low) / (high - low)).clip(0, 1)
    return shown.transpose(1, 2, 0)
