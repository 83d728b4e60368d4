"""Dropout: which values go, by how much the others grow, and where torch's own takes over."""

import pytest
import torch

from detr_backbone.detectors.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_index_drops_its_fraction_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(50_000, 4, dtype=dtype))
    assert out.dtype == dtype
    kept = out != 0
    # Four values share a draw: each has its share, whatever the others are. 5 standard deviations.
    assert (kept.float().mean(dim=0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 50_000) ** 0.5
    assert torch.corrcoef(kept.T.float()).sub(torch.eye(4)).abs().max() < 5 / 50_000**0.5
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-2, atol=0)
    assert out.double().mean() == pytest.approx(
        1, abs=5 * (p / (1 - p) / 200_000) ** 0.5 + 4e-3 * (dtype == torch.bfloat16)
    )


def test_its_gradient_is_that_of_its_mask() -> None:
    x = torch.rand(7, 9).add(1).requires_grad_()
    out = Dropout(0.5)(x)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert 0 < (out == 0).sum() < out.numel()
    torch.testing.assert_close(x.grad, out.detach() / x.detach())


def test_a_seed_repeats_it() -> None:
    def drop(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(3, 5, 7))

    assert torch.equal(drop(1), drop(1))
    assert not torch.equal(drop(1), drop(2))


def test_evaluation_and_a_fraction_of_zero_change_nothing() -> None:
    x = torch.rand(5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_a_fraction_of_one_drops_all() -> None:
    assert torch.equal(Dropout(1.0)(torch.ones(100)), torch.zeros(100))


def test_a_fraction_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)
