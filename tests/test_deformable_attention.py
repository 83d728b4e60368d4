"""Where deformable attention looks, and what it makes of what it reads there."""

import pytest
import torch

from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.errors import ConfigError

SHAPES = [(5, 7), (2, 3), (1, 1)]
B, Q = 2, 6


def attention(**options):
    torch.manual_seed(0)
    module = MSDeformAttn(**{"d_model": 16, "n_levels": 3, "n_heads": 4, "n_points": 2} | options)
    for layer in (module.sampling_offsets, module.attention_weights):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return module


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    query, value = torch.randn(B, Q, 16, generator=g), torch.randn(B, 42, 16, generator=g)
    return query.to(dtype), torch.rand(B, Q, 3, 2, generator=g), value.to(dtype)


def test_each_head_of_a_new_module_looks_in_its_own_direction() -> None:
    module = MSDeformAttn(d_model=16, n_levels=1, n_heads=8, n_points=3)

    locations, _ = module.samples(torch.randn(1, 1, 16), torch.full((1, 1, 1, 2), 0.5), [(10, 20)])

    right_then_clockwise = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1.0]])
    cells_away = (locations[0, 0, :, 0] - 0.5) * torch.tensor([20, 10])
    torch.testing.assert_close(cells_away, right_then_clockwise[:, None] * torch.tensor([1, 2, 3.0])[:, None])


def test_a_new_module_weighs_all_points_alike() -> None:
    _, weights = MSDeformAttn(16, 3, 4, 2).samples(*inputs()[:2], SHAPES)

    torch.testing.assert_close(weights, torch.full((B, Q, 4, 3, 2), 1 / 6))


def test_weights_sum_to_one_over_levels_and_points() -> None:
    _, weights = attention().samples(*inputs()[:2], SHAPES)

    torch.testing.assert_close(weights.sum(dim=(-2, -1)), torch.ones(B, Q, 4))


def test_around_a_box_the_last_point_of_a_new_module_lies_on_its_border() -> None:
    module = MSDeformAttn(d_model=16, n_levels=1, n_heads=4, n_points=4)

    locations, _ = module.samples(torch.randn(1, 1, 16), torch.tensor([[[[0.4, 0.5, 0.2, 0.6]]]]), [(10, 20)])

    right_bottom_left_top = torch.tensor([[0.5, 0.5], [0.4, 0.8], [0.3, 0.5], [0.4, 0.2]])
    torch.testing.assert_close(locations[0, 0, :, 0, -1], right_bottom_left_top)


def test_what_padded_cells_hold_does_not_matter() -> None:
    query, references, value = inputs()
    padding = torch.rand(B, 42) < 0.5
    other = torch.where(padding[..., None], torch.full_like(value, 1e3), value)
    module = attention()

    expected = module(query, references, value, SHAPES, padding)

    assert torch.equal(module(query, references, other, SHAPES, padding), expected)


def test_padded_cells_read_as_what_lies_beyond_the_border() -> None:
    query, references, value = inputs()
    module = attention(n_levels=1)
    alone = module(query, references[:, :, :1], value[:, :12], [(3, 4)])
    padded = torch.randn(B, 5, 6, 16)
    padded[:, :3, :4] = value[:, :12].view(B, 3, 4, 16)
    padding = torch.ones(5, 6, dtype=torch.bool)
    padding[:3, :4] = False

    on_padded = references[:, :, :1] * torch.tensor([4 / 6, 3 / 5])
    together = module(query, on_padded, padded.flatten(1, 2), [(5, 6)], padding.flatten().expand(B, -1))

    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_of_a_shorter_type_gives_about_the_same(dtype: torch.dtype) -> None:
    expected = attention()(*inputs(), SHAPES)

    read = attention().to(dtype)(*inputs(dtype), SHAPES)

    assert read.dtype == dtype
    torch.testing.assert_close(read.float(), expected, atol=0.05, rtol=0)  # bfloat16 offsets: 1/256 of some cells


def test_locations_and_weights_of_a_shorter_module_are_float32() -> None:
    query, references, _ = inputs(torch.bfloat16)

    locations, weights = attention().bfloat16().samples(query, references.bfloat16(), SHAPES)

    assert locations.dtype == weights.dtype == torch.float32


def test_autocast_gives_about_the_same_and_trains() -> None:
    module = attention()
    expected = module(*inputs(), SHAPES)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = module(*inputs(), SHAPES)
    read.sum().backward()

    torch.testing.assert_close(read.float(), expected, atol=0.05, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_references_that_are_neither_points_nor_boxes_are_refused() -> None:
    query, _, value = inputs()

    with pytest.raises(ValueError, match=r"`reference_points` must be .* got \[2, 6, 3, 3\]"):
        attention()(query, torch.zeros(B, Q, 3, 3), value, SHAPES)


def test_a_number_of_heads_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="`d_model` must be a multiple of `n_heads` = 3, got 16"):
        MSDeformAttn(d_model=16, n_heads=3)
