"""What detectors look at, collected without changing what they compute."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from detr_backbone import BackboneConfig
from detr_backbone.detectors import DetectorConfig, build_detector, record_attention, record_samples

SMALL = {"num_classes": 3, "num_queries": 5, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32}


def detector(name: str, **options: Any) -> nn.Module:
    levels = ("layer4",) if name == "detr" else ("layer3", "layer4")
    backbone = BackboneConfig(name="resnet18", hidden_dim=32, return_layers=levels)
    return build_detector(DetectorConfig(name=name, backbone=backbone, **SMALL, **options)).eval()


@pytest.fixture
def images() -> list[torch.Tensor]:
    return [torch.rand(3, 96, 64), torch.rand(3, 64, 128)]  # 3 x 2 and 2 x 4 of 3 x 4 cells with stride 32


@torch.no_grad()
def test_attention_sums_to_one_over_the_valid_cells_and_is_nothing_on_padding(images: list[torch.Tensor]) -> None:
    model = detector("detr")
    with record_attention(model) as weights:
        model(images)
    looks = weights["transformer.decoder.layers.1.multihead_attn"].unflatten(-1, (3, 4))

    assert looks.shape == (2, 4, 5, 3, 4)
    for look, (h, w) in zip(looks, [(3, 2), (2, 4)], strict=True):
        torch.testing.assert_close(look[..., :h, :w].sum((-2, -1)), torch.ones(4, 5))
        assert look.count_nonzero() == 4 * 5 * h * w


def test_attention_is_the_softmax_of_scaled_products() -> None:
    attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
    query, key = torch.rand(1, 3, 8), torch.rand(1, 5, 8)
    with record_attention(attention) as weights:
        attention(query, key, key, need_weights=False)
    q, k, _ = attention.in_proj_weight.split(8)

    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        by_hand = ((query @ q[part].T) @ (key @ k[part].T).mT / 2).softmax(-1)  # 2 is the root of 4 channels
        torch.testing.assert_close(weights[""][:, head], by_hand)


@torch.no_grad()
@pytest.mark.parametrize("with_box_refine", [False, True])
def test_locations_and_references_are_fractions_of_the_image_whatever_its_batch(
    images: list[torch.Tensor], *, with_box_refine: bool
) -> None:
    model = detector("deformable_detr", with_box_refine=with_box_refine)
    with record_samples(model) as together:
        model(images)
    with record_samples(model) as alone:
        model(images[:1])
    last = "transformer.decoder.layers.1.cross_attn"

    assert together[last].locations.shape == (2, 5, 4, 2, 4, 2)
    assert together[last].references.shape == (2, 5, 4 if with_box_refine else 2)
    for padded, bare in zip(together[last], alone[last], strict=True):
        torch.testing.assert_close(padded[:1], bare, atol=1e-5, rtol=1e-4)  # sums in another order


@torch.no_grad()
def test_the_points_are_those_that_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector("deformable_detr")
    seen = []

    def sample(
        value: Any, shapes: Any, locations: torch.Tensor, weights: torch.Tensor, *, sampling: str
    ) -> torch.Tensor:
        seen.append((locations, weights))
        return value[:, : locations.shape[1]].flatten(2)

    monkeypatch.setattr("detr_backbone.detectors.deformable_attention.multi_scale_deformable_attention", sample)
    with record_samples(model) as samples:
        model(torch.rand(1, 3, 64, 96))

    assert len(seen) == len(samples) == 3
    for (locations, weights), recorded in zip(seen, samples.values(), strict=True):
        torch.testing.assert_close(recorded.locations, locations)
        torch.testing.assert_close(recorded.weights, weights)


@torch.no_grad()
@pytest.mark.parametrize(("name", "record"), [("detr", record_attention), ("deformable_detr", record_samples)])
def test_outputs_are_the_same_and_no_hook_stays(
    name: str, record: Callable[[nn.Module], AbstractContextManager[Any]], images: list[torch.Tensor]
) -> None:
    model = detector(name)
    expected = model(images)
    with record(model):
        outputs = model(images)

    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(outputs[key], expected[key], atol=1e-5, rtol=1e-4)  # another kernel's rounding
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.transformer.modules())
