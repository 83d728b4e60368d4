"""Losses worked out again pair by pair, and every bad target and prediction named."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from detr_backbone.detectors.criterion import SetCriterion
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.errors import NumericsError

K, Q = 3, 6
LABEL_LOSSES = ("cross_entropy", "focal", "mal")
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def criterion(*, label_loss="cross_entropy", weight_dict=WEIGHTS, **options):
    matcher = HungarianMatcher(1, 5, 2, focal=label_loss != "cross_entropy")
    return SetCriterion(K, matcher, weight_dict, label_loss=label_loss, **options)


def drawn(*, counts=(2, 1), classes=K + 1, seed=0):
    g = torch.Generator().manual_seed(seed)
    outputs = {
        "pred_logits": torch.randn(len(counts), Q, classes, generator=g),
        "pred_boxes": 0.3 + 0.3 * torch.rand(len(counts), Q, 4, generator=g),
    }
    targets = [
        {
            "labels": torch.randint(K, (n,), generator=g),
            "boxes": 0.3 + 0.3 * torch.rand(n, 4, generator=g),
            "image_id": 70 + i,
        }
        for i, n in enumerate(counts)
    ]
    return outputs, targets


def matched(outputs, targets, *, focal=False):
    """Image, query and target of every matched pair."""
    for image, (queries, found) in enumerate(HungarianMatcher(1, 5, 2, focal=focal)(outputs, targets)):
        for query, n in zip(queries.tolist(), found.tolist(), strict=True):
            yield image, query, n


def test_box_losses_are_sums_over_matched_pairs_divided_by_the_number_of_targets() -> None:
    outputs, targets = drawn(counts=(2, 0, 3))

    losses = criterion()(outputs, targets)

    l1 = giou = 0.0
    for image, query, n in matched(outputs, targets):
        box, wanted = outputs["pred_boxes"][image, query], targets[image]["boxes"][n]
        l1 += F.l1_loss(box, wanted, reduction="sum")
        giou += 1 - generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted)))[0, 0]
    torch.testing.assert_close(losses["loss_bbox"], l1 / 5)
    torch.testing.assert_close(losses["loss_giou"], giou / 5)


def test_label_loss_is_the_weighted_mean_of_log_probabilities() -> None:
    logits = torch.tensor([[[0.0, 0, 0, 0], [math.log(5), 0, 0, 0]]])  # probabilities 1/4 each; 5/8, 1/8, 1/8, 1/8
    boxes = torch.tensor([[[0.5] * 4, [0.2] * 4]])
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5] * 4])}

    losses = criterion(eos_coef=0.1)({"pred_logits": logits, "pred_boxes": boxes}, [target])

    expected = (1.0 * math.log(4) + 0.1 * math.log(8)) / 1.1
    assert losses["loss_ce"].item() == pytest.approx(expected)


def test_focal_loss_is_a_sum_over_queries_and_classes_divided_by_the_number_of_targets() -> None:
    outputs, targets = drawn(counts=(2, 1), classes=K)

    losses = criterion(label_loss="focal")(outputs, targets)

    there = {
        (image, query, int(targets[image]["labels"][n])) for image, query, n in matched(outputs, targets, focal=True)
    }
    total = 0.0
    for index in np.ndindex(2, Q, K):
        p = outputs["pred_logits"][index].sigmoid()
        total += 0.25 * (1 - p) ** 2 * -p.log() if index in there else 0.75 * p**2 * -(1 - p).log()
    torch.testing.assert_close(losses["loss_ce"], total / 3)


def test_class_error_is_the_per_cent_of_matched_queries_with_the_wrong_class() -> None:
    outputs, targets = drawn(counts=(2, 2))

    losses = criterion()(outputs, targets)

    best = outputs["pred_logits"].argmax(-1)
    wrong = [best[image, query] != targets[image]["labels"][n] for image, query, n in matched(outputs, targets)]
    assert losses["class_error"] == 100 * sum(wrong) / 4


def test_cardinality_error_is_the_mean_distance_of_objects_found_and_there() -> None:
    outputs, targets = drawn(counts=(2, 1))
    outputs["pred_logits"][..., -1] = 9.0
    outputs["pred_logits"][0, :5, -1] = -9.0  # five objects found of two, none of one

    assert criterion()(outputs, targets)["cardinality_error"] == (3 + 1) / 2


def test_each_auxiliary_layer_has_the_losses_it_would_have_alone() -> None:
    outputs, targets = drawn(seed=1)
    earlier = [drawn(seed=seed)[0] for seed in (2, 3)]

    losses = criterion()({**outputs, "aux_outputs": earlier}, targets)

    alone = {**criterion()(outputs, targets)}
    for layer, aux in enumerate(earlier):
        of_layer = criterion()(aux, targets)
        del of_layer["class_error"]
        alone |= {f"{name}_{layer}": value for name, value in of_layer.items()}
    assert set(losses) == set(alone)
    torch.testing.assert_close(losses, alone)


def test_proposals_are_compared_with_targets_whose_labels_are_all_0() -> None:
    outputs, targets = drawn(counts=(2, 2), classes=K)
    proposals, _ = drawn(counts=(2, 2), classes=K, seed=4)
    proposals = {name: value.repeat(1, 2, 1) for name, value in proposals.items()}  # more of them than queries

    losses = criterion(label_loss="focal")({**outputs, "enc_outputs": proposals}, targets)

    classless = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    alone = criterion(label_loss="focal")(proposals, classless)
    del alone["class_error"]
    torch.testing.assert_close(
        {name: value for name, value in losses.items() if name.endswith("_enc")},
        {f"{name}_enc": value for name, value in alone.items()},
    )


def test_proposals_with_classes_are_compared_with_the_labels_of_the_targets() -> None:
    outputs, targets = drawn(classes=K)
    proposals, _ = drawn(classes=K, seed=1)

    losses = criterion(label_loss="mal", classless_proposals=False)({**outputs, "enc_outputs": proposals}, targets)

    alone = criterion(label_loss="mal")(proposals, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_enc"], alone[name])


def test_the_matchability_aware_loss_takes_the_iou_of_matched_pairs() -> None:
    outputs, targets = drawn(counts=(2, 1), classes=K)

    loss = criterion(label_loss="mal")(outputs, targets)["loss_ce"]

    p, expected = outputs["pred_logits"].double().sigmoid(), 0.0
    pairs = {(image, query): n for image, query, n in matched(outputs, targets, focal=True)}
    for image in range(2):
        for query in range(Q):
            n = pairs.get((image, query))
            for label in range(K):
                score = float(p[image, query, label])
                if n is not None and label == int(targets[image]["labels"][n]):
                    box, target = outputs["pred_boxes"][image, query], targets[image]["boxes"][n]
                    q = float(box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, target)))) ** 1.5
                    expected += -q * math.log(score) - (1 - q) * math.log(1 - score)
                else:
                    expected += -(score**1.5) * math.log(1 - score)
    assert loss.item() == pytest.approx(expected / 3)


@pytest.mark.parametrize("label_loss", LABEL_LOSSES)
def test_a_batch_without_targets_trains_only_the_label_loss(label_loss: str) -> None:
    outputs, _ = drawn(classes=K + (label_loss == "cross_entropy"))
    for value in outputs.values():
        value.requires_grad_()
    nothing = {"labels": torch.tensor([]), "boxes": torch.tensor([])}

    loss = criterion(label_loss=label_loss)
    losses = loss(outputs, [nothing, nothing])
    loss.weighted_sum(losses).backward()

    assert losses["loss_ce"] > 0
    assert losses["loss_bbox"] == losses["loss_giou"] == 0
    assert outputs["pred_logits"].grad.isfinite().all()
    assert not outputs["pred_boxes"].grad.any()


def test_the_number_of_targets_is_a_mean_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = drawn(counts=(2, 1))
    alone = criterion()(outputs, targets)["loss_bbox"]
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda count: count.add_(9))  # the other process has 9 targets

    together = criterion()(outputs, targets)["loss_bbox"]

    torch.testing.assert_close(together, alone * 3 / 6)


def test_weighted_sum_weighs_every_loss_in_weight_dict_and_no_other() -> None:
    loss = criterion(weight_dict={"loss_ce": 1.0, "loss_bbox_0": 5.0})

    total = loss.weighted_sum(
        {"loss_ce": torch.tensor(2.0), "loss_bbox_0": torch.tensor(3.0), "class_error": torch.tensor(9.0)}
    )

    assert total == 2 + 15


def test_weighted_sum_names_a_missing_loss() -> None:
    with pytest.raises(ValueError, match="got none for loss_giou"):
        criterion().weighted_sum({"loss_ce": torch.tensor(2.0), "loss_bbox": torch.tensor(3.0)})


def test_weighted_sum_names_the_loss_that_is_not_finite() -> None:
    losses = {name: torch.tensor(1.0) for name in WEIGHTS} | {"loss_bbox": torch.tensor(torch.nan)}

    with pytest.raises(NumericsError, match=r"losses must be finite, got \{'loss_bbox': nan\}"):
        criterion().weighted_sum(losses)


@pytest.mark.parametrize("where", ["outputs", "aux_outputs"])
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_a_prediction_that_is_not_a_number_names_the_output_and_the_image(name: str, where: str) -> None:
    outputs, targets = drawn(counts=(0, 2, 0))
    aux, _ = drawn(counts=(0, 2, 0))
    (outputs if where == "outputs" else aux)[name][2, 0, 0] = torch.nan

    with pytest.raises(NumericsError, match=f"`{name}` must be finite, got NaN or infinity for image_id 72$"):
        criterion()({**outputs, "aux_outputs": [aux]}, targets)


def test_proposals_that_are_not_numbers_are_found() -> None:
    outputs, targets = drawn(classes=K)
    proposals, _ = drawn(classes=K)
    proposals["pred_boxes"][0, 0] = torch.inf

    with pytest.raises(NumericsError, match=r"`pred_boxes` must be finite, .* for image_id 70$"):
        criterion(label_loss="focal")({**outputs, "enc_outputs": proposals}, targets)


@pytest.mark.parametrize("label", [-1, K, K + 1])
def test_a_label_that_is_no_class_names_its_place_and_image(label: int) -> None:
    outputs, targets = drawn(counts=(1, 3))
    targets[1]["labels"][2] = label

    with pytest.raises(ValueError, match=rf"`labels\[2\]` of image_id 71 must be within 0 ... 2, got {label};"):
        criterion()(outputs, targets)


@pytest.mark.parametrize(
    ("box", "hint"),
    [
        ([120.0, 80.0, 60.0, 40.0], "pixels"),
        ([0.5, 0.5, 0.9, 0.9], None),
        ([0.6, 0.6, 0.9, 0.9], r"x1, y1, x2, y2"),
        ([0.5, 0.5, -0.1, 0.2], "negative"),
        ([0.5, torch.nan, 0.1, 0.2], "fractions"),
        ([0.005, 0.5, 0.02, 1.01], None),  # half a per cent over three borders
        ([0.5, 0.5, 0.0, 0.0], None),
    ],
)
def test_a_box_that_is_not_normalised_cxcywh_is_refused_with_a_hint(box: list[float], hint: str | None) -> None:
    outputs, targets = drawn(counts=(1, 2))
    targets[1]["boxes"][1] = torch.tensor(box)

    if hint is None:
        assert criterion()(outputs, targets)["loss_giou"].isfinite()
    else:
        with pytest.raises(NumericsError, match=rf"`boxes\[1\]` of image_id 71 must be .*{hint}"):
            criterion()(outputs, targets)


def test_labels_and_boxes_must_be_as_many() -> None:
    outputs, targets = drawn(counts=(1, 2))
    targets[1]["boxes"] = targets[1]["boxes"][:1]

    with pytest.raises(ValueError, match=r"of image_id 71 must fit each other, got \[2\] and \[1, 4\]"):
        criterion()(outputs, targets)


def test_labels_must_be_integers() -> None:
    outputs, targets = drawn(counts=(1, 2))
    targets[0]["labels"] = targets[0]["labels"].float()

    with pytest.raises(TypeError, match="`labels` of image_id 70 must be integers"):
        criterion()(outputs, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pred_logits": torch.zeros(2, Q, K)},
            r"`pred_logits` must be \[B, Q, K \+ 1\] with K \+ 1 = 4, got \[2, 6, 3\]",
        ),
        ({"pred_boxes": torch.zeros(2, Q, 5)}, r"`pred_boxes` must be \[B, Q, 4\] = \[2, 6, 4\], got \[2, 6, 5\]"),
    ],
)
def test_outputs_of_another_shape_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    outputs, targets = drawn()

    with pytest.raises(ValueError, match=message):
        criterion()(outputs | change, targets)


def test_there_must_be_one_target_for_each_image() -> None:
    outputs, targets = drawn()

    with pytest.raises(ValueError, match="one entry for each of 2 images, got 1"):
        criterion()(outputs, targets[:1])


def test_half_precision_outputs_give_float32_losses() -> None:
    outputs, targets = drawn()

    losses = criterion()({name: value.bfloat16() for name, value in outputs.items()}, targets)

    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_a_target_left_over_still_counts_in_the_mean() -> None:
    outputs, targets = drawn(counts=(Q + 2,))

    with pytest.warns(UserWarning, match="2 of them train nothing"):
        losses = criterion()(outputs, targets)
    with pytest.warns(UserWarning, match="2 of them train nothing"):
        pairs = list(matched(outputs, targets))

    l1 = sum(
        (outputs["pred_boxes"][image, query] - targets[image]["boxes"][n]).abs().sum() for image, query, n in pairs
    )
    torch.testing.assert_close(losses["loss_bbox"], l1 / (Q + 2))


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: numbers read from tensors, and shapes that depend on what tensors hold."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.name().startswith("aten::index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        self.count += by_mask or func.name() in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("label_loss", LABEL_LOSSES)
def test_more_decoder_layers_wait_for_the_device_no_more_often(label_loss: str) -> None:
    waits = []
    for layers in (1, 6):
        outputs, targets = drawn(classes=K + (label_loss == "cross_entropy"))
        outputs["aux_outputs"] = [outputs.copy() for _ in range(layers - 1)]
        with Waits() as counted:
            compare = criterion(label_loss=label_loss)
            compare.weighted_sum(compare(outputs, targets))
        waits.append(counted.count)

    assert waits[0] == waits[1] > 0
