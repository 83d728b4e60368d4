"""DETR against the numbers that the original code computed: outputs, losses, matches, gradients, detections."""

import pytest
import torch

from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors.build import DetectorConfig, build_criterion, build_detector, build_postprocess
from detr_backbone.position_encoding import PositionEncodingConfig
from tests.parity.drawn import BATCHES, assert_reproduced, drawn_batch, drawn_targets, load_drawn, published

CASES = {
    "detr_r18": {},
    "detr_r18_prenorm": {"pre_norm": True},
    "detr_r18_learned": {"position_encoding": PositionEncodingConfig(type="learned")},
}
ORIGINAL_SIZES = [(480, 640), (333, 500)]
FIRST_STAGE = "backbone.0.body.layer1.0.conv1.weight"


def published_config(case, *, padding="zeros"):
    options = dict(CASES[case])
    encoding = options.pop("position_encoding", PositionEncodingConfig())
    backbone = BackboneConfig(name="resnet18", padding=padding, position_encoding=encoding, hidden_dim=64)
    return DetectorConfig(
        backbone=backbone,
        num_classes=5,
        num_queries=10,
        nheads=4,
        enc_layers=2,
        dec_layers=2,
        dim_feedforward=128,
        dropout=0.0,
        **options,
    )


def everything_computed(config, batch, gradients_of):
    model, criterion = build_detector(config), build_criterion(config)
    load_drawn(model)
    targets = drawn_targets(batch)
    outputs = model(drawn_batch(batch))
    losses = criterion(outputs, targets)
    total = criterion.weighted_sum(losses)
    total.backward()

    parameters = dict(model.named_parameters())
    computed = {
        "pred_logits": outputs["pred_logits"],
        "pred_boxes": outputs["pred_boxes"],
        "aux0_pred_logits": outputs["aux_outputs"][0]["pred_logits"],
        "aux0_pred_boxes": outputs["aux_outputs"][0]["pred_boxes"],
        **losses,
        "total": total,
        "frozen_grad_is_none": parameters[FIRST_STAGE].grad is None,
    }
    computed |= {f"gradnorm/{key}": parameters[key].grad.norm() for key in gradients_of}
    computed |= {f"match{i}": torch.stack(pair) for i, pair in enumerate(criterion.matcher(outputs, targets))}
    detections = build_postprocess(config)(outputs, ORIGINAL_SIZES[: len(targets)])
    return computed | {f"post{i}_{what}": value for i, found in enumerate(detections) for what, value in found.items()}


def keys_with_gradients(prefix):
    start = f"{prefix}gradnorm/"
    return [name.removeprefix(start) for name in published("detr") if name.startswith(start)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_detr_computes_what_the_original_computed(case: str, batch: str) -> None:
    prefix = f"{case}/{batch}/"

    computed = everything_computed(published_config(case), batch, keys_with_gradients(prefix))

    assert_reproduced("detr", prefix, computed)


@pytest.mark.parametrize("case", CASES)
def test_exact_padding_agrees_with_the_original_where_nothing_is_padded(case: str) -> None:
    prefix = f"{case}/odd/"

    computed = everything_computed(published_config(case, padding="exact"), "odd", keys_with_gradients(prefix))

    assert_reproduced("detr", prefix, computed)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_keys_are_the_published_ones(case: str) -> None:
    assert sorted(build_detector(published_config(case)).state_dict()) == published("detr")[f"{case}/keys"].tolist()


def test_no_published_array_is_left_out() -> None:
    reproduced = {f"{case}/{what}" for case in CASES for what in (*BATCHES, "keys")}

    left = {"/".join(name.split("/")[:2]) for name in published("detr")} - reproduced

    assert {name for name in left if not name.startswith("backbone_")} == set()
