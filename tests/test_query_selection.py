"""Mixed query selection: classes rank the proposals, contents are learned, positions follow the boxes."""

import pytest
import torch
from torch import nn

from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.query_selection import Proposals, best_boxes
from detr_backbone.detectors.references import Cells, box_encoding
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor

C, K, Q = 32, 3, 4


def transformer(**options):
    torch.manual_seed(0)
    sizes = {"d_model": C, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": 16}
    stages = {"num_feature_levels": 2, "two_stage": True, "two_stage_num_proposals": Q, "query_selection": "mixed"}
    module = DeformableTransformer(**sizes, **stages | options).eval()
    module.decoder.bbox_embed = nn.ModuleList(nn.Linear(C, 4) for _ in range(3))
    module.decoder.class_embed = nn.ModuleList(nn.Linear(C, K) for _ in range(3))
    return module


def levels(batch=2):
    g = torch.Generator().manual_seed(1)
    return [NestedTensor(torch.randn(batch, C, *size, generator=g), None) for size in ((4, 6), (2, 3))]


def states(module, batch=2):
    maps = levels(batch)
    return module(maps, [torch.zeros_like(level.tensors) for level in maps])


def test_the_best_logit_of_any_class_ranks_proposals() -> None:
    g = torch.Generator().manual_seed(2)
    proposals = Proposals(torch.randn(2, 9, K, generator=g), torch.rand(2, 9, 4, generator=g))

    boxes = best_boxes(proposals, 3, "mixed")

    for image in range(2):
        ranked = sorted(range(9), key=lambda cell: -max(proposals.logits[image, cell].tolist()))
        assert boxes[image].tolist() == proposals.boxes[image, ranked[:3]].tolist()


def test_queries_start_from_learned_contents_whatever_the_proposals() -> None:
    module = transformer()
    contents = []
    module.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: contents.append(inputs[0]))

    states(module)

    assert torch.equal(contents[0], module.tgt_embed.weight.expand(2, -1, -1))


def test_every_layer_encodes_positions_from_the_boxes_before_it() -> None:
    module = transformer()
    positions = []
    for layer in module.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[1]))

    references = states(module).references

    assert not torch.equal(references[0], references[1])  # refined in between
    for position, boxes in zip(positions, references, strict=True):
        torch.testing.assert_close(position, module.decoder.ref_point_head(box_encoding(boxes, C // 2)))


def test_the_order_of_the_learned_contents_does_not_matter_but_for_the_order_of_the_queries() -> None:
    """Without positions of their own, two queries that exchange content and box exchange their states."""
    module, order = transformer(), torch.tensor([2, 0, 3, 1])
    memory, cells = torch.randn(1, 30, C), Cells.of(levels(1))
    start = module._selected_queries(Proposals(torch.randn(1, 30, K), torch.rand(1, 30, 4)), torch.float32)

    hidden, _ = module.decoder(start, memory, cells)
    permuted = start._replace(content=start.content[:, order], references=start.references[:, order])
    hidden_permuted, _ = module.decoder(permuted, memory, cells)

    torch.testing.assert_close(hidden_permuted[-1], hidden[-1][:, order])


def test_anchors_have_the_size_that_is_asked_for_and_double_from_level_to_level() -> None:
    module = transformer(anchor_size=0.25)
    for parameter in module.decoder.bbox_embed[-1].parameters():
        nn.init.zeros_(parameter)  # boxes stay where the anchors are

    sides = states(module).proposals.boxes[0, :, 2:]

    torch.testing.assert_close(sides, torch.tensor([0.25] * 24 + [0.5] * 6)[:, None].expand(-1, 2))


def test_the_published_selection_has_the_published_keys_and_the_mixed_one_those_of_dino() -> None:
    published, mixed = (set(transformer(query_selection=which).state_dict()) for which in ("published", "mixed"))

    assert published - mixed == {f"pos_trans{norm}.{what}" for norm in ("", "_norm") for what in ("weight", "bias")}
    head = {f"decoder.ref_point_head.layers.{i}.{what}" for i in range(2) for what in ("weight", "bias")}
    assert mixed - published == {"tgt_embed.weight", *head}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_selection": "best"}, r"`query_selection` must be one of \['published', 'mixed'\], got 'best'"),
        ({"two_stage": False}, "`query_selection` must be published without `two_stage`"),
        ({"anchor_size": 0.5}, "`anchor_size` must be .* below 0.495.* of 2 levels.* got 0.5"),
        ({"anchor_size": 0.01}, "`anchor_size` must be above 0.01"),
        ({"two_stage": False, "query_selection": "published", "anchor_size": 0.1}, "`anchor_size` must be 0.05"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transformer(**options)
