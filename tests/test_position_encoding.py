"""Where a cell stands in its image, whatever the padding, the batch and the precision."""

import math
import pickle

import pytest
import torch

from detr_backbone import (
    NestedTensor,
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    PositionEncodingConfig,
    build_position_encoding,
)
from detr_backbone.errors import ConfigError


def mask_of(*sizes: tuple[int, int], height: int, width: int) -> torch.Tensor:
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, (h, w) in zip(mask, sizes, strict=True):
        image[:h, :w] = False
    return mask


def slow_sine(h: int, w: int, feats: int, temperature: float, offset: float, normalize: bool) -> torch.Tensor:
    """The definition in float64, one number at a time."""
    encoded = torch.zeros(2 * feats, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            for axis, (cell, total) in enumerate([(y + 1, h), (x + 1, w)]):
                position = (cell + offset) / total * 2 * math.pi if normalize else cell + offset
                for i in range(feats):
                    angle = position / temperature ** (2 * (i // 2) / feats)
                    encoded[axis * feats + i, y, x] = math.cos(angle) if i % 2 else math.sin(angle)
    return encoded


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("offset", [0.0, -0.5])
@pytest.mark.parametrize("temperature", [10000.0, 20.0])
def test_sines_follow_the_definition(normalize: bool, offset: float, temperature: float) -> None:
    encode = PositionEmbeddingSine(8, temperature=temperature, normalize=normalize, offset=offset)

    got = encode(torch.zeros(1, 5, 7, dtype=torch.bool))[0]

    expected = slow_sine(5, 7, 8, temperature, offset, normalize).float()
    # float32 angles up to 2 pi: a few units in the last place, and the published 1e-6 added to the total
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


def test_published_numbers_of_a_two_by_three_map() -> None:
    encoded = PositionEmbeddingSine(4, normalize=True)(torch.zeros(1, 2, 3, dtype=torch.bool))[0]

    for channel, (row, expected) in {
        1: (None, [-1, 1]),
        2: (None, [0.031411, 0.062790]),
        3: (None, [0.999507, 0.998027]),
        4: (0, [0.866026, -0.866025, -2e-6]),
        6: (0, [0.020942, 0.041876, 0.062790]),
    }.items():
        got = encoded[channel, :, 0] if row is None else encoded[channel, row]
        torch.testing.assert_close(got, torch.tensor(expected).float(), rtol=0, atol=3e-6)


def test_published_sum_of_a_padded_map() -> None:
    encoded = PositionEmbeddingSine(128, normalize=True)(mask_of((20, 30), height=25, width=34))

    # 174,080 numbers summed in float32: the published sum is good to about 1e-6 of itself
    torch.testing.assert_close(encoded.double().sum().item(), 106253.118, rtol=2e-6, atol=0)
    expected = torch.tensor([0.951056, 0.309017, 0.885794, 0.464078, 0.808939, 0.587893])
    torch.testing.assert_close(encoded[0, :6, 3, 5], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encode", [PositionEmbeddingSine(16), PositionEmbeddingSine(16, normalize=True, offset=-0.5)])
def test_padding_does_not_move_an_image(encode: PositionEmbeddingSine) -> None:
    alone = torch.zeros(1, 3, 4, dtype=torch.bool)

    assert torch.equal(encode(mask_of((3, 4), height=8, width=9))[..., :3, :4], encode(alone))


def test_columns_of_padding_stay_finite() -> None:
    encoded = PositionEmbeddingSine(128, normalize=True, offset=-0.5)(mask_of((1, 1), height=60, width=60))

    assert encoded.isfinite().all()


def test_sines_are_float32_under_autocast() -> None:
    encode, mask = PositionEmbeddingSine(128, normalize=True), torch.zeros(1, 100, 336, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encode(mask)

    assert encoded.dtype == torch.float32
    assert torch.equal(encoded, encode(mask))


def test_a_half_precision_module_still_computes_in_float32() -> None:
    mask = torch.zeros(1, 100, 336, dtype=torch.bool)

    assert torch.equal(PositionEmbeddingSine(128).bfloat16()(mask), PositionEmbeddingSine(128)(mask))


def test_learned_vectors_are_columns_then_rows() -> None:
    encode = PositionEmbeddingLearned(3)
    encoded = encode(torch.zeros(2, 5, 7, dtype=torch.bool))

    assert encoded.shape == (2, 6, 5, 7)
    assert torch.equal(encoded[1, :, 4, 2], torch.cat([encode.col_embed.weight[2], encode.row_embed.weight[4]]))


def test_learned_vectors_beyond_fifty_keep_both_ends_and_rise_between() -> None:
    encode = PositionEmbeddingLearned(1)
    with torch.no_grad():
        encode.col_embed.weight.copy_(torch.arange(50)[:, None])
    columns = encode(torch.zeros(1, 3, 99, dtype=torch.bool))[0, 0, 0]

    # 99 cells over 50 vectors: every second cell falls on a vector, the others half-way
    torch.testing.assert_close(columns, torch.arange(99) / 2)


@pytest.mark.parametrize(("h", "w"), [(3, 4), (50, 51), (70, 20)])
def test_learned_vectors_do_not_depend_on_the_batch(h: int, w: int) -> None:
    encode = PositionEmbeddingLearned(4)
    batch = NestedTensor(torch.zeros(2, 1, 80, 90), mask_of((h, w), (80, 90), height=80, width=90))

    alone = encode(torch.zeros(1, h, w, dtype=torch.bool))
    assert torch.equal(encode(batch)[:1, :, :h, :w], alone)


def test_learned_vectors_train() -> None:
    encode = PositionEmbeddingLearned(4)
    encode(torch.zeros(1, 5, 60, dtype=torch.bool)).sum().backward()

    assert encode.row_embed.weight.grad is not None
    assert encode.row_embed.weight.grad[:5].eq(60).all()


@pytest.mark.parametrize("feats", [5, 0])
def test_odd_channels_are_refused(feats: int) -> None:
    with pytest.raises(ConfigError, match=f"even and positive .* got {feats}"):
        PositionEmbeddingSine(feats)


def test_a_scale_without_normalize_is_refused() -> None:
    with pytest.raises(ConfigError, match="`scale` must be left out"):
        PositionEmbeddingSine(4, scale=1.0)


def test_the_builder_splits_hidden_dim_over_two_axes() -> None:
    for type_ in ("sine", "learned"):
        encode = build_position_encoding(PositionEncodingConfig(type=type_), hidden_dim=12)
        assert encode(torch.zeros(1, 2, 2, dtype=torch.bool)).shape == (1, 12, 2, 2)


def test_the_builder_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="`hidden_dim` must be even"):
        build_position_encoding(PositionEncodingConfig(), hidden_dim=7)
    with pytest.raises(ConfigError, match="belong to the sine encoding"):
        build_position_encoding(PositionEncodingConfig(type="learned", offset=-0.5), hidden_dim=8)
    with pytest.raises(ConfigError, match="'sine' or 'learned', got 'v3'"):
        PositionEncodingConfig(type="v3")


def level(h: int, w: int, *, batch: int = 1) -> NestedTensor:
    return NestedTensor(torch.zeros(batch, 1, h, w), None)


def test_levels_of_one_geometry_without_padding_share_their_encodings() -> None:
    encode = PositionEmbeddingSine(num_pos_feats=16, normalize=True)
    first, again = encode(level(5, 7)), encode(level(5, 7, batch=3))

    assert again.shape == (3, 32, 5, 7)
    assert again.data_ptr() == first.data_ptr()
    torch.testing.assert_close(again, encode(torch.zeros(3, 5, 7, dtype=torch.bool)), rtol=0, atol=0)
    assert encode(level(7, 5)).data_ptr() != first.data_ptr()


def test_a_padded_level_has_encodings_of_its_own() -> None:
    encode = PositionEmbeddingSine(num_pos_feats=16, normalize=True)
    mask = torch.ones(1, 5, 7, dtype=torch.bool)
    mask[:, :3, :4] = False
    encode(level(5, 7))

    torch.testing.assert_close(encode(NestedTensor(torch.zeros(1, 1, 5, 7), mask)), encode(mask), rtol=0, atol=0)


def test_few_geometries_are_kept_and_none_is_pickled() -> None:
    encode = PositionEmbeddingSine(num_pos_feats=16)
    size = len(pickle.dumps(encode))
    encode(level(1, 1))
    kept = [encode(level(1, w)) for w in range(2, 18)]

    assert encode(level(1, 17)).data_ptr() == kept[-1].data_ptr()
    assert len(encode._unpadded) == 16
    assert len(pickle.dumps(encode)) == size


def test_an_encoding_follows_its_options() -> None:
    encode, level = PositionEmbeddingSine(4, normalize=True), NestedTensor(torch.zeros(1, 1, 3, 5), None)
    encode(level)
    encode.offset, encode.temperature = -0.5, 20.0

    expected = PositionEmbeddingSine(4, normalize=True, offset=-0.5, temperature=20.0)(level)
    assert torch.equal(encode(level), expected)


def test_encodings_kept_by_inference_serve_training() -> None:
    encode = PositionEmbeddingSine(num_pos_feats=16)
    with torch.inference_mode():
        encode(level(5, 7))
    factor = torch.ones((), requires_grad=True)
    (encode(level(5, 7)) * factor).sum().backward()

    assert factor.grad is not None
