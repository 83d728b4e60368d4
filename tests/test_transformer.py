"""DETR's transformer is torch's own layers, with positions added where DETR adds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr_backbone.detectors.transformer import ACTIVATIONS, Transformer


def small(**options):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 32}
    return Transformer(**(sizes | {"dropout": 0.0} | options))


def inputs(*, images=2, h=3, w=4, queries=5):
    g = torch.Generator().manual_seed(1)
    src, pos = torch.randn(2, images, 16, h, w, generator=g)
    return src, torch.zeros(images, h, w, dtype=torch.bool), torch.randn(queries, 16, generator=g), pos


def test_one_post_norm_encoder_layer_is_torchs_own_where_positions_are_zero() -> None:
    ours = small(num_encoder_layers=1)
    theirs = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    theirs.load_state_dict(ours.encoder.layers[0].state_dict())
    src, mask, queries, _ = inputs()

    _, memory = ours(src, mask, queries, torch.zeros_like(src))

    torch.testing.assert_close(memory.flatten(2).transpose(1, 2), theirs(src.flatten(2).transpose(1, 2)))


def test_pre_norm_layers_are_torchs_own_where_positions_are_zero() -> None:
    ours = small(normalize_before=True, activation="gelu")
    src, mask, _, _ = inputs()
    cells = src.flatten(2).transpose(1, 2)
    options = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, **options), 2, norm=nn.LayerNorm(16), enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **options), 2, norm=nn.LayerNorm(16))
    encoder.load_state_dict(ours.encoder.state_dict())
    decoder.load_state_dict(ours.decoder.state_dict())

    hidden, memory = ours(src, mask, torch.zeros(5, 16), torch.zeros_like(src))

    torch.testing.assert_close(memory.flatten(2).transpose(1, 2), encoder(cells))
    torch.testing.assert_close(hidden[0], decoder(torch.zeros(2, 5, 16), encoder(cells)))


def test_positions_are_added_to_queries_and_keys_but_not_to_values() -> None:
    layer = small().encoder.layers[0]
    src, pos = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    w_q, w_k, w_v = layer.self_attn.in_proj_weight.chunk(3)

    got = layer(src, mask, pos)

    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in ((src + pos) @ w_q.T, (src + pos) @ w_k.T, src @ w_v.T))
    weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    attended = layer.self_attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    x = layer.norm1(src + attended)
    torch.testing.assert_close(got, layer.norm2(x + layer.linear2(F.relu(layer.linear1(x)))))


def test_padding_does_not_change_what_an_image_says() -> None:
    transformer = small()
    src, mask, queries, pos = inputs(images=1)
    wider = F.pad(src, (0, 3, 0, 2), value=7.0), F.pad(mask, (0, 3, 0, 2), value=True)

    hidden, memory = transformer(src, mask, queries, pos)
    padded_hidden, padded_memory = transformer(*wider, queries, F.pad(pos, (0, 3, 0, 2), value=-3.0))

    torch.testing.assert_close(padded_hidden, hidden)
    torch.testing.assert_close(padded_memory[..., :3, :4], memory)


def test_an_image_that_is_all_padding_has_finite_states_and_gradients() -> None:
    transformer = small()
    src, mask, queries, pos = inputs()
    mask[1] = True
    src.requires_grad_()

    hidden, _ = transformer(src, mask, queries, pos)
    hidden.square().sum().backward()

    assert hidden.isfinite().all()
    assert src.grad.isfinite().all()


def test_intermediate_states_end_in_the_last_one() -> None:
    transformer = small(num_decoder_layers=3, return_intermediate_dec=True)

    every, _ = transformer(*inputs())
    transformer.decoder.return_intermediate = False
    last, _ = transformer(*inputs())

    assert every.shape == (3, 2, 5, 16)
    torch.testing.assert_close(every[-1:], last)


def test_without_positions_all_queries_are_the_same() -> None:
    src, mask, queries, pos = inputs()

    hidden, _ = small()(src, mask, torch.zeros_like(queries), pos)

    torch.testing.assert_close(hidden, hidden[:, :, :1].expand_as(hidden))


def test_weight_matrices_start_xavier_uniform() -> None:
    weight = small().encoder.layers[0].linear1.weight.detach()  # [32, 16]

    bound = (6 / (32 + 16)) ** 0.5

    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="`nhead` must divide `d_model` 16, got 3"):
        small(nhead=3)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`activation` must be one of \['relu', 'gelu'\], got 'glu'"):
        small(activation="glu")


def test_no_mask_is_a_mask_without_padding() -> None:
    src, mask, queries, pos = inputs()

    without, memory = small()(src, None, queries, pos)
    masked, masked_memory = small()(src, mask, queries, pos)

    torch.testing.assert_close(without, masked)
    torch.testing.assert_close(memory, masked_memory)


@torch.no_grad()
def test_relu_takes_no_memory_in_inference() -> None:
    x = torch.randn(2, 3)
    expected = x.clamp(min=0)

    y = ACTIVATIONS["relu"](x)

    assert y.data_ptr() == x.data_ptr()
    assert y.equal(expected)


def test_relu_copies_no_gradients_in_training() -> None:
    x = nn.Linear(4, 8)(torch.randn(2, 3, 4))
    y = ACTIVATIONS["relu"](x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "ReluBackward0"  # in place, of a view, it would be CopySlices and more
