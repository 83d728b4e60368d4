"""Sampling of values between cells for deformable attention: three implementations of equal results, and the choice.

Beside the package's axis letters: S cells of all levels one after the other, L levels, M heads, J points of a head on a
level, D channels of a head.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Size

Sampling: TypeAlias = Literal["auto", "embedding_bag", "grid_sample", "ms_deform_attn"]

_EXTENSION = "torch_ms_deform_attn"
_BAGS_AT_ONCE = 512  # the values they read, 4 MiB of float32 as published, stay in a core's cache


def check_sampling(sampling: Sampling) -> None:
    """Refuse an implementation that is unknown or not installed.

    Raises:
        ConfigError: names it, and how to install it.
    """
    if sampling not in get_args(Sampling):
        raise ConfigError(f"`sampling` must be one of {list(get_args(Sampling))}, got {sampling!r}")
    if sampling == "ms_deform_attn" and not _has_extension():
        raise ConfigError(
            "`sampling` can be 'ms_deform_attn' only where torch-ms-deform-attn is installed, got no such package; "
            "install it (docs/speed.md), or leave the choice to 'auto'"
        )


def sampling_on(device: torch.device | str, sampling: Sampling = "auto") -> Sampling:
    """Return the implementation that runs on a device; never "auto".

    By default: `embedding_bag` on a CPU, the fastest there; on a CUDA device `ms_deform_attn` where
    torch-ms-deform-attn is installed, except in compiled graphs; else, and in exported graphs, `grid_sample`.

    >>> sampling_on("cpu"), sampling_on("cpu", "grid_sample")
    ('embedding_bag', 'grid_sample')
    """
    if sampling != "auto":
        return sampling
    kind = torch.device(device).type
    if kind == "cpu" and not torch.compiler.is_exporting():
        return "embedding_bag"
    if kind == "cuda" and not torch.compiler.is_compiling() and _has_extension():
        return "ms_deform_attn"
    return "grid_sample"


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    sampling: Sampling = "auto",
) -> Tensor:
    """Return weighted sums of values at sub-cell locations, [B, Q, C] in the dtype of `value`.

    Interpolation is bilinear between cell centres, over zeros beyond the border.

    Args:
        value: [B, S, M, D].
        spatial_shapes: (h, w) of each level in cells, S in all.
        sampling_locations: (x, y) [B, Q, M, L, J, 2]; (0, 0) and (1, 1) are a level's outer corners.
        attention_weights: [B, Q, M, L, J].
        sampling: the implementation; all give the same values up to rounding.

    Raises:
        ValueError: the levels do not have S cells.
    """
    cells, levels = value.shape[1], sampling_locations.shape[3]
    if sum(h * w for h, w in spatial_shapes) != cells or len(spatial_shapes) != levels:
        raise ValueError(
            f"`spatial_shapes` must hold {levels} levels of {cells} cells together, got {list(spatial_shapes)}"
        )
    read = _READERS[sampling_on(value.device, sampling)]
    out = read(value.to(sampling_locations.dtype), spatial_shapes, sampling_locations, attention_weights)
    return out.to(value.dtype)


def _by_grid_sample(value: Tensor, spatial_shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], *locations.shape[3:5]
    # Level by level, and queries last so that the sum over points runs along memory: on a CPU, forward and backward
    # take 0.7 of their time with points last and all levels stacked.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).reshape(levels, batch * heads, points, queries, 2)
    weights = weights.permute(3, 0, 2, 4, 1).reshape(levels, batch * heads, 1, points, queries)
    parts = torch.split(value, [h * w for h, w in spatial_shapes], dim=1)
    read = grids.new_zeros(())
    for (h, w), part, grid, weight in zip(spatial_shapes, parts, grids, weights, strict=True):
        level = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        sampled = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        read = read + (sampled * weight).sum(dim=2)
    return read.reshape(batch, heads * channels, queries).transpose(1, 2)


def _by_extension(value: Tensor, spatial_shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    from torch_ms_deform_attn import ms_deform_attn

    starts = [0]
    for h, w in spatial_shapes[:-1]:
        starts.append(starts[-1] + h * w)
    # From pageable memory a non-blocking copy is safe, and does not wait for the device.
    shapes, first = (torch.tensor(ints).to(value.device, non_blocking=True) for ints in (spatial_shapes, starts))
    return ms_deform_attn(value, shapes, first, locations, weights)


def _by_embedding_bag(value: Tensor, spatial_shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample by `F.embedding_bag`: a bag per query and head, of the four cells around each point and their weights."""
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], *locations.shape[3:5]
    atlas, tops = _atlas(value, spatial_shapes)
    rows, columns = atlas.shape[1:3]

    def of_points(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:  # [L * J], the last axis of all that follows
        return torch.tensor(numbers, dtype=dtype, device=value.device).repeat_interleave(points)

    x, y = locations.reshape(-1, levels * points, 2).unbind(-1)
    row, below = _cells_and_fractions(y, of_points([h for h, _ in spatial_shapes], y.dtype))
    column, right = _cells_and_fractions(x, of_points([w for _, w in spatial_shapes], x.dtype))
    image, head = torch.arange(batch, dtype=torch.int32), torch.arange(heads, dtype=torch.int32)
    slot = (image[:, None, None] * (rows * columns * heads) + head).expand(-1, queries, -1).reshape(-1, 1)
    first = ((row + of_points(tops, torch.int32)) * columns + column + 1) * heads + slot.to(value.device)

    lower = below * weights.reshape(below.shape)
    upper = weights.reshape(below.shape) - lower
    upper_right, lower_right = upper * right, lower * right
    bag_weights = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=1)
    neighbours = (0, heads, columns * heads, (columns + 1) * heads)
    read = _BagSums.apply(atlas.view(-1, channels), first, neighbours, bag_weights)
    return read.view(batch, queries, heads * channels)


def _atlas(value: Tensor, spatial_shapes: Sequence[Size]) -> tuple[Tensor, list[int]]:
    """Return the levels one below the other in one map [B, rows, columns, M, D], zero-padded, and their first rows."""
    widest = max(w for _, w in spatial_shapes)
    parts = torch.split(value.flatten(2), [h * w for h, w in spatial_shapes], dim=1)
    maps, tops, row = [value.new_zeros(len(value), 1, widest + 2, parts[0].shape[2])], [], 1
    for (h, w), part in zip(spatial_shapes, parts, strict=True):
        maps.append(F.pad(part.reshape(len(value), h, w, -1), (0, 0, 1, widest + 1 - w, 0, 1)))
        tops.append(row)
        row += h + 1
    return torch.cat(maps, dim=1).view(len(value), row, widest + 2, *value.shape[2:]), tops


def _cells_and_fractions(at: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return, along one axis, the cell before each location, int32 in -1 … size - 1, and the next cell's weight."""
    at = (at * size - 0.5).clamp(min=-1).minimum(size)  # beyond, all is zero
    cell = at.detach().floor().minimum(size - 1).nan_to_num(nan=-1)  # of a NaN location, the fraction is NaN
    return cell.int(), at - cell


class _BagSums(torch.autograd.Function):
    """Weighted sums of the rows of a table, four neighbours for each first row: [N, D].

    `F.embedding_bag` with a backward of its own: torch's takes the entries of the table one by one. The gradient of the
    table is a sum over bags too, of what reads a row.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, first: Tensor, neighbours: tuple[int, ...], bag_weights: Tensor) -> Tensor:
        """Sum rows of a table [R, D]: int32 indices [N, P], distances of neighbours in rows, weights [N, 4, P]."""
        ctx.save_for_backward(table, first, bag_weights)
        ctx.neighbours = neighbours
        index = _with_neighbours(first, neighbours)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=bag_weights.flatten(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        """Return the gradients of the table and of the weights."""
        table, first, bag_weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_weights = torch.empty_like(bag_weights)
        parts = zip(*(tensor.split(_BAGS_AT_ONCE) for tensor in (first, grad, of_weights)), strict=True)
        for some, theirs, out in parts:
            index = _with_neighbours(some, ctx.neighbours)
            rows = table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])
            torch.sum(rows.mul_(theirs[:, None]), dim=-1, out=out.view(index.shape))

        row, order = first.flatten().sort()
        start = torch.searchsorted(row, torch.arange(len(table), dtype=row.dtype, device=row.device))
        reader = order // first.shape[1]
        of_table = torch.zeros_like(table)
        for distance, weights in zip(ctx.neighbours, bag_weights.unbind(dim=1), strict=True):
            weight = weights.flatten().index_select(0, order)
            read = F.embedding_bag(reader, grad, start, mode="sum", per_sample_weights=weight)
            of_table[distance:] += read[: len(table) - distance]
        return of_table, None, None, of_weights


def _with_neighbours(first: Tensor, neighbours: Sequence[int]) -> Tensor:
    """Expand row indices [N, P] to those of their neighbours too, [N, 4 * P]."""
    distances = torch.tensor(neighbours, dtype=first.dtype, device=first.device)
    return (first[:, None] + distances[:, None]).flatten(1)


def _has_extension() -> bool:
    return importlib.util.find_spec(_EXTENSION) is not None


_Reader: TypeAlias = Callable[[Tensor, Sequence[Size], Tensor, Tensor], Tensor]
_READERS: dict[Sampling, _Reader] = {
    "embedding_bag": _by_embedding_bag,
    "grid_sample": _by_grid_sample,
    "ms_deform_attn": _by_extension,
}
