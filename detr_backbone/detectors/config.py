"""Configuration of a detector, its loss and its post-processing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors.deformable_sampling import Sampling
from detr_backbone.detectors.label_loss import LabelLoss
from detr_backbone.detectors.query_selection import QuerySelection
from detr_backbone.detectors.references import ANCHOR_SIZE
from detr_backbone.errors import ConfigError

READ_BY_ONE = {
    "detr": ("pre_norm", "eos_coef"),
    "deformable_detr": (
        "num_feature_levels",
        "enc_n_points",
        "dec_n_points",
        "with_box_refine",
        "two_stage",
        "anchor_size",
        "query_selection",
        "dn_number",
        "dn_label_noise_ratio",
        "dn_box_noise_scale",
        "label_loss",
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
    publishes another default, the text says so. DINO (https://arxiv.org/abs/2203.03605), sections 3.3 and 3.4, and
    IDEA-Research/DINO.

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
        anchor_size: two-stage only: side of the boxes from which cells of the finest level propose, as a fraction of
            the image; twice as large on every coarser level. Published: 0.05, for small objects.
        query_selection: two-stage only: published; or mixed, as in DINO: learned contents, proposals of the best class,
            and positions from the box in every layer.
        dn_number: mixed query selection only: pairs of noised queries that learn to restore their targets in training
            (contrastive denoising); 0 for none. DINO: 100.
        dn_label_noise_ratio: denoising only: twice the probability that a noised query has a random label.
        dn_box_noise_scale: denoising only: how far a corner of a positive query's box moves at most, in half sides;
            that of a negative one moves up to twice as far. DINO's code: 0.4 for COCO.
        set_cost_class: weight of the class cost in matching; Deformable DETR: 2.
        set_cost_bbox: weight of the L1 cost in matching.
        set_cost_giou: weight of the GIoU cost in matching.
        cls_loss_coef: weight of the label loss; Deformable DETR: 2.
        bbox_loss_coef: weight of the L1 loss.
        giou_loss_coef: weight of the GIoU loss.
        eos_coef: detr only: weight of the class "no object" in the label loss.
        label_loss: deformable_detr only: focal; or mal, the matchability-aware loss of DEIM (arXiv 2412.04234), by
            which scores learn the IoU of their boxes.
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
    anchor_size: float = ANCHOR_SIZE
    query_selection: QuerySelection = "published"
    dn_number: int = 0
    dn_label_noise_ratio: float = 0.5
    dn_box_noise_scale: float = 1.0
    set_cost_class: float = 1.0
    set_cost_bbox: float = 5.0
    set_cost_giou: float = 2.0
    cls_loss_coef: float = 1.0
    bbox_loss_coef: float = 5.0
    giou_loss_coef: float = 2.0
    eos_coef: float = 0.1
    label_loss: LabelLoss = "focal"
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
        self._check_stages(defaults)
        if self.set_cost_class == self.set_cost_bbox == self.set_cost_giou == 0:
            raise ConfigError("one of `set_cost_class`, `set_cost_bbox`, `set_cost_giou` must not be 0, got 0 for all")
        if self.backbone.hidden_dim % self.nheads:
            raise ConfigError(
                f"`nheads` must divide `backbone.hidden_dim` {self.backbone.hidden_dim}, got {self.nheads}"
            )

    def _check_stages(self, defaults: Mapping[str, Any]) -> None:
        needs = [  # the option that is read only where another has a value
            ("anchor_size", "two_stage", True),
            ("query_selection", "two_stage", True),
            ("dn_number", "query_selection", "mixed"),
            ("focal_alpha", "label_loss", "focal"),
        ]
        for key, needed, value in needs:
            if getattr(self, key) != defaults[key] and getattr(self, needed) != value:
                raise ConfigError(
                    f"`{key}` is read with `{needed}` {_yaml(value)} only, got {getattr(self, key)} with "
                    f"{_yaml(getattr(self, needed))}; leave it out, or set `{needed}` to {_yaml(value)}"
                )
        for key in ("dn_label_noise_ratio", "dn_box_noise_scale"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"`{key}` must be within 0 … 1, got {getattr(self, key)}")
            if getattr(self, key) != defaults[key] and not self.dn_number:
                raise ConfigError(
                    f"`{key}` is read with `dn_number` above 0 only, got {getattr(self, key)}; leave it out"
                )
        if self.dn_number < 0:
            raise ConfigError(f"`dn_number` must not be negative, got {self.dn_number}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
