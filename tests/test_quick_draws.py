"""Weights that the tests' networks begin with are as random as torch.nn.init draws them."""

import pytest
import torch
from torch import Tensor, nn

from tests.quick_draws import INITIALISERS

ARGUMENTS = {"normal_": (0.5, 2.0), "uniform_": (-1.0, 3.0)}


def filled(name: str, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.full((300, 1000), float("nan")))
    returned = getattr(nn.init, name)(weight, *ARGUMENTS.get(name, ()))
    assert returned is weight
    assert weight.requires_grad
    return weight.detach()


@pytest.mark.parametrize("name", INITIALISERS)
def test_mean_and_scale_are_those_of_the_initialiser(name: str) -> None:
    weight = filled(name)
    mean, variance = {
        "normal_": (0.5, 4.0),
        "uniform_": (1.0, 4**2 / 12),
        "kaiming_normal_": (0.0, 2 / 1000),
        "kaiming_uniform_": (0.0, 2 / 1000),
        "xavier_normal_": (0.0, 2 / 1300),
        "xavier_uniform_": (0.0, 2 / 1300),
    }[name]

    # 262,139 numbers: the mean is off by 0.2 % of the deviation, the variance by 0.3 % of itself
    assert weight.mean().item() == pytest.approx(mean, abs=0.01 * variance**0.5)
    assert weight.var().item() == pytest.approx(variance, rel=0.015)


@pytest.mark.parametrize("name", INITIALISERS)
def test_a_seed_gives_one_weight_and_no_two_draws_or_rows_are_alike(name: str) -> None:
    first = filled(name)
    again = getattr(nn.init, name)(torch.empty(300, 1000), *ARGUMENTS.get(name, ()))

    assert torch.equal(filled(name), first)
    assert not torch.equal(filled(name, seed=1), first)
    assert not torch.equal(again, first)
    assert len(first.unique(dim=0)) == 300
    assert torch.linalg.matrix_rank(first) == 300
