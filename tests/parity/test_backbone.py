"""The backbone computes what the original DETR's backbone computed, padding leak and mask rounding included."""

from functools import cache
from typing import Any

import pytest
import torch

from detr_backbone import BackboneConfig, Joiner, build_backbone
from tests.parity.drawn import BATCHES, assert_reproduced, drawn_batch, load_drawn, published

STAGES = ("layer1", "layer2", "layer3", "layer4")
CASES: dict[str, dict[str, Any]] = {
    "backbone_r18_all": {"name": "resnet18", "return_layers": STAGES},
    "backbone_r50_layer4": {"name": "resnet50"},
    "backbone_r50_dc5": {"name": "resnet50", "dilation": True},
}
RUNS = [(batch, "zeros") for batch in BATCHES] + [("odd", "exact")]  # without padding every mode must agree


@cache
def backbone_of(case: str, padding: str) -> Joiner:
    config = BackboneConfig(hidden_dim=32, padding=padding, **CASES[case])  # type: ignore[arg-type]
    joiner = build_backbone(config)
    load_drawn(joiner)
    return joiner.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("batch", "padding"), RUNS)
def test_levels_masks_and_positions_are_the_published_ones(case: str, batch: str, padding: str) -> None:
    with torch.no_grad():
        features, positions = backbone_of(case, padding)(drawn_batch(batch))
    computed = {}
    for level, (feature, position) in enumerate(zip(features, positions, strict=True)):
        numbers = feature.tensors.double()
        computed |= {
            f"{level}/features8": feature.tensors[:, :8],
            f"{level}/mean_std": torch.stack([numbers.mean(), numbers.std()]),
            f"{level}/mask": feature.mask,
            f"{level}/pos": position,
        }

    assert_reproduced("detr", f"{case}/{batch}/", computed)


def test_no_published_array_of_a_backbone_is_left_out() -> None:
    published_runs = {tuple(name.split("/")[:2]) for name in published("detr") if name.startswith("backbone_")}

    assert published_runs == {(case, batch) for case in CASES for batch in BATCHES}
