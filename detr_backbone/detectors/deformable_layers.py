"""Layers of a deformable transformer: attention among the cells of all levels, and from queries to them.

Beside the package's axis letters: S cells of all levels one after the other, L levels.

Source: "Deformable DETR" (https://arxiv.org/abs/2010.04159), section 4.1 and the appendix.
"""

from torch import Tensor, nn

from detr_backbone.detectors.attention import attend
from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.detectors.dropout import Dropout
from detr_backbone.detectors.mlp import MLP
from detr_backbone.detectors.precision import outside_autocast
from detr_backbone.detectors.query_selection import Queries
from detr_backbone.detectors.references import Cells, box_encoding, refine
from detr_backbone.detectors.transformer import ACTIVATIONS, Activation


class DeformableTransformerEncoder(nn.Module):
    """Deformable self-attention among the cells of all levels, layer after layer."""

    def __init__(self, layers: "list[DeformableTransformerEncoderLayer]") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, src: Tensor, pos: Tensor, cells: Cells) -> Tensor:
        """Return encoded cells [B, S, C]."""
        references = cells.on_levels(cells.centres)
        for layer in self.layers:
            src = layer(src, pos, references, cells)
        return src


class DeformableTransformerDecoder(nn.Module):
    """Attention between queries and from queries to the cells around their references, layer after layer.

    Args:
        layers: the layers.
        ref_point_head: maps the sine encoding [B, Q, 2C] of the references before a layer to the queries' positions
            [B, Q, C] there; None where positions are given and stay.

    Attributes:
        bbox_embed: the detector's box heads, one per layer, where each layer refines the boxes of the one before; else
            None. A two-stage detector has one head more, the last, for its proposals, and gives `class_embed` as well.
    """

    def __init__(self, layers: "list[DeformableTransformerDecoderLayer]", ref_point_head: MLP | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.ref_point_head = ref_point_head
        self.bbox_embed: nn.ModuleList | None = None
        self.class_embed: nn.ModuleList | None = None

    def forward(
        self, queries: Queries, memory: Tensor, cells: Cells, mask: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the queries' states [B, Q, C] after each layer, and the references that the layer sampled around.

        Args:
            queries: where they start.
            memory: encoded cells [B, S, C].
            cells: their geometry.
            mask: bool [B, Q, Q], True where a query does not attend to another.
        """
        tgt, query_pos, references = queries.content, queries.position, queries.references
        hidden, layer_references = [], []
        for index, layer in enumerate(self.layers):
            if self.ref_point_head is not None:
                query_pos = self.ref_point_head(box_encoding(references, tgt.shape[-1] // 2).to(memory.dtype))
            tgt = layer(tgt, query_pos, cells.on_levels(references), memory, cells, mask=mask)
            hidden.append(tgt)
            layer_references.append(references)
            if self.bbox_embed is not None:
                references = refine(references, outside_autocast(self.bbox_embed[index], tgt)).detach()
        return hidden, layer_references


class DeformableTransformerEncoderLayer(nn.Module):
    """Deformable self-attention, then a feed-forward network. Arguments are those of `DeformableTransformer`."""

    def __init__(self, self_attn: MSDeformAttn, dim_feedforward: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        d_model = self_attn.d_model
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def forward(self, src: Tensor, pos: Tensor, references: Tensor, cells: Cells) -> Tensor:
        """Return cells [B, S, C] after this layer; `references` [B, S, L, 2] are their centres on each padded level."""
        attended = self.self_attn(src + pos, references, src, cells.spatial_shapes, cells.mask)
        src = self.norm1(src + self.dropout(attended))
        ffn_out = self.linear2(self.dropout(self.activation(self.linear1(src))))
        return self.norm2(src + self.dropout(ffn_out))


class DeformableTransformerDecoderLayer(nn.Module):
    """Attention between queries, deformable attention to cells, then a feed-forward network."""

    def __init__(
        self, cross_attn: MSDeformAttn, nhead: int, dim_feedforward: int, dropout: float, activation: Activation
    ) -> None:
        super().__init__()
        d_model = cross_attn.d_model
        self.cross_attn = cross_attn
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Tensor,
        cells: Cells,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return query states [B, Q, C] after this layer; `references` [B, Q, L, 2 or 4] lie on the padded levels.

        `mask`: bool [B, Q, Q], True where a query does not attend to another.
        """
        query = tgt + query_pos
        tgt = self.norm2(tgt + self.dropout(attend(self.self_attn, query, query, tgt, mask=mask)))
        attended = self.cross_attn(tgt + query_pos, references, memory, cells.spatial_shapes, cells.mask)
        tgt = self.norm1(tgt + self.dropout(attended))
        ffn_out = self.linear2(self.dropout(self.activation(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout(ffn_out))
