"""A detector, its loss and its post-processing, from one configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from detr_backbone.backbone import BackboneConfig, build_backbone
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.deformable_detr import DeformableDETR
from detr_backbone.detectors.deformable_sampling import Sampling
from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.detr import DETR
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.detectors.postprocess import PostProcess
from detr_backbone.detectors.transformer import Transformer
from detr_backbone.errors import ConfigError

READ_BY_ONE = {
    "detr": ("pre_norm", "eos_coef"),
    "deformable_detr": (
        "num_feature_levels",
        "enc_n_points",
        "dec_n_points",
        "with_box_refine",
        "two_stage",
        "focal_alpha",
        "num_select",
        "sampling",
    ),
}
AT_LEAST_ONE = (
    "num_classes",
    "num_queries",
    "nheads",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "num_feature_levels",
    "enc_n_points",
    "dec_n_points",
    "num_select",
)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """A detector and how it is trained; option names and defaults are those of DETR's published code.

    Sources: DETR (https://arxiv.org/abs/2005.12872, section A.4), facebookresearch/detr `main.py`; Deformable DETR
    (https://arxiv.org/abs/2010.04159, section 5), fundamentalvision/Deformable-DETR `main.py`. Where the latter
    publishes another default, the text says so.

    Args:
        name: detr or deformable_detr.
        backbone: the backbone; its `hidden_dim` is the width of the whole detector.
        num_classes: K, the number of real classes; null until it is set from the training data's categories.
        num_queries: the most objects detected in one image; Deformable DETR: 300.
        nheads: attention heads; divides `hidden_dim`.
        enc_layers: encoder layers.
        dec_layers: decoder layers.
        dim_feedforward: hidden width of the networks in the transformer's layers; Deformable DETR: 1024.
        dropout: fraction of values that the transformer drops in training.
        pre_norm: detr only: LayerNorm before each step instead of after it.
        aux_loss: train the predictions of every decoder layer, not only the last.
        num_feature_levels: deformable_detr only: levels read, the backbone's and coarser ones made from its last; null
            for the backbone's. Published: 4, of which the backbone gives 3.
        enc_n_points: deformable_detr only: sampling points per head and level in the encoder.
        dec_n_points: deformable_detr only: the same in the decoder.
        with_box_refine: deformable_detr only: each decoder layer corrects the boxes of the one before.
        two_stage: deformable_detr only: queries start from the encoder's best proposals; needs `with_box_refine`.
        set_cost_class: weight of the class cost in matching; Deformable DETR: 2.
        set_cost_bbox: weight of the L1 cost in matching.
        set_cost_giou: weight of the GIoU cost in matching.
        cls_loss_coef: weight of the label loss; Deformable DETR: 2.
        bbox_loss_coef: weight of the L1 loss.
        giou_loss_coef: weight of the GIoU loss.
        eos_coef: detr only: weight of the class "no object" in the label loss.
        focal_alpha: deformable_detr only: alpha of the focal label loss.
        num_select: deformable_detr only: detections per image.
        sampling: deformable_detr only: how attention reads values between cells, all with the same result: auto,
            embedding_bag, grid_sample, or ms_deform_attn (needs torch-ms-deform-attn).

    Raises:
        ConfigError: a number is out of range, or an option is set that the named detector does not read.
    """

    name: Literal["detr", "deformable_detr"] = "detr"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int | None = None
    num_queries: int = 100
    nheads: int = 8
    enc_layers: int = 6
    dec_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    aux_loss: bool = True
    num_feature_levels: int | None = None
    enc_n_points: int = 4
    dec_n_points: int = 4
    with_box_refine: bool = False
    two_stage: bool = False
    set_cost_class: float = 1.0
    set_cost_bbox: float = 5.0
    set_cost_giou: float = 2.0
    cls_loss_coef: float = 1.0
    bbox_loss_coef: float = 5.0
    giou_loss_coef: float = 2.0
    eos_coef: float = 0.1
    focal_alpha: float = 0.25
    num_select: int = 100
    sampling: Sampling = "auto"

    def __post_init__(self) -> None:
        if self.name not in READ_BY_ONE:
            raise ConfigError(f"`name` must be one of {list(READ_BY_ONE)}, got {self.name!r}")
        defaults = {option.name: option.default for option in fields(self)}
        for reader, keys in READ_BY_ONE.items():
            for key in keys:
                value = getattr(self, key)
                if reader != self.name and value != defaults[key]:
                    raise ConfigError(
                        f"`{key}` is read by {reader} only, got {value} for {self.name}; leave it out, or set "
                        f"`name` to {reader}"
                    )
        for key in AT_LEAST_ONE:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"`{key}` must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must be at least 0 and below 1, got {self.dropout}")
        if self.with_box_refine and not self.aux_loss and self.dec_layers > 1:
            raise ConfigError(
                "`aux_loss` must be true with `with_box_refine`, got false: box heads before the last would not train"
            )
        if self.set_cost_class == self.set_cost_bbox == self.set_cost_giou == 0:
            raise ConfigError("one of `set_cost_class`, `set_cost_bbox`, `set_cost_giou` must not be 0, got 0 for all")
        if self.backbone.hidden_dim % self.nheads:
            raise ConfigError(
                f"`nheads` must divide `backbone.hidden_dim` {self.backbone.hidden_dim}, got {self.nheads}"
            )


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
            sampling=config.sampling,
        ),
        num_classes=num_classes,
        num_queries=config.num_queries,
        num_feature_levels=num_feature_levels,
        aux_loss=config.aux_loss,
        with_box_refine=config.with_box_refine,
        two_stage=config.two_stage,
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
    return SetCriterion(
        _num_classes(config),
        HungarianMatcher(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou, focal=focal),
        {f"{name}{suffix}": weight for suffix in suffixes for name, weight in weights.items()},
        eos_coef=config.eos_coef,
        focal_alpha=config.focal_alpha if focal else None,
    )


def build_postprocess(config: DetectorConfig, *, category_ids: Sequence[int] | None = None) -> PostProcess:
    """Return the post-processing that turns the outputs of the detector of `config` into detections.

    Args:
        config: the detector.
        category_ids: the dataset's category id of each label; None leaves labels as they are.
    """
    score: Literal["softmax", "sigmoid"] = "softmax" if config.name == "detr" else "sigmoid"
    return PostProcess(score=score, num_select=config.num_select, category_ids=category_ids)


def _num_classes(config: DetectorConfig) -> int:
    if config.num_classes is None:
        raise ConfigError("`num_classes` must be set, got null; it is the number of categories in the training data")
    return config.num_classes
