"""Attention of an exported graph is torch's own."""

import pytest
import torch
from torch import nn

from detr_backbone.detectors.attention import attend


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masks", [(), ("padding",), ("mask",), ("padding", "mask")], ids="+".join)
def test_attention_spelled_out_while_exporting_is_torchs_own(monkeypatch, masks, training: bool) -> None:
    g = torch.Generator().manual_seed(1)
    attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True, dropout=0.5).train(training)
    query, key, value = (torch.randn(2, n, 8, generator=g) for n in (3, 5, 5))
    every = {
        "padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        "mask": torch.eye(3, 5, dtype=torch.bool).expand(2, -1, -1),
    }
    given = {name: every[name] for name in masks}

    torch.manual_seed(2)
    expected = attend(attention, query, key, value, **given)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.manual_seed(2)
    got = attend(attention, query, key, value, **given)

    if training:  # the numbers that drop values are drawn elsewhere
        assert not torch.equal(got, attend(attention, query, key, value, **given))
    else:
        torch.testing.assert_close(got, expected)
