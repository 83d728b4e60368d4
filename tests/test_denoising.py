"""Noised queries stay by their targets, see nothing they must not see, and are compared with what they came from."""

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert, box_iou

from detr_backbone.backbone import BackboneBase, Joiner
from detr_backbone.detectors import ContrastiveDenoising, DeformableDETR, DeformableTransformer
from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.denoising import NoisedQueries
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.errors import ConfigError
from detr_backbone.position_encoding import PositionEmbeddingSine

C, K, Q = 32, 3, 4
NOTHING = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
TWO = {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]])}
ONE = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.3, 0.2]])}


def denoising(**options):
    return ContrastiveDenoising(K, C, **{"number": 4} | options)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 9, stride=8, padding=4))
    base = BackboneBase(network, return_layers=("0",), train_layers=("0",))
    layers = {"d_model": C, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 2, "dim_feedforward": 16}
    stages = {"two_stage": True, "two_stage_num_proposals": Q, "query_selection": "mixed", "num_feature_levels": 1}
    model = DeformableDETR(
        Joiner(base, PositionEmbeddingSine(C // 2, normalize=True)),
        DeformableTransformer(**layers, **stages, dropout=0.0),
        num_classes=K,
        num_queries=Q,
        num_feature_levels=1,
        with_box_refine=True,
        two_stage=True,
        denoising=denoising(),
    )
    for name, parameter in model.named_parameters():  # new box heads say the same of every query
        if "bbox_embed" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def with_noised(model, monkeypatch, noised):
    monkeypatch.setattr(model.denoising, "forward", lambda _: noised)
    return model(images(), [TWO, ONE])


def drawn(*, targets=(TWO, ONE), **options):
    torch.manual_seed(3)
    return denoising(**options)(list(targets))


def test_positive_queries_move_corners_by_less_than_half_a_side_and_negative_ones_by_more() -> None:
    target = box_convert(ONE["boxes"], "cxcywh", "xyxy")
    half_sides = ONE["boxes"][0, 2:].repeat(2) / 2

    boxes = denoising(number=1000)([ONE]).boxes[0]

    positive, negative = box_convert(boxes, "cxcywh", "xyxy").view(1000, 2, 4).unbind(1)
    assert ((positive - target).abs() / half_sides).max() <= 1.1  # the least side of 0.01 is a tenth of a half side
    # By one half side or more on both sides: an interval twice as long, one around half of it, or the least one.
    assert box_iou(negative, target).max() <= 0.5
    assert box_iou(positive, target).max() > 0.5


def test_no_box_noise_leaves_the_boxes_and_no_label_noise_the_labels() -> None:
    module = denoising(label_noise_ratio=0.0, box_noise_scale=0.0)

    noised = module([TWO])

    torch.testing.assert_close(noised.boxes[0], TWO["boxes"].repeat(2 * noised.groups, 1))
    assert torch.equal(noised.content[0], module.label_enc(TWO["labels"].repeat(2 * noised.groups)))


def test_half_of_the_label_noise_ratio_is_drawn_anew() -> None:
    module = denoising(number=5000, label_noise_ratio=0.6)

    content = module([ONE]).content[0]

    changed = (content != module.label_enc.weight[1]).any(dim=1).float().mean()
    # 0.3 are drawn anew, two of three of them to another class; five standard deviations of 10,000 draws
    assert changed.item() == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 10_000) ** 0.5)


def test_groups_fill_the_number_of_pairs_and_there_is_always_one() -> None:
    assert denoising(number=5)([TWO, ONE]).groups == 2
    assert denoising(number=1)([TWO, ONE]).groups == 1
    assert denoising(number=5)([NOTHING, NOTHING]).groups == 5


def test_images_with_fewer_targets_are_filled_up_with_invalid_queries() -> None:
    valid = drawn(targets=(TWO, ONE, NOTHING)).valid.view(3, 2, 2, 2)  # image, group, sign, target

    assert valid[0].all()
    assert valid[1, :, :, 0].all()
    assert not valid[1, :, :, 1].any()
    assert not valid[2].any()


def test_the_attention_mask_of_two_groups_is_the_one_worked_out_by_hand() -> None:
    valid = torch.tensor([[True, False, True, True]])  # one target, a positive and a negative query in each of 2 groups
    noised = NoisedQueries(torch.zeros(1, 4, C), torch.zeros(1, 4, 4), valid, groups=2)

    sees = ~noised.attention_mask(2)[0]

    assert sees.int().tolist() == [
        [1, 0, 0, 0, 1, 1],  # not the invalid one of its group
        [1, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]


def test_matching_queries_predict_what_they_predict_without_noised_ones(detector, monkeypatch) -> None:
    detector.train()
    expected = detector.eval()(images())
    detector.train()

    got = with_noised(detector, monkeypatch, drawn())

    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[name], expected[name])
        torch.testing.assert_close(got["aux_outputs"][0][name], expected["aux_outputs"][0][name])


@pytest.mark.parametrize("group", [0, 1])
def test_noised_queries_depend_on_their_own_group_and_on_no_other(detector, monkeypatch, group: int) -> None:
    noised = drawn()
    content = noised.content.detach().requires_grad_()

    outputs = with_noised(detector.train(), monkeypatch, noised._replace(content=content))["dn_outputs"]

    size = content.shape[1] // 2
    mine = slice(group * size, (group + 1) * size)
    (gradient,) = torch.autograd.grad(outputs["pred_logits"][0, mine.start].sum(), content)
    of_queries = gradient[0].abs().sum(dim=-1)
    assert (of_queries[mine] > 0).all()
    assert of_queries.sum() == of_queries[mine].sum()


def test_a_matching_query_has_no_gradient_from_noised_contents_or_boxes(detector, monkeypatch) -> None:
    noised = drawn()
    content, boxes = noised.content.detach().requires_grad_(), noised.boxes.requires_grad_()

    outputs = with_noised(detector.train(), monkeypatch, noised._replace(content=content, boxes=boxes))

    total = outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()
    gradients = torch.autograd.grad(total, [content, boxes], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_invalid_queries_change_no_prediction_of_their_image(detector, monkeypatch) -> None:
    noised = drawn()
    other = torch.where(noised.valid[..., None], noised.content, 7.0)
    valid = noised.valid[1]

    before = with_noised(detector.train(), monkeypatch, noised)["dn_outputs"]["pred_boxes"][1, valid]
    after = with_noised(detector, monkeypatch, noised._replace(content=other))["dn_outputs"]["pred_boxes"][1, valid]

    assert not valid.all()
    torch.testing.assert_close(before, after)


def criterion(label_loss="focal"):
    weights = {"loss_ce_dn": 1.0, "loss_bbox_dn": 1.0, "loss_giou_dn": 1.0}
    return SetCriterion(K, HungarianMatcher(focal=True), weights, label_loss=label_loss, classless_proposals=False)


def drawn_outputs(counts, groups):
    g = torch.Generator().manual_seed(4)
    most = max(1, *counts)

    def predictions(queries):
        shape = (len(counts), queries)
        return {
            "pred_logits": torch.randn(*shape, K, generator=g),
            "pred_boxes": 0.3 + 0.3 * torch.rand(*shape, 4, generator=g),
        }

    valid = torch.stack([torch.arange(most) < count for count in counts]).repeat(1, 2 * groups)
    return {**predictions(Q), "dn_outputs": {**predictions(2 * most * groups), "groups": groups, "valid": valid}}


@pytest.mark.parametrize("label_loss", ["focal", "mal"])
def test_losses_of_noised_queries_are_those_of_their_pairs_in_groups_of_their_own(label_loss: str) -> None:
    outputs, targets = drawn_outputs((2, 1), groups=2), [TWO, ONE]
    noised = outputs["dn_outputs"]

    losses = criterion(label_loss)(outputs, targets)

    # The same from single images: a group of one image, matched as its order says.
    expected = dict.fromkeys(("loss_ce", "loss_bbox", "loss_giou"), 0.0)
    for image, target in enumerate(targets):
        count = len(target["labels"])
        for group in range(2):
            positive = torch.arange(count) + group * 4
            chosen = torch.cat([positive, positive + 2])
            alone = {name: noised[name][image : image + 1, chosen] for name in ("pred_logits", "pred_boxes")}
            compare = criterion(label_loss)
            order = torch.arange(count)
            compare.matcher.match_layers = lambda *_, order=order: [[(order, order)]]
            for name, value in compare(alone, [target]).items():
                if name in expected:
                    expected[name] += value * count  # sums, not means over its targets
    for name, value in expected.items():
        torch.testing.assert_close(losses[f"{name}_dn"], value / 3 / 2)  # three targets, two groups


def test_losses_do_not_depend_on_the_order_of_images() -> None:
    outputs, targets = drawn_outputs((2, 1), groups=2), [TWO, ONE]

    def flipped(predictions):
        return {name: value if isinstance(value, int) else value.flip(0) for name, value in predictions.items()}

    swapped = {
        **flipped({n: outputs[n] for n in ("pred_logits", "pred_boxes")}),
        "dn_outputs": flipped(outputs["dn_outputs"]),
    }

    torch.testing.assert_close(criterion()(outputs, targets), criterion()(swapped, targets[::-1]))


def test_a_batch_without_targets_has_losses_of_zero_and_still_reaches_every_parameter(detector) -> None:
    model = detector.train()
    outputs = model(images(), [NOTHING, NOTHING])

    losses = criterion()(outputs, [NOTHING, NOTHING])
    sum(losses.values()).backward()

    assert {float(value.detach()) for name, value in losses.items() if "_dn" in name} == {0.0}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []  # DistributedDataParallel waits for each of them
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.zero_grad()


def test_evaluation_has_no_noised_queries_and_needs_no_targets(detector) -> None:
    assert "dn_outputs" not in detector.eval()(images())


def test_training_without_targets_is_refused(detector) -> None:
    with pytest.raises(ValueError, match="`targets` must be given"):
        detector.train()(images())


@pytest.mark.parametrize("options", [{"number": 0}, {"label_noise_ratio": 1.5}, {"box_noise_scale": -0.1}])
def test_numbers_out_of_range_are_refused(options: dict) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"`{name}` must be"):
        denoising(**options)
