"""A detector compiles into one graph per padded size, whatever the images in the batch measure."""

import pytest
import torch
from torch._dynamo.utils import counters

from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors.build import DetectorConfig, build_detector
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list

CASES = {
    "detr": {"name": "detr"},
    "deformable": {"name": "deformable_detr", "num_feature_levels": 3},
    "two stages": {
        "name": "deformable_detr",
        "num_feature_levels": 3,
        "with_box_refine": True,
        "two_stage": True,
    },
}


def small(case):
    return build_detector(
        DetectorConfig(
            backbone=BackboneConfig(
                name="resnet18",
                hidden_dim=32,
                return_layers=("layer4",) if case == "detr" else ("layer3", "layer4"),
            ),
            num_classes=3,
            num_queries=4,
            nheads=2,
            enc_layers=1,
            dec_layers=2,
            dim_feedforward=32,
            dropout=0.0,
            **CASES[case],
        )
    )


def padded_to_64(*sizes):
    g = torch.Generator().manual_seed(1)
    return nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=g) for h, w in [*sizes, (64, 64)]])


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("case", CASES)
def test_batches_of_one_padded_size_share_one_graph_and_its_numbers_are_the_same(case: str) -> None:
    model = small(case)
    # Inductor would take minutes; what it is given is found here all the same.
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    for images in (padded_to_64((40, 50)), padded_to_64((64, 17)), padded_to_64((64, 64))):
        outputs, expected = compiled(images), model(images)
        for name in ("pred_logits", "pred_boxes"):  # statistics and samples are sums in another order there
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-4)

    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_detector_learns_the_same() -> None:
    model, images = small("two stages"), padded_to_64((40, 50))
    for attention in (layer.self_attn for layer in model.transformer.encoder.layers):
        # As initialised, every point lies on the centre of a cell, where the gradient has two values.
        torch.nn.init.normal_(attention.sampling_offsets.bias)
    gradients = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        run(images)["pred_logits"].square().sum().backward()
        gradients.append(model.get_parameter("transformer.encoder.layers.0.self_attn.sampling_offsets.weight").grad)

    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())
