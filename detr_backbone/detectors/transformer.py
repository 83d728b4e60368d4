"""The encoder and decoder of DETR: attention over the cells of one feature map, then from object queries to its cells.

Positions take part in every attention, added to queries and keys and never to values, so that what is carried from
layer to layer stays free of them.

Source: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), section 3.2 and A.3.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.detectors.attention import attend
from detr_backbone.detectors.dropout import Dropout

Activation: TypeAlias = Literal["relu", "gelu"]


def _relu(x: Tensor) -> Tensor:
    """Return ReLU, in place in inference: autograd would copy the gradient of a view that was written in place."""
    return torch.relu(x) if x.requires_grad else torch.relu_(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": _relu, "gelu": F.gelu}
"""By name; each takes the output of a linear layer, which nothing else needs."""


class Transformer(nn.Module):
    """DETR's transformer: encodes one feature map, decodes all object queries at once.

    Weight matrices start Xavier-uniform, as published. Parameter names are those of the published checkpoints.

    Args:
        d_model: C, the width of every token.
        nhead: attention heads; divides `d_model`.
        num_encoder_layers: layers of self-attention over cells.
        num_decoder_layers: L, layers of attention between queries and from queries to cells.
        dim_feedforward: hidden width of the two-layer network in every layer.
        dropout: fraction of values dropped in attention, in that network and before every residual sum.
        activation: `relu` (published) or `gelu`.
        normalize_before: LayerNorm before each step instead of after its residual sum; the encoder then ends in a norm.
        return_intermediate_dec: give the state after each decoder layer, for auxiliary losses, not only the last.

    Raises:
        ValueError: `nhead` does not divide `d_model`, or `activation` is unknown.

    >>> transformer = Transformer(d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=3, dim_feedforward=32,
    ...                           return_intermediate_dec=True)
    >>> cells, queries = torch.zeros(2, 16, 4, 5), torch.zeros(7, 16)
    >>> hidden, memory = transformer(cells, torch.zeros(2, 4, 5, dtype=torch.bool), queries, cells)
    >>> hidden.shape, memory.shape
    (torch.Size([3, 2, 7, 16]), torch.Size([2, 16, 4, 5]))
    """

    def __init__(
        self,
        *,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = "relu",
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
    ) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"`nhead` must divide `d_model` {d_model}, got {nhead}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}, got {activation!r}")
        self.d_model = d_model
        self.nhead = nhead

        def encoder_layer() -> TransformerEncoderLayer:
            return TransformerEncoderLayer(
                d_model, nhead, dim_feedforward, dropout, activation, normalize_before=normalize_before
            )

        def decoder_layer() -> TransformerDecoderLayer:
            return TransformerDecoderLayer(
                d_model, nhead, dim_feedforward, dropout, activation, normalize_before=normalize_before
            )

        self.encoder = TransformerEncoder(
            [encoder_layer() for _ in range(num_encoder_layers)], nn.LayerNorm(d_model) if normalize_before else None
        )
        self.decoder = TransformerDecoder(
            [decoder_layer() for _ in range(num_decoder_layers)],
            nn.LayerNorm(d_model),
            return_intermediate=return_intermediate_dec,
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return every query's states in the decoder, normalised, and the encoded feature map.

        Args:
            src: features [B, C, h, w].
            mask: bool [B, h, w], True on padding, to which nothing attends; None where nothing is padded, and attention
                is faster.
            query_embed: [Q, C], the learned position of each query, the same for every image.
            pos_embed: [B, C, h, w], the position of each cell.

        Returns:
            The states [L, B, Q, C], last layer last (L is 1 without `return_intermediate_dec`), and the encoded
            feature map [B, C, h, w].
        """
        cells = src.flatten(2).transpose(1, 2)
        padding = None if mask is None else mask.flatten(1)
        pos = pos_embed.flatten(2).transpose(1, 2)
        query_pos = query_embed.expand(src.shape[0], -1, -1)

        memory = self.encoder(cells, padding, pos)
        hidden = self.decoder(torch.zeros_like(query_pos), memory, padding, pos, query_pos)
        return hidden, memory.transpose(1, 2).reshape(src.shape)


class TransformerEncoder(nn.Module):
    """Self-attention over cells, layer after layer."""

    def __init__(self, layers: "list[TransformerEncoderLayer]", norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, src: Tensor, padding: Tensor | None, pos: Tensor) -> Tensor:
        """Return encoded cells [B, h*w, C]; `padding` [B, h*w] is True on cells that are not attended to."""
        for layer in self.layers:
            src = layer(src, padding, pos)
        if self.norm is not None:
            src = self.norm(src)
        return src


class TransformerDecoder(nn.Module):
    """Attention between queries and from queries to cells, layer after layer."""

    def __init__(
        self, layers: "list[TransformerDecoderLayer]", norm: nn.LayerNorm, *, return_intermediate: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(self, tgt: Tensor, memory: Tensor, padding: Tensor | None, pos: Tensor, query_pos: Tensor) -> Tensor:
        """Return normalised query states [L, B, Q, C], or [1, B, Q, C] of the last layer only."""
        keys = memory + pos
        states = []
        for layer in self.layers:
            tgt = layer(tgt, keys, memory, padding, query_pos)
            states.append(tgt)
        return self.norm(torch.stack(states if self.return_intermediate else states[-1:]))


class _Layer(nn.Module):
    """Base of both kinds of layer: the residual step around each part, and the feed-forward part."""

    linear1: nn.Linear
    linear2: nn.Linear
    dropout: Dropout
    activation: Callable[[Tensor], Tensor]
    normalize_before: bool

    def _step(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.normalize_before:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(_Layer):
    """Self-attention over cells, then a feed-forward network. Arguments are those of `Transformer`."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        *,
        normalize_before: bool,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]
        self.normalize_before = normalize_before

    def forward(self, src: Tensor, padding: Tensor | None, pos: Tensor) -> Tensor:
        """Return cells [B, h*w, C] after this layer."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + pos
            return attend(self.self_attn, query, query, x, padding=padding)

        src = self._step(src, self.norm1, self_attention)
        return self._step(src, self.norm2, self._feed_forward)


class TransformerDecoderLayer(_Layer):
    """Attention between queries, from queries to cells, then a feed-forward network. Arguments as in `Transformer`."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Activation,
        *,
        normalize_before: bool,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]
        self.normalize_before = normalize_before

    def forward(self, tgt: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, query_pos: Tensor) -> Tensor:
        """Return query states [B, Q, C] after this layer; `keys` are the cells with positions, `values` without."""

        def self_attention(x: Tensor) -> Tensor:
            query = x + query_pos
            return attend(self.self_attn, query, query, x)

        def cross_attention(x: Tensor) -> Tensor:
            return attend(self.multihead_attn, x + query_pos, keys, values, padding=padding)

        tgt = self._step(tgt, self.norm1, self_attention)
        tgt = self._step(tgt, self.norm2, cross_attention)
        return self._step(tgt, self.norm3, self._feed_forward)
