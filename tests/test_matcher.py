"""The cheapest assignment, its costs, and what is said where there is none."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou

from detr_backbone.detectors.iou import generalized_iou
from detr_backbone.detectors.matcher import HungarianMatcher
from detr_backbone.errors import NumericsError


def drawn(*, counts, queries=4, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    outputs = {
        "pred_logits": torch.randn(len(counts), queries, classes, generator=g),
        "pred_boxes": 0.2 + 0.4 * torch.rand(len(counts), queries, 4, generator=g),
    }
    targets = [
        {
            "labels": torch.randint(classes - 1, (n,), generator=g),
            "boxes": 0.2 + 0.4 * torch.rand(n, 4, generator=g),
            "image_id": 70 + i,
        }
        for i, n in enumerate(counts)
    ]
    return outputs, targets


def costs_by_hand(outputs, targets, image, weights, *, focal):
    logits, boxes = outputs["pred_logits"][image], outputs["pred_boxes"][image]
    table = np.zeros((len(logits), len(targets[image]["labels"])))
    for q, n in np.ndindex(*table.shape):
        label, box = targets[image]["labels"][n], targets[image]["boxes"][n]
        if focal:
            p = logits[q, label].sigmoid()
            cost_class = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
        else:
            cost_class = -logits[q].softmax(0)[label]
        giou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (boxes[q], box)))[0, 0]
        table[q, n] = weights[0] * cost_class + weights[1] * (boxes[q] - box).abs().sum() - weights[2] * giou
    return table


def cheapest_by_trying_all(table):
    queries, count = range(table.shape[0]), table.shape[1]
    return min(
        itertools.permutations(queries, count), key=lambda choice: sum(table[q, n] for n, q in enumerate(choice))
    )


@pytest.mark.parametrize("focal", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_no_other_assignment_is_cheaper(seed: int, counts: list[int], focal: bool) -> None:
    outputs, targets = drawn(counts=counts, seed=seed)

    matches = HungarianMatcher(1, 5, 2, focal=focal)(outputs, targets)

    for image, (queries, found) in enumerate(matches):
        best = cheapest_by_trying_all(costs_by_hand(outputs, targets, image, (1, 5, 2), focal=focal))
        assert dict(zip(found.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


@pytest.mark.parametrize("only", [0, 1, 2])
def test_each_cost_decides_where_it_stands_alone(only: int) -> None:
    weights = [int(term == only) for term in range(3)]
    outputs, targets = drawn(counts=[3], seed=5)

    [(queries, found)] = HungarianMatcher(*weights)(outputs, targets)

    best = cheapest_by_trying_all(costs_by_hand(outputs, targets, 0, weights, focal=False))
    assert dict(zip(found.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_the_class_cost_is_a_probability_and_not_its_logarithm() -> None:
    p = torch.tensor([[[0.90, 0.09, 0.01], [0.80, 0.05, 0.15]]])  # 0.90 + 0.05 > 0.09 + 0.80, but 0.90 * 0.05 is less
    target = {"labels": torch.tensor([0, 1]), "boxes": torch.full((2, 4), 0.5)}

    [(_, found)] = HungarianMatcher(1, 0, 0)(
        {"pred_logits": p.log(), "pred_boxes": torch.full((1, 2, 4), 0.5)}, [target]
    )

    assert found.tolist() == [0, 1]


def test_layers_matched_together_match_as_each_alone() -> None:
    matcher, targets = HungarianMatcher(1, 5, 2), drawn(counts=[3, 0, 2])[1]
    layers = [drawn(counts=[3, 0, 2], seed=seed)[0] for seed in (1, 2, 3)]

    together = matcher.match_layers(
        *(torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes")), targets
    )

    torch.testing.assert_close(together, [matcher(layer, targets) for layer in layers])


def test_queries_come_in_ascending_order_on_the_cpu_as_int64() -> None:
    [(queries, found)] = HungarianMatcher()(*drawn(counts=[4]))

    assert queries.tolist() == [0, 1, 2, 3]
    assert queries.dtype == found.dtype == torch.int64


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_matched_in_float32(dtype: torch.dtype, weights: tuple[int, int, int]) -> None:
    outputs, targets = drawn(counts=[60, 40], queries=80)  # so many near ties that rounding a cost would show
    half = {name: value.to(dtype) for name, value in outputs.items()}
    matcher = HungarianMatcher(*weights)

    torch.testing.assert_close(matcher(half, targets), matcher({k: v.float() for k, v in half.items()}, targets))


def test_no_targets_match_nothing_even_as_an_empty_list_of_numbers() -> None:
    outputs, _ = drawn(counts=[0, 0])
    nothing = {"labels": torch.tensor([]), "boxes": torch.tensor([])}

    matches = HungarianMatcher()(outputs, [nothing, nothing])

    assert [(q.tolist(), n.tolist()) for q, n in matches] == [([], []), ([], [])]


def test_more_targets_than_queries_match_as_many_and_warn_with_image_id_and_counts() -> None:
    outputs, targets = drawn(counts=[1, 9])

    with pytest.warns(UserWarning, match="image_id 71 has 9 targets for 4 queries: 5 of them train nothing"):
        matches = HungarianMatcher()(outputs, targets)

    assert [len(queries) for queries, _ in matches] == [1, 4]


@pytest.mark.parametrize(("name", "terms"), [("pred_logits", "class"), ("pred_boxes", "L1, GIoU")])
def test_a_cost_that_is_not_a_number_names_the_terms_and_the_image(name: str, terms: str) -> None:
    outputs, targets = drawn(counts=[2, 2, 1])
    outputs[name][1, 0] = torch.nan

    with pytest.raises(NumericsError, match=f"in the {terms} cost of image_id 71;"):
        HungarianMatcher()(outputs, targets)


def test_an_image_without_image_id_is_named_by_its_place() -> None:
    outputs, targets = drawn(counts=[2, 2])
    outputs["pred_boxes"][1] = torch.inf
    del targets[1]["image_id"]

    with pytest.raises(NumericsError, match="of image 1 of the batch;") as caught:
        HungarianMatcher()(outputs, targets)

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_matching_without_any_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be 0, got 0 for all"):
        HungarianMatcher(0, 0, 0)


def test_matching_leaves_no_gradient() -> None:
    outputs, targets = drawn(counts=[2])
    logits, boxes = (outputs[name].requires_grad_() for name in ("pred_logits", "pred_boxes"))

    HungarianMatcher()({"pred_logits": logits, "pred_boxes": boxes}, targets)

    assert logits.grad is None
    assert boxes.grad is None


def test_generalized_iou_is_torchvisions_pair_by_pair() -> None:
    one, other = drawn(counts=[0, 0], queries=50)[0]["pred_boxes"]

    expected = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (one, other)))

    torch.testing.assert_close(generalized_iou(one, other), expected.diag())
    torch.testing.assert_close(generalized_iou(one[:, None], other), expected)


def test_generalized_iou_of_boxes_apart_is_worked_by_hand() -> None:
    left, right = torch.tensor([0.1, 0.5, 0.2, 1.0]), torch.tensor([0.9, 0.5, 0.2, 1.0])

    assert generalized_iou(left, right).item() == pytest.approx(-0.6)  # hull 1, union 0.4


def test_boxes_without_area_have_a_finite_generalized_iou_and_gradient() -> None:
    point = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)

    value = generalized_iou(point, point.detach())
    value.backward()

    assert value == 0
    assert point.grad.isfinite().all()
