"""Images in; for every query a logit per class and a box out, from as many levels as are asked for."""

import pytest
import torch
from torch import nn

from detr_backbone.backbone import BackboneConfig, build_backbone
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.deformable_detr import DeformableDETR, ValidGroupNorm
from detr_backbone.detectors.deformable_transformer import DeformableTransformer
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

K, Q, C = 3, 5, 64
VARIANTS = {
    "single": {"num_feature_levels": 1, "return_layers": ("layer4",)},
    "four levels": {},
    "five levels": {"num_feature_levels": 5},
    "refine": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
}


def small(
    *,
    num_feature_levels=4,
    return_layers=("layer2", "layer3", "layer4"),
    padding="exact",
    two_stage=False,
    d_model=C,
    **options,
):
    torch.manual_seed(0)
    backbone = BackboneConfig(name="resnet18", return_layers=return_layers, padding=padding, hidden_dim=d_model)
    transformer = DeformableTransformer(
        d_model=d_model,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=2,
        dim_feedforward=64,
        dropout=0.0,
        num_feature_levels=num_feature_levels,
        two_stage=two_stage,
        two_stage_num_proposals=Q,
    )
    options = {"num_classes": K, "num_queries": Q, "num_feature_levels": num_feature_levels} | options
    return DeformableDETR(build_backbone(backbone), transformer, two_stage=two_stage, **options)


def trained(**options):
    """A detector whose box heads say something, unlike those of a new one."""
    model = small(**options)
    for name, parameter in model.bbox_embed.named_parameters():
        if name.endswith("layers.2.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def images(*sizes):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=g) for size in sizes]


def criterion(*, two_stage=False):
    terms = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    weights = {f"{term}{end}": w for end in ["", "_0", *["_enc"] * two_stage] for term, w in terms.items()}
    return SetCriterion(K, HungarianMatcher(2.0, 5.0, 2.0, focal=True), weights, label_loss="focal")


def target(n):
    return {"labels": torch.arange(n) % K, "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.7]])[:n]}


def test_each_query_has_a_logit_per_class_and_a_box_inside_the_image() -> None:
    outputs = small()(images((33, 48), (64, 40)))

    assert outputs["pred_logits"].shape == (2, Q, K)
    assert outputs["pred_boxes"].shape == (2, Q, 4)
    assert outputs["pred_boxes"].min() >= 0
    assert outputs["pred_boxes"].max() <= 1


def test_a_list_a_batch_and_a_nested_tensor_are_the_same_images() -> None:
    model, [image] = small(), images((33, 48))

    expected = model([image])

    torch.testing.assert_close(model(image[None]), expected)
    torch.testing.assert_close(model(nested_tensor_from_tensor_list([image])), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_has_the_same_predictions_alone_and_padded(variant: str) -> None:
    model = trained(**VARIANTS[variant]).eval()
    image, larger = images((65, 47), (97, 90))

    alone, together = model([image]), model([larger, image])

    for name in ("pred_logits", "pred_boxes"):  # sums in another order, through some 25 layers
        torch.testing.assert_close(together[name][1:], alone[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_adds_nothing_to_the_loss(variant: str) -> None:
    model, [image] = trained(**VARIANTS[variant]), images((65, 47))
    loss = criterion(two_stage="two_stage" in VARIANTS[variant])
    padded = torch.zeros(1, 3, 97, 90)
    padded[0, :, :65, :47] = image
    mask = torch.ones(1, 97, 90, dtype=torch.bool)
    mask[0, :65, :47] = False

    alone = loss.weighted_sum(loss(model([image]), [target(2)]))
    together = loss.weighted_sum(loss(model(NestedTensor(padded, mask)), [target(2)]))

    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_levels_that_the_backbone_lacks_double_the_stride() -> None:
    assert small(num_feature_levels=5).strides == (8, 16, 32, 64, 128)


def test_the_first_extra_level_reads_the_backbone_and_the_next_reads_the_first() -> None:
    projections = small(num_feature_levels=5).input_proj

    assert [projection[0].in_channels for projection in projections] == [128, 256, 512, 512, C]
    assert [projection[0].kernel_size[0] for projection in projections] == [1, 1, 1, 3, 3]


def test_a_new_detector_gives_every_class_about_the_prior_score() -> None:
    bias = small().class_embed[0].bias.sigmoid()

    torch.testing.assert_close(bias, torch.full((K,), 0.01))


@pytest.mark.parametrize("with_box_refine", [False, True])
def test_boxes_of_a_new_detector_stand_at_their_references_with_sides_of_sigmoid_minus_two(
    *, with_box_refine: bool
) -> None:
    model = small(with_box_refine=with_box_refine)

    outputs = model(images((64, 64)))

    points = model.transformer.reference_points(model.query_embed.weight[:, :C]).sigmoid()
    for layer in (outputs, *outputs["aux_outputs"]):
        torch.testing.assert_close(layer["pred_boxes"][0, :, :2], points)
        torch.testing.assert_close(layer["pred_boxes"][0, :, 2:], torch.full((Q, 2), 0.1192), atol=1e-4, rtol=0)


def test_layers_share_their_heads_without_refinement() -> None:
    model = small()

    assert model.class_embed[0] is model.class_embed[1]
    assert model.bbox_embed[0] is model.bbox_embed[1]
    assert model.transformer.decoder.bbox_embed is None


def test_layers_have_heads_of_their_own_with_refinement_and_the_decoder_shares_them() -> None:
    model = small(with_box_refine=True)

    assert model.class_embed[0].weight is not model.class_embed[1].weight
    assert model.transformer.decoder.bbox_embed[1] is model.bbox_embed[1]


def test_two_stages_need_one_head_more_and_no_query_embedding() -> None:
    model = small(with_box_refine=True, two_stage=True)

    assert len(model.class_embed) == len(model.bbox_embed) == 3
    assert model.query_embed is None


def test_auxiliary_outputs_come_from_all_layers_but_the_last_and_only_where_asked_for() -> None:
    batch = images((33, 48))

    outputs, without = small()(batch), small(aux_loss=False)(batch)

    assert len(outputs["aux_outputs"]) == 1
    assert set(without) == {"pred_logits", "pred_boxes"}
    torch.testing.assert_close(without["pred_logits"], outputs["pred_logits"])


@pytest.mark.parametrize("variant", ["refine", "two-stage"])
def test_images_without_objects_give_finite_gradients(variant: str) -> None:
    model, loss = small(**VARIANTS[variant]), criterion(two_stage=variant == "two-stage")

    loss.weighted_sum(loss(model(images((65, 47), (97, 90))), [target(0), target(0)])).backward()

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 100
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_under_bfloat16_autocast_stays_finite(variant: str) -> None:
    model, loss = small(**VARIANTS[variant]), criterion(two_stage=variant == "two-stage")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images((65, 47), (97, 90)))
        total = loss.weighted_sum(loss(outputs, [target(2), target(0)]))
    total.backward()

    assert outputs["pred_boxes"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["single", "refine", "two-stage"])
def test_a_detector_of_a_shorter_type_gives_finite_float32_predictions(variant: str, dtype: torch.dtype) -> None:
    model = small(**VARIANTS[variant]).eval().to(dtype)

    with torch.no_grad():
        outputs = model([image.to(dtype) for image in images((65, 47), (97, 90))])

    for name in ("pred_logits", "pred_boxes"):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].isfinite().all()


def test_group_norm_counts_valid_cells_only() -> None:
    norm = ValidGroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 5, 6)
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[0, :3, :4] = valid[1] = True

    normed = norm(x, valid)

    torch.testing.assert_close(normed[:1, :, :3, :4], norm(x[:1, :, :3, :4]))
    torch.testing.assert_close(normed[1:], norm(x[1:]))
    assert normed.masked_fill(valid[:, None], 0).count_nonzero() == 0


def test_one_cell_with_one_channel_per_group_is_normalised_alone_as_in_a_batch() -> None:
    norm, cell = ValidGroupNorm(4, 4), torch.randn(1, 4, 1, 1)

    torch.testing.assert_close(norm(cell), norm(cell.expand(2, -1, -1, -1))[:1])


@pytest.mark.parametrize("padding", ["exact", "zeros"])
def test_an_image_that_is_padding_only_is_refused(padding: str) -> None:
    batch = NestedTensor(torch.zeros(2, 3, 64, 64), torch.tensor([False, True])[:, None, None].expand(2, 64, 64))

    with pytest.raises(ValueError, match=r"`mask\[1\]` must leave at least one cell valid"):
        small(padding=padding)(batch)


def test_an_image_with_fewer_cells_than_queries_is_detected_alone_as_in_a_batch() -> None:
    model = small(with_box_refine=True, two_stage=True).eval()
    large, tiny = images((64, 64), (8, 8))

    alone, together = model([tiny]), model([large, tiny])

    for name in ("pred_logits", "pred_boxes"):
        # the accuracy of every other comparison of a batch with its images, in float32
        torch.testing.assert_close(alone[name][0], together[name][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_feature_levels": 2}, "`num_feature_levels` must be at least the 3 levels of `backbone`, got 2"),
        ({"d_model": 48}, "`d_model` must be a multiple of the 32 groups of GroupNorm, got 48"),
        ({"two_stage": True}, "`two_stage` needs `with_box_refine`"),
        ({"two_stage": True, "with_box_refine": True, "num_queries": 7}, "`num_queries` must be .* 5, got 7"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_a_transformer_built_for_other_levels_is_refused() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", hidden_dim=C))

    with pytest.raises(ConfigError, match="`num_feature_levels` must be what the transformer was built for, 4, got 2"):
        DeformableDETR(
            backbone, DeformableTransformer(d_model=C, nhead=4), num_classes=K, num_queries=Q, num_feature_levels=2
        )
