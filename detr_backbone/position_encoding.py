"""Position encodings: where a cell stands in its image, as a vector that attention can read.

Both take the mask of a padded batch and count valid cells only, so that a position does not depend on the padding.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Batch, NestedTensor, as_nested_tensor

_GEOMETRIES = 16  # encodings that are kept: a few levels of a few image sizes


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of a cell's row and column, at geometrically spaced frequencies.

    Source: Attention Is All You Need (arXiv 1706.03762), section 3.5, for each of two axes as in DETR (arXiv
    2005.12872), appendix A.4. Computed in float32 whatever the surrounding precision.

    Args:
        num_pos_feats: channels P per axis, even.
        temperature: ratio between the longest and the shortest wavelength.
        normalize: divide rows and columns by the image's valid height and width and multiply them by `scale`.
        scale: length in radians to which a normalised axis is stretched; 2 pi if left out.
        offset: added to the row and column, which count from 1, before normalising: 0 in DETR, -0.5 (the cell's centre)
            in Deformable DETR.

    >>> PositionEmbeddingSine(num_pos_feats=16, normalize=True)(torch.zeros(2, 5, 7, dtype=torch.bool)).shape
    torch.Size([2, 32, 5, 7])
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        *,
        temperature: float = 10000.0,
        normalize: bool = False,
        scale: float | None = None,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        if num_pos_feats < 2 or num_pos_feats % 2:
            raise ConfigError(f"`num_pos_feats` must be even and positive (a sine and a cosine), got {num_pos_feats}")
        if scale is not None and not normalize:
            raise ConfigError(f"`scale` must be left out where `normalize` is False, got {scale}")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale
        self.offset = offset
        self._unpadded: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, level: Batch | Tensor) -> Tensor:
        """Return encodings [B, 2P, h, w] in float32, rows first, of a level or its mask [B, h, w], True on padding.

        Levels of one geometry without padding have one encoding in common, which must not be written to.
        """
        if isinstance(level, Tensor):
            return self._encode(level)
        batch = as_nested_tensor(level)
        if batch.is_padded:
            return self._encode(batch.mask)
        height, width = batch.mask.shape[1:]
        if torch.compiler.is_compiling():
            return self._encode(batch.mask.new_zeros(1, height, width)).expand(batch.mask.shape[0], -1, -1, -1)
        options = (self.num_pos_feats, self.temperature, self.normalize, self.scale, self.offset)
        key = (height, width, batch.mask.device, *options)
        if key not in self._unpadded:
            if len(self._unpadded) >= _GEOMETRIES:
                self._unpadded.pop(next(iter(self._unpadded)))
            with torch.inference_mode(mode=False):
                self._unpadded[key] = self._encode(batch.mask.new_zeros(1, height, width))
        return self._unpadded[key].expand(batch.mask.shape[0], -1, -1, -1)

    def _encode(self, mask: Tensor) -> Tensor:
        with torch.autocast(mask.device.type, enabled=False):
            valid = (~mask).int()
            axes = [self._encode_axis(valid.cumsum(axis, dtype=torch.int32), axis) for axis in (1, 2)]
            return torch.cat(axes, dim=3).permute(0, 3, 1, 2)

    def _encode_axis(self, count: Tensor, axis: int) -> Tensor:
        position = count.float() + self.offset
        if self.normalize:
            total = count.narrow(axis, count.shape[axis] - 1, 1)
            position = position / (total + 1e-6) * self.scale  # 1e-6 only keeps columns of padding finite
        angle = position[..., None] * self._frequencies(count.device)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(3)

    def _frequencies(self, device: torch.device) -> Tensor:
        """Radians per unit of position [P / 2], from 1 down to almost 1 / temperature."""
        pair = torch.arange(self.num_pos_feats // 2, dtype=torch.float32, device=device)
        return self.temperature ** (-2 * pair / self.num_pos_feats)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unpadded": {}}

    def extra_repr(self) -> str:
        return f"{self.num_pos_feats}, normalize={self.normalize}, offset={self.offset}"


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for every row and every column, counted from the image's top left corner.

    Source: facebookresearch/detr, models/position_encoding.py: 50 positions per axis. An image with more cells takes
    the 50 vectors interpolated over its own length; its first and last cell keep the first and last vector.

    Args:
        num_pos_feats: channels P per axis.
        num_embeddings: learned positions per axis.

    >>> PositionEmbeddingLearned(num_pos_feats=16)(torch.zeros(2, 5, 70, dtype=torch.bool)).shape
    torch.Size([2, 32, 5, 70])
    """

    def __init__(self, num_pos_feats: int = 256, *, num_embeddings: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(num_embeddings, num_pos_feats)
        self.col_embed = nn.Embedding(num_embeddings, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, level: Batch | Tensor) -> Tensor:
        """Return encodings [B, 2P, h, w], columns first, of a level or its mask [B, h, w], True on padding."""
        if isinstance(level, Tensor):
            level = NestedTensor(level.new_zeros(level.shape[0], 1, *level.shape[1:]), level)
        batch = as_nested_tensor(level)
        height, width = batch.mask.shape[1:]
        # Up to the learned positions, rows and columns are plain look-ups, the same for every image.
        same = max(height, width) <= self.row_embed.num_embeddings
        sizes = [(height, width)] if same else batch.sizes
        encoded = torch.stack([self._encode(h, w, height, width) for h, w in sizes])
        return encoded.expand(batch.mask.shape[0], -1, -1, -1)

    def _encode(self, valid_height: int, valid_width: int, height: int, width: int) -> Tensor:
        rows = _positions(self.row_embed.weight, valid_height, height)[:, :, None].expand(-1, -1, width)
        columns = _positions(self.col_embed.weight, valid_width, width)[:, None, :].expand(-1, height, -1)
        return torch.cat([columns, rows])


def _positions(table: Tensor, valid: int, length: int) -> Tensor:
    """Vectors [P, length] of the positions of one axis, of which the first `valid` lie in the image."""
    if valid <= len(table):
        vectors = table[:valid].T
    else:
        vectors = F.interpolate(table.T[None], size=valid, mode="linear", align_corners=True)[0]
    return F.pad(vectors, (0, length - valid))


@dataclass(frozen=True, kw_only=True)
class PositionEncodingConfig:
    """Configuration of a position encoding.

    Args:
        type: "sine" has no parameters; "learned" has 50 per axis and channel.
        temperature: ratio between the longest and the shortest wavelength ("sine").
        offset: 0 as in DETR, -0.5 as in Deformable DETR ("sine").
    """

    type: Literal["sine", "learned"] = "sine"
    temperature: float = 10000.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in ("sine", "learned"):
            raise ConfigError(f"`position_encoding.type` must be 'sine' or 'learned', got {self.type!r}")


def build_position_encoding(
    config: PositionEncodingConfig, hidden_dim: int
) -> PositionEmbeddingSine | PositionEmbeddingLearned:
    """Return the encoding with `hidden_dim` channels of a configuration, sines normalised as in published detectors.

    Raises:
        ConfigError: `hidden_dim` does not split into two axes, or an option does not belong to the type.
        TypeError: `config` is no PositionEncodingConfig.
    """
    if not isinstance(config, PositionEncodingConfig):
        raise TypeError(
            "`position_encoding` must be a PositionEncodingConfig, such as PositionEncodingConfig(type='learned'), got "
            f"{config!r}"
        )
    if hidden_dim < 2 or hidden_dim % 2:
        raise ConfigError(f"`hidden_dim` must be even and positive (half for each axis), got {hidden_dim}")
    if config.type == "learned":
        if config != PositionEncodingConfig(type="learned"):
            raise ConfigError(f"`temperature` and `offset` belong to the sine encoding, got {config}")
        return PositionEmbeddingLearned(hidden_dim // 2)
    return PositionEmbeddingSine(hidden_dim // 2, temperature=config.temperature, normalize=True, offset=config.offset)
