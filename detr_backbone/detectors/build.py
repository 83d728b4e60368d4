"""A detector, its loss and its post-processing, from one configuration."""

from collections.abc import Sequence
from typing import Literal

from detr_backbone.backbone import build_backbone
from detr_backbone.detectors.config import DetectorConfig
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.deformable_detr import DeformableDETR
from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.denoising import ContrastiveDenoising
from detr_backbone.detectors.detr import DETR
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.detectors.postprocess import PostProcess
from detr_backbone.detectors.transformer import Transformer
from detr_backbone.errors import ConfigError


def build_detector(config: DetectorConfig) -> DETR | DeformableDETR:
    """Return the detector that `config` describes, with fresh weights outside the backbone.

    Raises:
        ConfigError: `num_classes` is not set, or a part cannot be built.
        WeightsError: the backbone's weights cannot be loaded completely.
    """
    num_classes = _num_classes(config)
    backbone = build_backbone(config.backbone)
    if config.name == "detr":
        return DETR(
            backbone,
            Transformer(
                d_model=config.backbone.hidden_dim,
                nhead=config.nheads,
                num_encoder_layers=config.enc_layers,
                num_decoder_layers=config.dec_layers,
                dim_feedforward=config.dim_feedforward,
                dropout=config.dropout,
                normalize_before=config.pre_norm,
                return_intermediate_dec=config.aux_loss,
            ),
            num_classes=num_classes,
            num_queries=config.num_queries,
            aux_loss=config.aux_loss,
        )
    num_feature_levels = config.num_feature_levels or len(backbone.channels)
    return DeformableDETR(
        backbone,
        DeformableTransformer(
            d_model=config.backbone.hidden_dim,
            nhead=config.nheads,
            num_encoder_layers=config.enc_layers,
            num_decoder_layers=config.dec_layers,
            dim_feedforward=config.dim_feedforward,
            dropout=config.dropout,
            num_feature_levels=num_feature_levels,
            enc_n_points=config.enc_n_points,
            dec_n_points=config.dec_n_points,
            two_stage=config.two_stage,
            two_stage_num_proposals=config.num_queries,
            anchor_size=config.anchor_size,
            query_selection=config.query_selection,
            sampling=config.sampling,
        ),
        num_classes=num_classes,
        num_queries=config.num_queries,
        num_feature_levels=num_feature_levels,
        aux_loss=config.aux_loss,
        with_box_refine=config.with_box_refine,
        two_stage=config.two_stage,
        denoising=_denoising(config, num_classes),
    )


def build_criterion(config: DetectorConfig) -> SetCriterion:
    """Return the loss that trains the detector of `config`, with a weight for every decoder layer it compares.

    Raises:
        ConfigError: `num_classes` is not set.
    """
    focal = config.name == "deformable_detr"
    weights = {
        "loss_ce": config.cls_loss_coef,
        "loss_bbox": config.bbox_loss_coef,
        "loss_giou": config.giou_loss_coef,
    }
    suffixes = ["", *(f"_{layer}" for layer in range(config.dec_layers - 1) if config.aux_loss)]
    if config.two_stage:
        suffixes.append("_enc")
    if config.dn_number:
        suffixes += [f"_dn{suffix}" for suffix in suffixes if suffix != "_enc"]
    return SetCriterion(
        _num_classes(config),
        HungarianMatcher(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou, focal=focal),
        {f"{name}{suffix}": weight for suffix in suffixes for name, weight in weights.items()},
        label_loss=config.label_loss if focal else "cross_entropy",
        eos_coef=config.eos_coef,
        focal_alpha=config.focal_alpha,
        classless_proposals=config.query_selection == "published",
    )


def build_postprocess(config: DetectorConfig, *, category_ids: Sequence[int] | None = None) -> PostProcess:
    """Return the post-processing that turns the outputs of the detector of `config` into detections.

    Args:
        config: the detector.
        category_ids: the dataset's category id of each label; None leaves labels as they are.
    """
    score: Literal["softmax", "sigmoid"] = "softmax" if config.name == "detr" else "sigmoid"
    return PostProcess(score=score, num_select=config.num_select, category_ids=category_ids)


def _denoising(config: DetectorConfig, num_classes: int) -> ContrastiveDenoising | None:
    if not config.dn_number:
        return None
    return ContrastiveDenoising(
        num_classes,
        config.backbone.hidden_dim,
        number=config.dn_number,
        label_noise_ratio=config.dn_label_noise_ratio,
        box_noise_scale=config.dn_box_noise_scale,
    )


def _num_classes(config: DetectorConfig) -> int:
    if config.num_classes is None:
        raise ConfigError("`num_classes` must be set, got null; it is the number of categories in the training data")
    return config.num_classes
