"""Levels of several strides from a network that has one, such as a plain ViT: the simple feature pyramid.

Every level comes straight from the last map of the network, or from a map of its own: enlarged by deconvolution, as it
is, or pooled; then a 1x1 and a 3x3 convolution, each with a LayerNorm over the channels of a cell.

Source: arXiv 2203.16527, section 3; layers and eps are those of `SimpleFeaturePyramid` in facebookresearch/detectron2,
detectron2/modeling/backbone/vit.py. That has no level of four times the stride; here it is pooled once, by four.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, size_of, valid_sizes
from detr_backbone.padding.exact import Padding, feature_level

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Levels of several strides from a network that has one, such as a plain ViT.

    Args:
        strides: of the levels, finest first: some of a quarter, half, once, twice and four times the network's stride,
            where that is whole: 4, 8, 16, 32, 64 for patches of 16 pixels, 7, 14, 28, 56 for patches of 14.
        channels: of every level.
    """

    strides: tuple[int, ...]
    channels: int = 256


class SimpleFeaturePyramid(nn.Module):
    """Levels of several strides from one map, or from one map for each of them.

    Args:
        config: strides and channels of the levels.
        strides: pixels per cell of the maps that it takes, all the same.
        channels: of the maps that it takes: one, or one for each level, of which the first makes the finest.
        padding: "exact" keeps what lies beyond an image out of it, as a backbone does.

    Attributes:
        strides, channels: one entry per level, finest first.

    Raises:
        ConfigError: the maps have several strides, cannot have one of the levels', or are not as many.

    >>> config = PyramidConfig(strides=(8, 16, 32), channels=256)
    >>> pyramid = SimpleFeaturePyramid(config, strides=(16,), channels=(384,), padding="exact")
    >>> images = NestedTensor(torch.rand(1, 3, 97, 131), None)
    >>> levels = pyramid({"0": NestedTensor(torch.rand(1, 384, 7, 9), None)}, images)
    >>> [(name, tuple(level.tensors.shape)) for name, level in levels.items()]
    [('0', (1, 256, 13, 17)), ('1', (1, 256, 7, 9)), ('2', (1, 256, 4, 5))]
    """

    def __init__(
        self, config: PyramidConfig, *, strides: Sequence[int], channels: Sequence[int], padding: Padding
    ) -> None:
        super().__init__()
        _check(config, strides)
        sources = channels if len(channels) > 1 else [*channels] * len(config.strides)
        self.strides = tuple(config.strides)
        self.channels = (config.channels,) * len(config.strides)
        self.levels = nn.ModuleList(
            _Level(in_channels, config.channels, base=strides[0], stride=stride, padding=padding)
            for in_channels, stride in zip(sources, config.strides, strict=True)
        )

    def forward(self, maps: Mapping[str, NestedTensor], images: NestedTensor) -> dict[str, NestedTensor]:
        """Return levels [B, C, ceil(H / stride), ceil(W / stride)] under "0", "1", …, finest first.

        Args:
            maps: one level of the batch, or one for each level of the pyramid, by name.
            images: the batch [B, C, H, W]: a map's own mask would be a cell of its stride too long for a finer level.
        """
        sources = list(maps.values()) if len(maps) > 1 else [*maps.values()] * len(self.levels)
        pairs = zip(self.levels, sources, strict=True)
        return {str(index): level(source, images) for index, (level, source) in enumerate(pairs)}


class _Level(nn.Module):
    """One level: a map of another stride, a 1x1 convolution and a 3x3 convolution."""

    def __init__(self, in_channels: int, channels: int, *, base: int, stride: int, padding: Padding) -> None:
        super().__init__()
        self.stride = stride
        self.padding: Padding = padding
        self.pooled = max(1, stride // base)
        self.enlarge, enlarged = _deconvolutions(in_channels, times=base // stride)
        self.lateral = nn.Sequential(nn.Conv2d(enlarged, channels, 1, bias=False), _LayerNorm2d(channels, eps=_EPS))
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), _LayerNorm2d(channels, eps=_EPS)
        )

    def forward(self, level: NestedTensor, images: NestedTensor) -> NestedTensor:
        # Where a window held no cell of its image, its maximum is -inf, and times a gradient of zero that is NaN.
        cells = self._enlarge(level, images) if self.pooled == 1 else self._as_level(self._pool(level), images).tensors
        # Deconvolutions and norms have biases, and the 3x3 convolution must find zeros beyond the image.
        lateral = self._as_level(self.lateral(cells), images).tensors
        return self._as_level(self.output(lateral), images)

    def _enlarge(self, level: NestedTensor, images: NestedTensor) -> Tensor:
        """Return the map as it is or enlarged, by windows as large as their steps: nothing comes from a neighbour."""
        cells = self.enlarge(level.tensors)
        # The last cell of the map may reach beyond the image.
        ((h, w),) = valid_sizes([size_of(images.tensors)], self.stride)
        return cells[:, :, :h, :w]

    def _pool(self, level: NestedTensor) -> Tensor:
        """Return the largest of every window; an image alone has nothing beyond its border, which a zero would be."""
        cells = level.tensors
        if self.padding == "exact" and level.is_padded:
            cells = torch.where(level.mask[:, None], float("-inf"), cells)
        return F.max_pool2d(cells, self.pooled, ceil_mode=True)

    def _as_level(self, cells: Tensor, images: NestedTensor) -> NestedTensor:
        return feature_level(cells, images, stride=self.stride, padding=self.padding)


class _LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each cell of [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class names it so
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _deconvolutions(channels: int, *, times: int) -> tuple[nn.Sequential, int]:
    """Return what enlarges a map two or four times, or leaves it, and the channels that come out: half for each."""
    half, quarter = channels // 2, channels // 4
    if times == 2:
        return nn.Sequential(nn.ConvTranspose2d(channels, half, 2, stride=2)), half
    if times == 4:
        first, second = nn.ConvTranspose2d(channels, half, 2, stride=2), nn.ConvTranspose2d(half, quarter, 2, stride=2)
        return nn.Sequential(first, _LayerNorm2d(half, eps=_EPS), nn.GELU(), second), quarter
    return nn.Sequential(), channels


def _check(config: PyramidConfig, strides: Sequence[int]) -> None:
    """Refuse levels that cannot be made from maps of these strides.

    Raises:
        ConfigError: the message says what there may be.
    """
    base, wanted = strides[0], list(config.strides)
    if len(set(strides)) > 1:
        raise ConfigError(
            f"`pyramid` must be given for layers of one stride, got `return_layers` of strides {list(strides)}"
        )
    possible = [base // times for times in (4, 2, 1) if base % times == 0] + [2 * base, 4 * base]
    if not wanted or wanted != sorted(set(wanted)) or not set(wanted) <= set(possible):
        raise ConfigError(
            f"`pyramid.strides` must be some of {possible}, finest first, for a network of stride {base}, got {wanted}"
        )
    if len(strides) not in (1, len(wanted)):
        raise ConfigError(
            f"`return_layers` must name one layer, or one for each of the {len(wanted)} strides of `pyramid`, got "
            f"{len(strides)} layers"
        )
    if config.channels < 1:
        raise ConfigError(f"`pyramid.channels` must be at least 1, got {config.channels}")
