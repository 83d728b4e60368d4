"""Deformable attention: a query attends to a few learned points of every level instead of to every cell.

A query predicts, for each head and level, offsets from its reference point and the weight of each; the values there are
read by bilinear interpolation. Cost grows with the number of cells, not with its square.

Beside the package's axis letters: S cells of all levels one after the other, L levels, M heads, J points of a head on a
level, D = C / M channels of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detr_backbone.detectors.deformable_sampling import Sampling, check_sampling, multi_scale_deformable_attention
from detr_backbone.detectors.precision import at_least_float32
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Size


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention.

    Locations, weights and sampling are float32 whatever the surrounding precision: on a level 128 cells wide,
    neighbouring bfloat16 locations are half a cell apart.

    Source: Deformable DETR (arXiv 2010.04159), section 4.1, equation 3; for the initialisation, its appendix.

    Args:
        d_model: channels C of queries and values.
        n_levels: feature levels L.
        n_heads: attention heads M.
        n_points: points J that a head samples on each level.
        sampling: how values between cells are read; see `sampling_on` for what "auto" takes.

    Raises:
        ConfigError: `n_heads` does not divide `d_model`, or `sampling` is not available.

    >>> attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
    >>> query, reference_points, value = torch.zeros(1, 5, 32), torch.full((1, 5, 2, 2), 0.5), torch.zeros(1, 15, 32)
    >>> attention(query, reference_points, value, [(3, 4), (1, 3)]).shape
    torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        sampling: Sampling = "auto",
    ) -> None:
        super().__init__()
        check_sampling(sampling)
        if d_model % n_heads:
            raise ConfigError(f"`d_model` must be a multiple of `n_heads` = {n_heads}, got {d_model}")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling = sampling
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a direction of its own for every head, its j-th point j cells away, and equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # onto the border of a square
        distance = torch.arange(1, self.n_points + 1)
        offsets = direction[:, None, None] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[Size],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum of values [B, Q, C] that each query samples.

        Args:
            query: [B, Q, C], position included.
            reference_points: (x, y) [B, Q, L, 2], or boxes cxcywh [B, Q, L, 4]; as a fraction of the padded level.
            value: the levels' cells [B, S, C], row by row, finest level first.
            spatial_shapes: (h, w) of each level in cells.
            padding_mask: bool [B, S], True on cells that read as zeros.
        """
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        locations, weights = self.samples(query, reference_points, spatial_shapes)
        value = value.view(*value.shape[:2], self.n_heads, -1)
        read = multi_scale_deformable_attention(value, spatial_shapes, locations, weights, sampling=self.sampling)
        return self.output_proj(read)

    def samples(self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[Size]) -> tuple[Tensor, Tensor]:
        """Return the locations that each query samples, and their weights.

        Returns:
            Locations (x, y) [B, Q, M, L, J, 2] as fractions of the padded level, and weights [B, Q, M, L, J], which sum
            to one over levels and points.

        Raises:
            ValueError: `reference_points` are neither points nor boxes.
        """
        shape = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        offsets = at_least_float32(self.sampling_offsets(query)).view(*shape, 2)
        weights = at_least_float32(self.attention_weights(query)).view(*shape[:3], -1).softmax(dim=-1).view(shape)
        # Laid out for every point, so that what follows runs along memory and not along pairs of numbers.
        centre = self._of_points(reference_points[..., :2])
        if reference_points.shape[-1] == 2:
            cells = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=offsets.dtype)
            # From pageable memory a non-blocking copy is safe, and does not wait for the device.
            unit = self._of_points(1 / cells.to(offsets.device, non_blocking=True))
        elif reference_points.shape[-1] == 4:
            unit = self._of_points(reference_points[..., 2:] * (0.5 / self.n_points))
        else:
            raise ValueError(
                f"`reference_points` must be [B, Q, L, 2] or [B, Q, L, 4], got {list(reference_points.shape)}"
            )
        return centre + offsets * unit, weights

    def _of_points(self, pairs: Tensor) -> Tensor:
        """Expand [..., L, 2] to [..., 1, L, J, 2], the same for every head."""
        return pairs[..., None, :, None, :].expand(*pairs.shape[:-2], 1, -1, self.n_points, -1).contiguous()

    def extra_repr(self) -> str:
        return f"sampling={self.sampling}"
