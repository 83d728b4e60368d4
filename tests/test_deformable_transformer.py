"""Deformable attention among cells and from queries: references, refinement, proposals."""

import math

import pytest
import torch
from torch import nn

from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.references import Cells, box_encoding, refine
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

C, K, Q = 32, 3, 5
SMALL = {
    "d_model": C,
    "nhead": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "dim_feedforward": 64,
    "num_feature_levels": 2,
    "two_stage_num_proposals": Q,
}


def transformer(*, refine_boxes=False, **options):
    torch.manual_seed(0)
    module = DeformableTransformer(**SMALL | options).eval()
    if refine_boxes or module.two_stage:
        module.decoder.bbox_embed = nn.ModuleList(nn.Linear(C, 4) for _ in range(4))
    if module.two_stage:
        module.decoder.class_embed = nn.ModuleList(nn.Linear(C, K) for _ in range(4))
    return module


def levels(*sizes_of_levels):
    """Levels of the same images, from the sizes that the images have on each."""
    g = torch.Generator().manual_seed(1)
    return [
        nested_tensor_from_tensor_list([torch.randn(C, *s, generator=g) for s in sizes]) for sizes in sizes_of_levels
    ]


def zero_positions(of):
    return [torch.zeros_like(level.tensors) for level in of]


def padded(level, height, width):
    """The level of one image within a larger padded one, whose padding holds large numbers."""
    (h, w) = level.sizes[0]
    tensors = torch.full((1, C, height, width), 1e3)
    tensors[:, :, :h, :w] = level.tensors
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, :h, :w] = False
    return NestedTensor(tensors, mask)


def queries():
    return torch.randn(Q, 2 * C, generator=torch.Generator().manual_seed(2))


def test_centres_are_shares_of_the_image_without_its_padding() -> None:
    cells = Cells.of(levels([(1, 2), (2, 1)]))

    first, second = [[0.25, 0.5], [0.75, 0.5]], [[0.5, 0.25], [0.5, 0.75]]
    assert cells.centres[0, ~cells.mask[0]].tolist() == first
    assert cells.centres[1, ~cells.mask[1]].tolist() == second


def test_references_on_a_padded_level_are_shares_of_the_level() -> None:
    cells = Cells.of(levels([(1, 2), (4, 4)], [(1, 1), (2, 2)]))

    on_levels = cells.on_levels(torch.tensor([[[0.5, 1.0, 0.2, 0.4]]] * 2))

    assert on_levels.shape == (2, 1, 2, 4)
    torch.testing.assert_close(on_levels[0, 0], torch.tensor([[0.25, 0.25, 0.1, 0.1], [0.25, 0.5, 0.1, 0.2]]))


def test_anchors_double_from_level_to_level() -> None:
    anchors = Cells.of(levels([(1, 2)], [(1, 1)])).anchors()

    expected = [[0.25, 0.5, 0.05, 0.05], [0.75, 0.5, 0.05, 0.05], [0.5, 0.5, 0.1, 0.1]]
    torch.testing.assert_close(anchors, torch.tensor([expected]))


def test_no_change_leaves_a_box_where_it_is() -> None:
    boxes = torch.tensor([0.1, 0.4, 0.25, 0.9])

    torch.testing.assert_close(refine(boxes, torch.zeros(4)), boxes)


def test_around_a_point_the_change_alone_gives_width_and_height() -> None:
    box = refine(torch.tensor([0.1, 0.4]), torch.tensor([0.0, 0.0, -2.0, 1.0]))

    torch.testing.assert_close(box, torch.tensor([0.1, 0.4, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))]))


def test_refining_from_the_very_border_stays_finite() -> None:
    points = torch.tensor([[0.0, 1.0]], requires_grad=True)

    refine(points, torch.zeros(1, 4)).sum().backward()

    assert points.grad.isfinite().all()


def test_box_encodings_are_sines_and_cosines_of_each_coordinate() -> None:
    encoded = box_encoding(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), num_pos_feats=4)

    angles = [2 * math.pi * x / wavelength for x in (0.1, 0.2, 0.3, 0.4) for wavelength in (1, 100)]
    expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoded, torch.tensor([[expected]]))


def test_a_new_transformer_keeps_the_initial_offsets_of_its_attention() -> None:
    layer = transformer().encoder.layers[0].self_attn

    assert layer.sampling_offsets.weight.count_nonzero() == 0


def test_an_image_has_the_same_states_alone_and_padded() -> None:
    module = transformer()
    alone = levels([(4, 5)], [(2, 3)])
    together = [padded(alone[0], 7, 6), padded(alone[1], 4, 3)]

    expected = module(alone, zero_positions(alone), queries()).hidden

    torch.testing.assert_close(module(together, zero_positions(together), queries()).hidden, expected)


def test_a_cell_of_one_level_is_told_from_a_cell_of_another() -> None:
    module = transformer()
    level = levels([(3, 3)])[0]

    positions = []
    module.encoder.layers[0].register_forward_pre_hook(lambda _, arguments: positions.append(arguments[1]))

    module([level, level], zero_positions([level, level]), queries())

    fine, coarse = positions[0].chunk(2, dim=1)
    torch.testing.assert_close(coarse - fine, (module.level_embed[1] - module.level_embed[0]).expand(1, 9, C))


def test_without_refinement_all_layers_look_around_the_same_points() -> None:
    batch = levels([(4, 5), (3, 5)], [(2, 3), (2, 2)])

    references = transformer()(batch, zero_positions(batch), queries()).references

    assert [reference.shape for reference in references] == [(2, Q, 2)] * 3
    assert all(torch.equal(reference, references[0]) for reference in references)


def test_with_refinement_each_layer_looks_around_the_boxes_of_the_one_before() -> None:
    batch = levels([(4, 5)], [(2, 3)])
    module = transformer(refine_boxes=True)

    states = module(batch, zero_positions(batch), queries())

    for layer in range(2):
        boxes = refine(states.references[layer], module.decoder.bbox_embed[layer](states.hidden[layer]))
        torch.testing.assert_close(states.references[layer + 1], boxes)
        assert not states.references[layer + 1].requires_grad


def test_proposals_are_the_anchors_as_the_heads_change_them() -> None:
    batch = levels([(2, 3)], [(1, 2)])
    module = transformer(two_stage=True)
    nn.init.zeros_(module.decoder.bbox_embed[-1].weight)
    nn.init.constant_(module.decoder.bbox_embed[-1].bias, 0.5)

    boxes = module(batch, zero_positions(batch)).proposals.boxes

    anchors = Cells.of(batch).anchors()
    torch.testing.assert_close(boxes, (torch.logit(anchors) + 0.5).sigmoid())


def test_a_cell_at_the_very_border_proposes_the_whole_corner() -> None:
    batch = levels([(1, 60)], [(1, 30)])  # the first centre of 60 is 1/120, below 0.01

    boxes = transformer(two_stage=True)(batch, zero_positions(batch)).proposals.boxes[0]

    outermost = [0, 59]
    assert [index for index, box in enumerate(boxes) if (box == 1).all()] == outermost


def test_queries_start_from_the_proposals_of_the_highest_first_logit() -> None:
    batch = levels([(4, 5), (3, 5)], [(2, 3), (2, 2)])

    states = transformer(two_stage=True)(batch, zero_positions(batch))

    for logits, boxes, references in zip(*states.proposals, states.references[0], strict=True):
        best = sorted(range(len(logits)), key=lambda i: -logits[i, 0].item())[:Q]
        assert torch.equal(references, boxes[best])


def test_padding_is_never_proposed() -> None:
    batch = levels([(2, 2), (4, 5)], [(1, 1), (2, 3)])

    states = transformer(two_stage=True)(batch, zero_positions(batch))

    padded_boxes = torch.ones(4)  # what unusable cells propose
    assert not (states.references[0] == padded_boxes).all(dim=-1).any()


def test_padding_competes_where_that_is_asked_for() -> None:
    batch = levels([(1, 1), (4, 5)], [(1, 1), (2, 3)])

    states = transformer(two_stage=True)(batch, zero_positions(batch), propose_padding=True)

    assert states.proposals.logits.abs().max() < 100
    assert (states.references[0][0] == 1).all(dim=-1).sum() >= Q - 2  # the first image has two cells of its own


def test_missing_queries_are_refused() -> None:
    batch = levels([(4, 5)], [(2, 3)])

    with pytest.raises(ValueError, match="`query_embed` must be"):
        transformer()(batch, zero_positions(batch))


def test_two_stages_without_heads_are_refused() -> None:
    batch = levels([(4, 5)], [(2, 3)])

    with pytest.raises(ValueError, match=r"`decoder.class_embed`"):
        DeformableTransformer(**SMALL, two_stage=True)(batch, zero_positions(batch))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`activation` must be one of \['relu', 'gelu'\], got 'tanh'"):
        DeformableTransformer(**SMALL, activation="tanh")
