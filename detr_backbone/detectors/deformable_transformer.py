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

from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.detectors.deformable_layers import (
    DeformableTransformerDecoder,
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoder,
    DeformableTransformerEncoderLayer,
)
from detr_backbone.detectors.deformable_sampling import Sampling
from detr_backbone.detectors.denoising import NoisedQueries
from detr_backbone.detectors.mlp import MLP
from detr_backbone.detectors.precision import outside_autocast
from detr_backbone.detectors.query_selection import (
    QUERY_SELECTIONS,
    Proposals,
    Queries,
    QuerySelection,
    best_boxes,
    propose,
)
from detr_backbone.detectors.references import ANCHOR_SIZE, Cells, box_encoding
from detr_backbone.detectors.transformer import ACTIVATIONS, Activation
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor


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
        anchor_size: two-stage only: side of the boxes that cells of the finest level propose before training, as a
            fraction of the image; it doubles from level to level.
        query_selection: two-stage only: how proposals learn and become queries; see `QUERY_SELECTIONS`.
        sampling: how attention reads values between cells; see `MSDeformAttn`.

    Raises:
        ConfigError: `nhead` does not divide `d_model`, `activation` or `query_selection` is unknown, `sampling` is not
            available, the anchors of a level are larger than the image, or an option is read by two-stage only.

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
        anchor_size: float = ANCHOR_SIZE,
        query_selection: QuerySelection = "published",
        sampling: Sampling = "auto",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"`activation` must be one of {list(ACTIVATIONS)}, got {activation!r}")
        _check_stages(two_stage, anchor_size, query_selection, num_feature_levels)
        self.d_model = d_model
        self.num_feature_levels = num_feature_levels
        self.two_stage = two_stage
        self.two_stage_num_proposals = two_stage_num_proposals
        self.anchor_size = anchor_size
        self.query_selection = query_selection

        def encoder_layer() -> DeformableTransformerEncoderLayer:
            attention = MSDeformAttn(d_model, num_feature_levels, nhead, enc_n_points, sampling=sampling)
            return DeformableTransformerEncoderLayer(attention, dim_feedforward, dropout, activation)

        def decoder_layer() -> DeformableTransformerDecoderLayer:
            attention = MSDeformAttn(d_model, num_feature_levels, nhead, dec_n_points, sampling=sampling)
            return DeformableTransformerDecoderLayer(attention, nhead, dim_feedforward, dropout, activation)

        self.encoder = DeformableTransformerEncoder([encoder_layer() for _ in range(num_encoder_layers)])
        self.decoder = DeformableTransformerDecoder(
            [decoder_layer() for _ in range(num_decoder_layers)],
            MLP(2 * d_model, d_model, d_model, num_layers=2) if query_selection == "mixed" else None,
        )
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
        if query_selection == "mixed":
            self.tgt_embed = nn.Embedding(two_stage_num_proposals, d_model)
        elif two_stage:
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
        if self.query_selection == "mixed":
            nn.init.normal_(self.tgt_embed.weight)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        levels: Sequence[NestedTensor],
        positions: Sequence[Tensor],
        query_embed: Tensor | None = None,
        *,
        propose_padding: bool = False,
        noised: NoisedQueries | None = None,
    ) -> "DecoderStates":
        """Return every query's state after each decoder layer, and the references that the layer sampled around.

        Args:
            levels: features [B, C, h, w] with their masks, finest first.
            positions: [B, C, h, w] of each level.
            query_embed: [Q, 2C], each query's learned position and first content; None if two-stage.
            propose_padding: let padded cells compete for the proposals, as the original code does; then an image's
                proposals depend on the other images of its batch.
            noised: N queries that start from noised targets; they come before the Q others, which do not attend to
                them. Mixed query selection only.

        Raises:
            ValueError: `query_embed` is missing, or `noised` comes without mixed query selection.
        """
        cells = Cells.of(levels)
        src = _in_sequence([level.tensors for level in levels])
        pos = _in_sequence([p + e[:, None, None] for p, e in zip(positions, self.level_embed, strict=True)])
        memory = self.encoder(src, pos, cells)

        proposals = None
        if self.two_stage:
            proposals = self._propose(memory, cells, propose_padding=propose_padding)
            queries = self._selected_queries(proposals, memory.dtype)
        elif query_embed is not None:
            query_pos, tgt = query_embed.expand(src.shape[0], -1, -1).chunk(2, dim=-1)
            queries = Queries(tgt, outside_autocast(self.reference_points, query_pos).sigmoid(), query_pos)
        else:
            raise ValueError("`query_embed` must be [Q, 2C] where the transformer is not two-stage, got None")
        mask = None
        if noised is not None:
            if queries.position is not None:
                raise ValueError("`noised` needs a transformer with `query_selection` 'mixed', got 'published'")
            mask = noised.attention_mask(queries.content.shape[1])
            queries = Queries(
                torch.cat([noised.content, queries.content], dim=1),
                torch.cat([noised.boxes, queries.references], dim=1),
                queries.position,
            )
        hidden, layer_references = self.decoder(queries, memory, cells, mask)
        return DecoderStates(hidden, layer_references, proposals)

    def _propose(self, memory: Tensor, cells: Cells, *, propose_padding: bool) -> Proposals:
        class_embed, bbox_embed = self.decoder.class_embed, self.decoder.bbox_embed
        if class_embed is None or bbox_embed is None:
            raise ValueError("a two-stage transformer needs `decoder.class_embed` and `decoder.bbox_embed`, got None")
        return propose(
            memory,
            cells,
            lambda content: self.enc_output_norm(self.enc_output(content)),
            class_embed[-1],
            bbox_embed[-1],
            anchor_size=self.anchor_size,
            propose_padding=propose_padding,
        )

    def _selected_queries(self, proposals: Proposals, dtype: torch.dtype) -> Queries:
        references = best_boxes(proposals, self.two_stage_num_proposals, self.query_selection)
        if self.query_selection == "mixed":
            content = self.tgt_embed.weight.expand(references.shape[0], -1, -1)
            return Queries(content, references, position=None)
        encoded = box_encoding(references, self.d_model // 2).to(dtype)
        query_pos, tgt = self.pos_trans_norm(self.pos_trans(encoded)).chunk(2, dim=-1)
        return Queries(tgt, references, query_pos)


class DecoderStates(NamedTuple):
    """Outputs of the decoder; `hidden` and `references` hold one entry per layer, first layer first."""

    hidden: list[Tensor]
    """The queries [B, Q, C] after the layer."""
    references: list[Tensor]
    """The points [B, Q, 2] or boxes [B, Q, 4] it sampled around, as fractions of the image without its padding."""
    proposals: Proposals | None


def _in_sequence(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([features.flatten(2).transpose(1, 2) for features in maps], dim=1)


def _check_stages(two_stage: bool, anchor_size: float, query_selection: str, num_feature_levels: int) -> None:
    if query_selection not in QUERY_SELECTIONS:
        raise ConfigError(f"`query_selection` must be one of {list(QUERY_SELECTIONS)}, got {query_selection!r}")
    for name, got, default in (
        ("query_selection", query_selection, "published"),
        ("anchor_size", anchor_size, ANCHOR_SIZE),
    ):
        if not two_stage and got != default:
            raise ConfigError(f"`{name}` must be {default} without `two_stage`, which alone reads it, got {got}")
    largest = anchor_size * 2 ** (num_feature_levels - 1)
    if two_stage and not (anchor_size > 0.01 and largest < 0.99):
        raise ConfigError(
            f"`anchor_size` must be above 0.01 and below {0.99 / 2 ** (num_feature_levels - 1):g}, so that the anchors "
            f"of {num_feature_levels} levels, twice as large on each, fit into the image, got {anchor_size}"
        )
