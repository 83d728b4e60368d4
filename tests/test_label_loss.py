"""Label losses from numbers worked out by hand, and what they are least at."""

import math

import pytest
import torch

from detr_backbone.detectors.iou import iou
from detr_backbone.detectors.label_loss import matchability_aware_loss


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("scores", "label", "quality", "expected"),
    [
        # -q^1.5 ln p - (1 - q^1.5) ln(1 - p) for its class, -p^1.5 ln(1 - p) for each other
        ([0.8, 0.5], 0, 1.0, -math.log(0.8) - 0.5**1.5 * math.log(0.5)),
        ([0.8, 0.5], 1, 0.25, -0.125 * math.log(0.5) - 0.875 * math.log(0.5) - 0.8**1.5 * math.log(0.2)),
        ([0.8, 0.5], 0, 0.0, -math.log(0.2) - 0.5**1.5 * math.log(0.5)),
        ([0.8, 0.5], 2, 0.7, -(0.8**1.5) * math.log(0.2) - 0.5**1.5 * math.log(0.5)),  # no object
    ],
)
def test_the_matchability_aware_loss_is_the_published_formula(scores, label, quality, expected) -> None:
    logits = torch.tensor([[logit(p) for p in scores]], dtype=torch.float64)

    loss = matchability_aware_loss(logits, torch.tensor([label]), torch.tensor([quality], dtype=torch.float64))

    assert loss.item() == pytest.approx(expected)


def test_the_score_of_least_loss_is_the_iou_to_the_power_of_gamma() -> None:
    scores = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)

    loss = matchability_aware_loss(scores.logit()[:, None], torch.zeros(99).long(), torch.full((99,), 0.64).double())

    assert scores[loss.argmin()].item() == pytest.approx(0.64**1.5, abs=0.005)  # half a step of the grid


def test_neither_weights_nor_quality_have_a_gradient() -> None:
    logits = torch.tensor([[logit(0.3)]], dtype=torch.float64, requires_grad=True)
    quality = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)

    matchability_aware_loss(logits, torch.tensor([1]), quality).sum().backward()

    assert quality.grad is None
    assert logits.grad.item() == pytest.approx(0.3**1.5 * 0.3)  # of -ln(1 - p) it is p


def test_the_iou_of_pairs_is_the_one_worked_out_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.2, 0.2]])
    others = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, 1.0], [0.7, 0.7, 0.2, 0.2]])

    torch.testing.assert_close(iou(boxes, others), torch.tensor([0.25, 0.0, 1 / 3, 0.0]))
