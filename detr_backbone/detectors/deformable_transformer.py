"""The encoder and decoder of Deformable DETR: deformable attention among the cells of all levels, and to them.

Every query carries a reference point or box, as fractions of its image without padding; attention samples around it,
and box refinement moves it from layer to layer.

Beside the package's axis letters: S cells of all levels one after the other, L levels, N decoder layers.

Source: "Deformable DETR" (https://arxiv.org/abs/2010.04159), sections 4.1 and 4.2 and the appendix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_backbone.detectors.attention import attend
from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.detectors.deformable_sampling import Sampling
from detr_backbone.detectors.dropout import Dropout
from detr_backbone.detectors.precision import outside_autocast
from detr_backbone.detectors.references import Cells, box_encoding, refine
from detr_backbone.detectors.transformer import ACTIVATIONS, Activation
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor

PADDED_LOGIT = -1e4
"""Logit of a padded cell: below every valid one, without weight in a focal loss, and finite where it is matched."""


class DeformableTransformer(nn.Module):
    """Deformable DETR's transformer. Parameter names and initial values are those of the published code.

    Args:
        d_model: C, the width of every token.
        nhead: attention heads; divides `d_model`.
        num_encoder_layers: layers of deformable self-attention over cells.
        num_decoder_layers: N, layers of attention between queries and from queries to cells.
        dim_feedforward: hidden width of the two-layer network in every layer.
        dropout: fraction of values dropped in attention between queries, in that network and before every residual sum.
        activation: `relu` (published) or `gelu`.
        num_feature_levels: L.
        enc_n_points, dec_n_points: points that a head samples on each level.
        two_stage: take the queries from the best of the boxes that every cell proposes, instead of learning them.
        two_stage_num_proposals: Q, how many proposals become queries.
        sampling: how attention reads values between cells; see `MSDeformAttn`.

    Raises:
        ConfigError: `nhead` does not divide `d_model`, `activation` is unknown, or `sampling` is not available.

    >>> transformer = DeformableTransformer(d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=3,
    ...                                     num_feature_levels=2)
    >>> levels = [NestedTensor(torch.zeros(2, 32, h, w), None) for h, w in [(6, 8), (3, 4)]]
    >>> states = transformer(levels, [level.tensors for level in levels], torch.zeros(7, 64))
    >>> len(states.hidden), states.hidden[-1].shape, states.references[-1].shape
    (3, torch.Size([2, 7, 32]), torch.Size([2, 7, 2]))
    """

    def __init__(
        self,
        *,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        activation: Activation = "relu",
        num_feature_levels: int = 4,
        dec_n_points: int = 4,
        enc_n_points: int = 4,
        two_stage: bool = False,
        two_stage_num_proposals: int = 300,
        sampling: Sampling = "auto",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"`activation` must be one of {list(ACTIVATIONS)}, got {activation!r}")
        self.d_model = d_model
        self.num_feature_levels = num_feature_levels
        self.two_stage = two_stage
        self.two_stage_num_proposals = two_stage_num_proposals

        def encoder_layer() -> DeformableTransformerEncoderLayer:
            attention = MSDeformAttn(d_model, num_feature_levels, nhead, enc_n_points, sampling=sampling)
            return DeformableTransformerEncoderLayer(attention, dim_feedforward, dropout, activation)

        def decoder_layer() -> DeformableTransformerDecoderLayer:
            attention = MSDeformAttn(d_model, num_feature_levels, nhead, dec_n_points, sampling=sampling)
            return DeformableTransformerDecoderLayer(attention, nhead, dim_feedforward, dropout, activation)

        self.encoder = DeformableTransformerEncoder([encoder_layer() for _ in range(num_encoder_layers)])
        self.decoder = DeformableTransformerDecoder([decoder_layer() for _ in range(num_decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with Xavier-uniform matrices, deformable attention as it starts itself, and centred references."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        levels: Sequence[NestedTensor],
        positions: Sequence[Tensor],
        query_embed: Tensor | None = None,
        *,
        propose_padding: bool = False,
    ) -> "DecoderStates":
        """Return every query's state after each decoder layer, and the references that the layer sampled around.

        Args:
            levels: features [B, C, h, w] with their masks, finest first.
            positions: [B, C, h, w] of each level.
            query_embed: [Q, 2C], each query's learned position and first content; None if two-stage.
            propose_padding: let padded cells compete for the proposals, as the original code does; then an image's
                proposals depend on the other images of its batch.

        Raises:
            ValueError: `query_embed` is missing, or an image has fewer cells than there are proposals.
        """
        cells = Cells.of(levels)
        src = _in_sequence([level.tensors for level in levels])
        pos = _in_sequence([p + e[:, None, None] for p, e in zip(positions, self.level_embed, strict=True)])
        memory = self.encoder(src, pos, cells)

        proposals = None
        if self.two_stage:
            self._check_candidates(levels, propose_padding=propose_padding)
            proposals = self._propose(memory, cells, propose_padding=propose_padding)
            references, query_pos, tgt = self._queries(proposals, memory.dtype)
        elif query_embed is not None:
            query_pos, tgt = query_embed.expand(src.shape[0], -1, -1).chunk(2, dim=-1)
            references = outside_autocast(self.reference_points, query_pos).sigmoid()
        else:
            raise ValueError("`query_embed` must be [Q, 2C] where the transformer is not two-stage, got None")
        hidden, layer_references = self.decoder(tgt, query_pos, references, memory, cells)
        return DecoderStates(hidden, layer_references, proposals)

    def _propose(self, memory: Tensor, cells: Cells, *, propose_padding: bool) -> "Proposals":
        class_embed, bbox_embed = self.decoder.class_embed, self.decoder.bbox_embed
        if class_embed is None or bbox_embed is None:
            raise ValueError("a two-stage transformer needs `decoder.class_embed` and `decoder.bbox_embed`, got None")
        anchors = cells.anchors()
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(dim=-1, keepdim=True)  # padding has its centres beyond 1
        content = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0)))
        logits = outside_autocast(class_embed[-1], content)
        if not propose_padding and cells.mask is not None:
            logits = logits.masked_fill(cells.mask[..., None], PADDED_LOGIT)
        boxes = refine(anchors, outside_autocast(bbox_embed[-1], content))
        return Proposals(logits, boxes.masked_fill(~usable, 1))

    def _queries(self, proposals: "Proposals", dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes [B, Q, 4], positions [B, Q, C] and contents [B, Q, C] of the proposals of the highest score."""
        # Trained on proposals whose labels are all 0, the first logit is the score of any object.
        best = proposals.logits[..., 0].topk(self.two_stage_num_proposals, dim=1).indices
        references = proposals.boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        encoded = box_encoding(references, self.d_model // 2).to(dtype)
        query_pos, tgt = self.pos_trans_norm(self.pos_trans(encoded)).chunk(2, dim=-1)
        return references, query_pos, tgt

    def _check_candidates(self, levels: Sequence[NestedTensor], *, propose_padding: bool) -> None:
        if torch.compiler.is_compiling():
            return  # a graph does not know the sizes; topk still refuses more proposals than cells
        for index in range(len(levels[0])):
            shapes = [level.tensors.shape[-2:] if propose_padding else level.sizes[index] for level in levels]
            count = sum(h * w for h, w in shapes)
            if count < self.two_stage_num_proposals:
                raise ValueError(
                    f"`two_stage_num_proposals` must be at most the {count} cells of image {index} of the batch, got "
                    f"{self.two_stage_num_proposals}; lower it, or enlarge the image"
                )


class Proposals(NamedTuple):
    """Class and box that every cell proposes in the first stage: `logits` [B, S, K] and `boxes` [B, S, 4], cxcywh."""

    logits: Tensor
    boxes: Tensor


class DecoderStates(NamedTuple):
    """Outputs of the decoder; `hidden` and `references` hold one entry per layer, first layer first."""

    hidden: list[Tensor]
    """The queries [B, Q, C] after the layer."""
    references: list[Tensor]
    """The points [B, Q, 2] or boxes [B, Q, 4] it sampled around, as fractions of the image without its padding."""
    proposals: Proposals | None


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

    Attributes:
        bbox_embed: the detector's box heads, one per layer, where each layer refines the boxes of the one before; else
            None. A two-stage detector has one head more, the last, for its proposals, and gives `class_embed` as well.
    """

    def __init__(self, layers: "list[DeformableTransformerDecoderLayer]") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bbox_embed: nn.ModuleList | None = None
        self.class_embed: nn.ModuleList | None = None

    def forward(
        self, tgt: Tensor, query_pos: Tensor, references: Tensor, memory: Tensor, cells: Cells
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the queries' states [B, Q, C] after each layer, and the references that the layer sampled around."""
        hidden, layer_references = [], []
        for index, layer in enumerate(self.layers):
            tgt = layer(tgt, query_pos, cells.on_levels(references), memory, cells)
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

    def forward(self, tgt: Tensor, query_pos: Tensor, references: Tensor, memory: Tensor, cells: Cells) -> Tensor:
        """Return query states [B, Q, C] after this layer; `references` [B, Q, L, 2 or 4] lie on the padded levels."""
        query = tgt + query_pos
        tgt = self.norm2(tgt + self.dropout(attend(self.self_attn, query, query, tgt)))
        attended = self.cross_attn(tgt + query_pos, references, memory, cells.spatial_shapes, cells.mask)
        tgt = self.norm1(tgt + self.dropout(attended))
        ffn_out = self.linear2(self.dropout(self.activation(self.linear1(tgt))))
        return self.norm3(tgt + self.dropout(ffn_out))


def _in_sequence(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([features.flatten(2).transpose(1, 2) for features in maps], dim=1)
