"""From a configuration to a detector, its loss and its post-processing; and every contradiction refused."""

from dataclasses import replace

import pytest
import torch

from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors import (
    DETR,
    DeformableDETR,
    DetectorConfig,
    build_criterion,
    build_detector,
    build_postprocess,
)
from detr_backbone.errors import ConfigError
from detr_backbone.position_encoding import PositionEncodingConfig

SMALL = {"num_classes": 3, "num_queries": 5, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32}
DEFORMABLE = SMALL | {"name": "deformable_detr", "enc_n_points": 2, "dec_n_points": 2}
MIXED = DEFORMABLE | {"with_box_refine": True, "two_stage": True, "query_selection": "mixed", "anchor_size": 0.25}
REFINED = {"name": "deformable_detr", "with_box_refine": True}
TARGETS = [
    {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.5]])},
    {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
]


def backbone(*layers, **options):
    return BackboneConfig(name="resnet18", return_layers=layers or ("layer4",), **({"hidden_dim": 32} | options))


def images():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 64, 48, generator=g), torch.randn(3, 40, 64, generator=g)]


@pytest.mark.parametrize(
    "config",
    [
        DetectorConfig(**SMALL, backbone=backbone()),
        DetectorConfig(**SMALL, backbone=backbone(), pre_norm=True, aux_loss=False),
        DetectorConfig(
            **SMALL,
            backbone=backbone("layer3", "layer4", position_encoding=PositionEncodingConfig(type="learned")),
        ),
        DetectorConfig(**DEFORMABLE, backbone=backbone()),
        DetectorConfig(**DEFORMABLE, backbone=backbone("layer3", "layer4"), num_feature_levels=3, with_box_refine=True),
        DetectorConfig(
            **DEFORMABLE, backbone=backbone("layer3", "layer4", hidden_dim=64), with_box_refine=True, two_stage=True
        ),
        DetectorConfig(**DEFORMABLE, backbone=backbone(), aux_loss=False),
        DetectorConfig(**MIXED, backbone=backbone("layer3", "layer4"), label_loss="mal"),
        DetectorConfig(**MIXED, backbone=backbone("layer3", "layer4"), dn_number=4),
    ],
    ids=[
        *("detr", "pre_norm", "learned_two_levels", "deformable", "refine_extra_level", "two_stage", "no_aux_loss"),
        *("mixed", "denoising"),
    ],
)
def test_the_losses_of_every_detector_reach_every_weight_that_trains(config: DetectorConfig) -> None:
    torch.manual_seed(0)
    model, criterion = build_detector(config), build_criterion(config)

    losses = criterion(model(images(), TARGETS), TARGETS)
    criterion.weighted_sum(losses).backward()

    assert set(criterion.weight_dict) == {name for name in losses if name.startswith("loss_")}
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_deformable_detr_reads_the_levels_of_its_backbone_unless_told_otherwise() -> None:
    config = DetectorConfig(**DEFORMABLE, backbone=backbone("layer3", "layer4"))

    assert len(build_detector(config).input_proj) == 2
    assert len(build_detector(replace(config, num_feature_levels=4)).input_proj) == 4


def test_the_name_decides_the_class() -> None:
    assert isinstance(build_detector(DetectorConfig(**SMALL, backbone=backbone())), DETR)
    assert isinstance(build_detector(DetectorConfig(**DEFORMABLE, backbone=backbone())), DeformableDETR)


def test_detr_matches_and_scores_by_softmax_with_a_class_for_no_object() -> None:
    config = DetectorConfig(**SMALL, eos_coef=0.3)
    criterion = build_criterion(config)

    assert not criterion.matcher.focal
    assert criterion.label_loss == "cross_entropy"
    torch.testing.assert_close(criterion.class_weight, torch.tensor([1, 1, 1, 0.3]))
    assert build_postprocess(config).score == "softmax"


def test_deformable_detr_matches_and_scores_by_sigmoid() -> None:
    config = DetectorConfig(**DEFORMABLE, focal_alpha=0.5, num_select=7)
    criterion, postprocess = build_criterion(config), build_postprocess(config)

    assert criterion.matcher.focal
    assert (criterion.label_loss, criterion.focal_alpha) == ("focal", 0.5)
    assert (postprocess.score, postprocess.num_select) == ("sigmoid", 7)


def test_weights_and_costs_come_from_the_configuration() -> None:
    options = {"set_cost_class": 2.0, "set_cost_bbox": 3.0, "set_cost_giou": 4.0}
    losses = {"cls_loss_coef": 5.0, "bbox_loss_coef": 6.0, "giou_loss_coef": 7.0}
    criterion = build_criterion(DetectorConfig(**SMALL, **options, **losses))

    matcher = criterion.matcher
    assert (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou) == (2, 3, 4)
    base = {"loss_ce": 5, "loss_bbox": 6, "loss_giou": 7}
    assert criterion.weight_dict == base | {f"{name}_0": weight for name, weight in base.items()}


def test_every_layer_and_stage_that_is_compared_has_weights() -> None:
    losses = build_criterion(DetectorConfig(**MIXED, dn_number=4)).weight_dict

    stages = ("", "_0", "_enc", "_dn", "_dn_0")
    assert set(losses) == {f"loss_{what}{stage}" for what in ("ce", "bbox", "giou") for stage in stages}


def test_the_options_of_two_stages_reach_the_transformer_the_noise_and_the_losses() -> None:
    noise = {"dn_number": 9, "dn_label_noise_ratio": 0.25, "dn_box_noise_scale": 0.5}
    config = DetectorConfig(**MIXED, **noise, label_loss="mal", backbone=backbone("layer4"))
    model, criterion = build_detector(config), build_criterion(config)

    assert (model.transformer.query_selection, model.transformer.anchor_size) == ("mixed", 0.25)
    denoising = model.denoising
    assert (denoising.number, denoising.label_noise_ratio, denoising.box_noise_scale) == (9, 0.25, 0.5)
    assert (criterion.label_loss, criterion.classless_proposals) == ("mal", False)
    assert build_criterion(DetectorConfig(**DEFORMABLE)).classless_proposals


def test_category_ids_reach_the_post_processing() -> None:
    outputs = {"pred_logits": torch.zeros(1, 1, 4), "pred_boxes": torch.full((1, 1, 4), 0.5)}

    [found] = build_postprocess(DetectorConfig(**SMALL), category_ids=[7, 8, 9])(outputs, [(10, 10)])

    assert found["labels"].tolist() == [7]


@pytest.mark.parametrize("build", [build_detector, build_criterion])
def test_the_number_of_classes_must_be_set_before_building(build) -> None:
    with pytest.raises(ConfigError, match="`num_classes` must be set, got null"):
        build(DetectorConfig(backbone=backbone()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "deformable_detr", "with_box_refine": True, "aux_loss": False},
            "`aux_loss` must be true with `with_box_refine`, got false",
        ),
        ({"two_stage": True}, "`two_stage` is read by deformable_detr only, got True for detr; leave it out, or set"),
        ({"num_feature_levels": 4}, "`num_feature_levels` is read by deformable_detr only, got 4 for detr"),
        ({"focal_alpha": 0.5}, "`focal_alpha` is read by deformable_detr only"),
        ({"num_select": 300}, "`num_select` is read by deformable_detr only"),
        (
            {"name": "deformable_detr", "pre_norm": True},
            "`pre_norm` is read by detr only, got True for deformable_detr",
        ),
        ({"name": "deformable_detr", "eos_coef": 0.2}, "`eos_coef` is read by detr only"),
        ({"name": "dino"}, r"`name` must be one of \['detr', 'deformable_detr'\], got 'dino'"),
        ({"nheads": 7}, "`nheads` must divide `backbone.hidden_dim` 256, got 7"),
        ({"num_queries": 0}, "`num_queries` must be at least 1, got 0"),
        ({"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0"),
        ({"label_loss": "mal"}, "`label_loss` is read by deformable_detr only"),
        (REFINED | {"anchor_size": 0.2}, "`anchor_size` is read with `two_stage` true only, got 0.2 with false"),
        (
            REFINED | {"query_selection": "mixed"},
            "`query_selection` is read with `two_stage` true only, got mixed with",
        ),
        (
            REFINED | {"two_stage": True, "dn_number": 100},
            "`dn_number` is read with `query_selection` mixed only, got 100 with published; leave it out, or set",
        ),
        (
            REFINED | {"dn_label_noise_ratio": 0.2},
            "`dn_label_noise_ratio` is read with `dn_number` above 0 only, got 0.2",
        ),
        (MIXED | {"dn_number": 9, "dn_box_noise_scale": 1.5}, "`dn_box_noise_scale` must be within 0 … 1, got 1.5"),
        (MIXED | {"dn_number": -1}, "`dn_number` must not be negative, got -1"),
        (
            REFINED | {"label_loss": "mal", "focal_alpha": 0.5},
            "`focal_alpha` is read with `label_loss` focal only, got 0.5 with mal",
        ),
        ({"set_cost_class": 0, "set_cost_bbox": 0, "set_cost_giou": 0}, "must not be 0, got 0 for all"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectorConfig(**options)


def test_what_a_part_refuses_is_refused_when_building() -> None:
    config = DetectorConfig(**DEFORMABLE, backbone=backbone("layer3", "layer4"))

    with pytest.raises(ConfigError, match="`num_feature_levels` must be at least the 2 levels of `backbone`, got 1"):
        build_detector(replace(config, num_feature_levels=1))
    with pytest.raises(ConfigError, match="`two_stage` needs `with_box_refine`"):
        build_detector(replace(config, two_stage=True))
    with pytest.raises(ConfigError, match=r"`anchor_size` must be above 0\.01 and below 0\.495"):
        build_detector(replace(config, two_stage=True, with_box_refine=True, anchor_size=0.5))
