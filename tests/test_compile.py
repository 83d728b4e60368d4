"""A detector compiles into one graph per padded size, whatever the images in the batch measure."""

import pytest
import torch
from torch._dynamo.utils import counters

from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors.build import DetectorConfig, build_detector
from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list

pytestmark = pytest.mark.no_cover  # which would watch every line of torch's compiler too, for as long again

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


@pytest.mark.parametrize(  # tracing takes seconds for each: two stages are a Deformable DETR too
    "case", ["detr", "two stages", pytest.param("deformable", marks=pytest.mark.sweep)]
)
def test_batches_of_one_padded_size_share_one_graph_that_computes_and_learns_the_same(case: str) -> None:
    model = small(case)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            # As initialised, every point lies on the centre of a cell, where the gradient has two values.
            torch.nn.init.normal_(module.sampling_offsets.bias)
    # Inductor would take minutes; what it is given is found here all the same.
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    for images in (padded_to_64((40, 50)), padded_to_64((64, 17)), padded_to_64((64, 64))):
        (outputs, gradient), (expected, expected_gradient) = learnt(compiled, images), learnt(model, images)
        for name in ("pred_logits", "pred_boxes"):  # statistics are sums in another order there
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=1e-4 * float(expected_gradient.abs().max())
        )

    assert counters["stats"]["unique_graphs"] == 1


def learnt(run, images):
    """The outputs, and the gradient of a weight that all of the transformer stands on."""
    outputs = run(images)
    first = next(run.input_proj.parameters())
    (gradient,) = torch.autograd.grad(outputs["pred_logits"].square().sum(), first)
    return outputs, gradient
