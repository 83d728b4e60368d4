"""An exported graph of a detector serves every batch size, height and width, with padding or without."""

from functools import cache

import pytest
import torch
from torch import nn

from detr_backbone.backbone import BackboneBase, Joiner
from detr_backbone.detectors import DETR, DeformableDETR, DeformableTransformer, Transformer
from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr_backbone.position_encoding import PositionEmbeddingSine

pytestmark = pytest.mark.no_cover  # which would watch every line of torch's exporter too

C, Q, K = 32, 3, 2
SIZES = {
    "one image": [(40, 48)],
    "one image of odd sides": [(33, 47)],
    "two images": [(33, 47), (57, 35)],
    "five images": [(37, 64), (41, 50), (64, 64), (17, 64), (64, 33)],
}
GRAPHS = [  # tracing takes seconds for each: those that share their code with others run in the sweep
    ("detr", "without mask"),
    ("detr", "with mask"),
    ("deformable", "with mask"),
    ("two stages", "without mask"),
    pytest.param("deformable", "without mask", marks=pytest.mark.sweep),
    pytest.param("two stages", "with mask", marks=pytest.mark.sweep),
    pytest.param("mixed", "with mask", marks=pytest.mark.sweep),
]


def small(case):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 9, stride=8, padding=4))
    base = BackboneBase(network, return_layers=("0",), train_layers=())
    backbone = Joiner(base, PositionEmbeddingSine(C // 2, normalize=True))
    layers = {"d_model": C, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 16}
    if case == "detr":
        model = DETR(backbone, Transformer(**layers), num_classes=K, num_queries=Q)
    else:
        two_stage = case in ("two stages", "mixed")
        levels = 2 if two_stage else 1
        transformer = DeformableTransformer(
            **layers,
            num_feature_levels=levels,
            two_stage=two_stage,
            two_stage_num_proposals=Q,
            query_selection="mixed" if case == "mixed" else "published",
        )
        model = DeformableDETR(
            backbone,
            transformer,
            num_classes=K,
            num_queries=Q,
            num_feature_levels=levels,
            with_box_refine=two_stage,
            two_stage=two_stage,
        )
    for name, parameter in model.named_parameters():  # new heads and samplings say the same of every image
        if "layers.2" in name or "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Predictions(nn.Module):
    """Tensors in, tensors out, as a graph has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask=None):
        outputs = self.model(NestedTensor(images, mask))
        return outputs["pred_logits"], outputs["pred_boxes"]


@cache
def exported(case, kind):
    batch = padded([(48, 64), (40, 56)])
    free = torch.export.Dim.DYNAMIC
    inputs, shapes = [batch.tensors], {"images": {0: free, 2: free, 3: free}}
    if kind == "with mask":
        inputs.append(batch.mask)
        shapes["mask"] = {0: free, 1: free, 2: free}
    with torch.no_grad():
        return torch.export.export(Predictions(small(case)), tuple(inputs), dynamic_shapes=shapes).module()


def padded(sizes):
    g = torch.Generator().manual_seed(1)
    return nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=g) for h, w in sizes])


@pytest.mark.parametrize(("case", "kind"), GRAPHS)
def test_one_graph_gives_what_eager_gives_for_any_number_of_images_of_any_size(case: str, kind: str) -> None:
    eager = Predictions(small(case))

    for name, sizes in SIZES.items():
        batch = padded(sizes)
        inputs = (batch.tensors, batch.mask) if kind == "with mask" else (batch.tensors,)

        got = exported(case, kind)(*inputs)

        for what, expected in zip(got, eager(*inputs), strict=True):  # sums over heads and points run in another order
            torch.testing.assert_close(
                what, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_graph_without_a_mask_masks_nothing() -> None:
    operators = {str(node.target) for node in exported("detr", "without mask").graph.nodes}

    assert not {name for name in operators if "masked_fill" in name or "where" in name or "logical" in name}


def test_a_two_stage_graph_refuses_images_with_fewer_cells_than_proposals() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        exported("two stages", "without mask")(torch.zeros(1, 3, 9, 8))
