"""Deformable DETR: a backbone's levels and coarser ones made from them, a deformable transformer, and two heads.

Source: "Deformable DETR" (https://arxiv.org/abs/2010.04159), section 4 and the appendix.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.backbone import Joiner
from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.denoising import ContrastiveDenoising, NoisedQueries
from detr_backbone.detectors.matcher import Target
from detr_backbone.detectors.mlp import MLP
from detr_backbone.detectors.precision import at_least_float32, outside_autocast
from detr_backbone.detectors.references import refine
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, as_nested_tensor
from detr_backbone.padding.exact import feature_level

GROUPS = 32
PRIOR_PROBABILITY = 0.01
"""Score of every class before training, so that the many empty queries do not drown the loss (arXiv 1708.02002)."""


class DeformableDETR(nn.Module):
    """Deformable DETR: images in; for each of Q queries a logit per class and a box out.

    Where the backbone pads exactly, so does the detector: an image gives the same predictions alone and in any batch.

    Args:
        backbone: gives features and positions; all its levels are read.
        transformer: built for the same levels and stages.
        num_classes: K; a logit each for a sigmoid, none for "no object".
        num_queries: Q, the most objects detected in one image.
        num_feature_levels: levels that the transformer reads; those that the backbone lacks are made by convolutions of
            stride 2, the first from the backbone's coarsest level, each other from the one before.
        aux_loss: also give the predictions of every decoder layer but the last.
        with_box_refine: each decoder layer corrects the boxes of the one before, with heads of its own.
        two_stage: the queries are the best of the boxes that every cell proposes.
        denoising: in training, also decode queries that start from noised targets; needs a transformer with mixed query
            selection.

    Attributes:
        strides: image pixels per cell of each level, finest first.

    Raises:
        ConfigError: the backbone has more levels than `num_feature_levels`, an option contradicts the transformer's, or
            `two_stage` without `with_box_refine`, or `denoising` without mixed query selection.
    """

    def __init__(
        self,
        backbone: Joiner,
        transformer: DeformableTransformer,
        *,
        num_classes: int,
        num_queries: int,
        num_feature_levels: int,
        aux_loss: bool = True,
        with_box_refine: bool = False,
        two_stage: bool = False,
        denoising: ContrastiveDenoising | None = None,
    ) -> None:
        super().__init__()
        _check_options(
            backbone,
            transformer,
            num_queries=num_queries,
            num_feature_levels=num_feature_levels,
            with_box_refine=with_box_refine,
            two_stage=two_stage,
        )
        if denoising is not None and transformer.query_selection != "mixed":
            raise ConfigError(
                f"`denoising` needs a transformer with `query_selection` 'mixed', got {transformer.query_selection!r}"
            )
        width = transformer.d_model
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        class_embed = nn.Linear(width, num_classes)
        nn.init.constant_(class_embed.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        bbox_embed = MLP(width, width, output_dim=4, num_layers=3)
        for parameter in bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)
        heads = len(transformer.decoder.layers) + two_stage
        # Published optimizer states number parameters in this order.
        self.transformer = transformer
        self.class_embed = _heads(class_embed, heads, shared=not with_box_refine)
        self.bbox_embed = _heads(bbox_embed, heads, shared=not with_box_refine)
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * width)
        extra = num_feature_levels - len(backbone.channels)
        projections = [_projection(channels, width) for channels in backbone.channels]
        for channels in [backbone.channels[-1], *[width] * extra][:extra]:
            projections.append(_projection(channels, width, kernel_size=3, stride=2))
        self.input_proj = nn.ModuleList(projections)
        self.strides = (*backbone.strides, *(backbone.strides[-1] * 2 ** (n + 1) for n in range(extra)))
        self.backbone = backbone
        self.denoising = denoising

        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed
        else:
            # Widths and heights start from sigmoid(-2) = 0.12; proposals bring their own.
            with torch.no_grad():
                self.bbox_embed[0].get_parameter("layers.2.bias")[2:] = -2.0

    def forward(
        self, images: NestedTensor | Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Any]:
        """Return predictions for every query.

        Args:
            images: a NestedTensor, a list of [3, h, w], or a batch [B, 3, H, W] without padding: RGB in 0 .. 1 minus
                mean, divided by std, as the backbone's weights expect it.
            targets: as `SetCriterion` takes them; read in training with `denoising` only.

        Returns:
            `pred_logits` [B, Q, K]; `pred_boxes` [B, Q, 4], (cx, cy, w, h) as fractions of the image without its
            padding; with `aux_loss` also `aux_outputs`, a list of such dicts, first decoder layer first; if two-stage
            also `enc_outputs`, such a dict for the proposals of all cells; in training with `denoising` also
            `dn_outputs`, such dicts for N noised queries, and in it `groups` and `valid` of `NoisedQueries`.

        Raises:
            ValueError: an image has no valid cell, or `targets` are missing.
        """
        images = as_nested_tensor(images)
        noised = self._noised(targets)
        levels, positions = self._levels(images)
        states = self.transformer(
            levels,
            positions,
            None if self.query_embed is None else self.query_embed.weight,
            propose_padding=self.backbone.padding == "zeros",
            noised=noised,
        )
        predictions = [
            {
                "pred_logits": outside_autocast(self.class_embed[layer], hidden),
                "pred_boxes": refine(references, outside_autocast(self.bbox_embed[layer], hidden)),
            }
            for layer, (hidden, references) in enumerate(zip(states.hidden, states.references, strict=True))
            if self.aux_loss or layer == len(states.hidden) - 1
        ]
        of_noised: list[dict[str, Tensor]] = []
        if noised is not None:
            of_noised, predictions = _split(predictions, noised.valid.shape[1])
        outputs = self._with_earlier_layers(predictions)
        if noised is not None:
            outputs["dn_outputs"] = {
                **self._with_earlier_layers(of_noised),
                "groups": noised.groups,
                "valid": noised.valid,
            }
        if states.proposals is not None:
            outputs["enc_outputs"] = {"pred_logits": states.proposals.logits, "pred_boxes": states.proposals.boxes}
        return outputs

    def _noised(self, targets: Sequence[Target] | None) -> NoisedQueries | None:
        if self.denoising is None or not self.training:
            return None
        if targets is None:
            raise ValueError("`targets` must be given in training with `denoising`, got None")
        return self.denoising(targets)

    def _with_earlier_layers(self, predictions: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        outputs: dict[str, Any] = dict(predictions[-1])
        if self.aux_loss:
            outputs["aux_outputs"] = predictions[:-1]
        return outputs

    def _levels(self, images: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return every level at the transformer's width, and its positions."""
        if not torch.compiler.is_compiling():
            _ = images.sizes  # refuses an image that is padding only, and padding above or left of an image
        features, positions = self.backbone(images)
        sources = [*features, features[-1]]
        levels: list[NestedTensor] = []
        for index, (projection, stride) in enumerate(zip(self.input_proj, self.strides, strict=True)):
            source = sources[index] if index < len(sources) else levels[-1]
            convolution, norm = projection.children()
            level = feature_level(convolution(source.tensors), images, stride=stride, padding=self.backbone.padding)
            exact = self.backbone.padding == "exact" and level.is_padded
            level.tensors = norm(level.tensors, ~level.mask if exact else None)
            levels.append(level)
        extra = levels[len(features) :]
        return levels, [*positions, *(self.backbone[1](level).to(level.tensors.dtype) for level in extra)]


class ValidGroupNorm(nn.GroupNorm):
    """GroupNorm that can leave padding out of its statistics."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return x normalised [B, C, h, w]; with `valid` [B, h, w] only those cells count, and others become zeros."""
        if valid is None:
            # F.group_norm would refuse one cell with one channel per group, but only where it is alone in its batch.
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped = at_least_float32(x).view(x.shape[0], self.num_groups, -1, *x.shape[2:])
        weight = valid / (valid.sum(dim=(1, 2), keepdim=True) * grouped.shape[2])
        weight = weight[:, None, None]
        centred = grouped - (grouped * weight).sum(dim=(2, 3, 4), keepdim=True)
        variance = (centred.square() * weight).sum(dim=(2, 3, 4), keepdim=True)
        normed = (centred * (variance + self.eps).rsqrt()).view_as(x)
        normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.masked_fill(~valid[:, None], 0).to(self.weight.dtype)


def _split(
    predictions: Sequence[dict[str, Tensor]], count: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return the predictions of the first `count` queries and those of the others, layer by layer."""
    first = [{name: tensor[:, :count] for name, tensor in layer.items()} for layer in predictions]
    return first, [{name: tensor[:, count:] for name, tensor in layer.items()} for layer in predictions]


def _projection(in_channels: int, out_channels: int, *, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return nn.Sequential(convolution, ValidGroupNorm(GROUPS, out_channels))


def _heads(head: nn.Module, count: int, *, shared: bool) -> nn.ModuleList:
    """Return a head for each use: one shared module, or independent copies."""
    return nn.ModuleList(head if shared else copy.deepcopy(head) for _ in range(count))


def _check_options(
    backbone: Joiner,
    transformer: DeformableTransformer,
    *,
    num_queries: int,
    num_feature_levels: int,
    with_box_refine: bool,
    two_stage: bool,
) -> None:
    if num_feature_levels < len(backbone.channels):
        raise ConfigError(
            f"`num_feature_levels` must be at least the {len(backbone.channels)} levels of `backbone`, got "
            f"{num_feature_levels}"
        )
    if transformer.d_model % GROUPS:
        raise ConfigError(
            f"`d_model` must be a multiple of the {GROUPS} groups of GroupNorm, got {transformer.d_model}"
        )
    if two_stage and not with_box_refine:
        raise ConfigError("`two_stage` needs `with_box_refine`, as its proposals are boxes to be refined; got False")
    same = [
        ("num_feature_levels", num_feature_levels, transformer.num_feature_levels),
        ("two_stage", two_stage, transformer.two_stage),
    ]
    if two_stage:
        same.append(("num_queries", num_queries, transformer.two_stage_num_proposals))
    for name, got, expected in same:
        if got != expected:
            raise ConfigError(f"`{name}` must be what the transformer was built for, {expected}, got {got}")
