"""Images in, one box and its class logits for every query out."""

import pytest
import torch

from detr_backbone.backbone import BackboneConfig, build_backbone
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.detr import DETR, MLP
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.detectors.transformer import Transformer
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list

K, Q = 3, 5


def small_detr(*, aux_loss=False, padding="exact", layers=2):
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18", padding=padding, hidden_dim=16))
    transformer = Transformer(
        d_model=16,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=layers,
        dim_feedforward=32,
        dropout=0.0,
        return_intermediate_dec=aux_loss,
    )
    return DETR(backbone, transformer, num_classes=K, num_queries=Q, aux_loss=aux_loss)


def images(*sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=g) for size in sizes]


def test_each_query_has_logits_for_the_classes_and_no_object_and_a_box_inside_the_image() -> None:
    outputs = small_detr()(images((32, 48), (64, 40)))

    assert outputs["pred_logits"].shape == (2, Q, K + 1)
    assert outputs["pred_boxes"].shape == (2, Q, 4)
    assert outputs["pred_boxes"].min() >= 0
    assert outputs["pred_boxes"].max() <= 1


def test_a_list_a_batch_and_a_nested_tensor_are_the_same_images() -> None:
    model, [image] = small_detr(), images((32, 48))

    expected = model([image])

    torch.testing.assert_close(model(image[None]), expected)
    torch.testing.assert_close(model(nested_tensor_from_tensor_list([image])), expected)


def test_an_image_has_the_same_predictions_alone_and_padded() -> None:
    model = small_detr().eval()
    small, large = images((33, 40), (64, 71))

    alone, together = model([small]), model([small, large])

    for name in ("pred_logits", "pred_boxes"):  # sums in another order, through 18 convolutions
        torch.testing.assert_close(together[name][:1], alone[name], rtol=1e-4, atol=1e-4)


def test_padding_moves_the_predictions_where_it_is_treated_as_zeros() -> None:
    model = small_detr(padding="zeros").eval()
    small, large = images((33, 40), (64, 71))

    assert not torch.allclose(model([small, large])["pred_logits"][:1], model([small])["pred_logits"], atol=1e-4)


def test_auxiliary_outputs_are_the_earlier_layers_predictions() -> None:
    model = small_detr(aux_loss=True, layers=3)
    states = []
    model.transformer.register_forward_hook(lambda _, __, result: states.append(result[0]))

    outputs = model(images((32, 48)))

    assert [set(aux) for aux in outputs["aux_outputs"]] == [{"pred_logits", "pred_boxes"}] * 2
    for layer, aux in enumerate([*outputs["aux_outputs"], outputs]):
        torch.testing.assert_close(aux["pred_logits"], model.class_embed(states[0][layer]))
        torch.testing.assert_close(aux["pred_boxes"], model.bbox_embed(states[0][layer]).sigmoid())


def test_without_auxiliary_loss_there_are_no_auxiliary_outputs() -> None:
    assert set(small_detr()(images((32, 48)))) == {"pred_logits", "pred_boxes"}


def test_auxiliary_loss_needs_a_transformer_that_gives_every_layer() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", hidden_dim=16))
    transformer = Transformer(d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=32)

    with pytest.raises(ValueError, match=r"`aux_loss` needs .*`return_intermediate_dec=True`"):
        DETR(backbone, transformer, num_classes=K, num_queries=Q, aux_loss=True)


def test_heads_stay_in_float32_under_bfloat16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small_detr(aux_loss=True)(images((32, 48), (40, 32)))

    assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == torch.float32


def test_a_model_in_bfloat16_gives_boxes_in_float32() -> None:
    [image] = images((32, 48))

    assert small_detr().bfloat16()([image.bfloat16()])["pred_boxes"].dtype == torch.float32


def test_a_batch_without_any_object_trains_with_finite_gradients() -> None:
    model = small_detr(aux_loss=True)
    criterion = SetCriterion(K, HungarianMatcher(), {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_ce_0": 1})
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}

    outputs = model(images((32, 48), (40, 32)))
    criterion.weighted_sum(criterion(outputs, [nothing, nothing])).backward()

    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_an_mlp_has_relu_between_its_layers_and_not_after_the_last() -> None:
    mlp = MLP(4, 8, output_dim=2, num_layers=3)
    a, b, c = mlp.layers
    x = torch.randn(5, 4)

    torch.testing.assert_close(mlp(x), c(b(a(x).clamp(min=0)).clamp(min=0)))
