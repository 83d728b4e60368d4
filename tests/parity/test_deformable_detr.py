"""Deformable DETR against the numbers that the original code computed: outputs, losses, gradients."""

import functools

import pytest
import torch

from detr_backbone import NestedTensor
from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors.build import DetectorConfig, build_criterion, build_detector
from detr_backbone.position_encoding import PositionEncodingConfig
from tests.parity.drawn import BATCHES, assert_reproduced, drawn_batch, drawn_targets, load_drawn, published

# Its gradient sums over every ReLU above, so an activation that rounds to the other side of zero moves it. In float64
# this norm comes out up to 2.9e-4 away from the published float32 one. All other numbers agree within 1e-4, and on AMD
# processors this one too where BatchNorm rounds its product before it adds, as the original does and our fused one does
# not; on an Intel processor with AMX it is up to 2.8e-4 off even then.
EARLY_GRADIENT = "gradnorm/backbone.0.body.layer2.0.conv1.weight"

CASES = {
    "deformable_r50_single": {"num_feature_levels": 1},
    "deformable_r50": {},
    "deformable_r50_refine": {"with_box_refine": True},
    "deformable_r50_two_stage": {"with_box_refine": True, "two_stage": True},
}


def published_config(case, *, padding="zeros"):
    options = {"num_feature_levels": 4} | CASES[case]
    backbone = BackboneConfig(
        return_layers=("layer4",) if options["num_feature_levels"] == 1 else ("layer2", "layer3", "layer4"),
        padding=padding,
        position_encoding=PositionEncodingConfig(offset=-0.5),
        hidden_dim=256 if "two_stage" in options else 64,
    )
    return DetectorConfig(
        name="deformable_detr",
        backbone=backbone,
        num_classes=5,
        num_queries=10,
        nheads=4,
        enc_layers=2,
        dec_layers=2,
        dim_feedforward=128,
        dropout=0.0,
        set_cost_class=2.0,
        cls_loss_coef=2.0,
        **options,
    )


@functools.lru_cache(maxsize=1)
def drawn_detector(case, padding):
    detector = build_detector(published_config(case, padding=padding))
    load_drawn(detector)
    return detector


def everything_computed(case, batch, *, padding="zeros", dtype=torch.float32):
    detector, criterion = drawn_detector(case, padding).to(dtype), build_criterion(published_config(case))
    detector.zero_grad()
    images = drawn_batch(batch)
    outputs = detector(NestedTensor(images.tensors.to(dtype), images.mask))
    losses = criterion(outputs, [target | {"boxes": target["boxes"].to(dtype)} for target in drawn_targets(batch)])
    total = criterion.weighted_sum(losses)
    total.backward()

    predictions = {"": outputs, "aux0_": outputs["aux_outputs"][0], "enc_": outputs.get("enc_outputs", {})}
    computed = {**losses, "total": total}
    for part, values in predictions.items():
        computed |= {f"{part}{what}": value for what, value in values.items() if what.startswith("pred_")}
    start = f"{case}/{batch}/gradnorm/"
    keys = [name.removeprefix(start) for name in published("deformable_detr") if name.startswith(start)]
    return computed | {f"gradnorm/{key}": detector.get_parameter(key).grad.norm() for key in keys}


def assert_all_reproduced(case, batch, computed):
    assert_reproduced("deformable_detr", f"{case}/{batch}/", computed, looser={EARLY_GRADIENT: 5e-4})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_deformable_detr_computes_what_the_original_computed(case: str, batch: str) -> None:
    assert_all_reproduced(case, batch, everything_computed(case, batch))


@pytest.mark.parametrize("case", CASES)
def test_the_early_gradient_is_as_far_from_the_original_as_rounding_takes_it(case: str) -> None:
    computed = everything_computed(case, "oddpadded", dtype=torch.float64)

    assert_reproduced("deformable_detr", f"{case}/oddpadded/", computed, looser={EARLY_GRADIENT: 2.9e-4})


@pytest.mark.parametrize("case", CASES)
def test_exact_padding_agrees_with_the_original_where_nothing_is_padded(case: str) -> None:
    assert_all_reproduced(case, "odd", everything_computed(case, "odd", padding="exact"))


@pytest.mark.parametrize("case", CASES)
def test_state_dict_keys_are_the_published_ones(case: str) -> None:
    expected = published("deformable_detr")[f"{case}/keys"].tolist()

    assert sorted(build_detector(published_config(case)).state_dict()) == expected


def test_no_published_array_is_left_out() -> None:
    reproduced = {f"{case}/{what}" for case in CASES for what in (*BATCHES, "keys")}

    assert {"/".join(name.split("/")[:2]) for name in published("deformable_detr")} == reproduced
