"""Dropout whose random numbers cost less: a CPU spends a good part of a detector's training step on drawing them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BITS = 15
"""Of the 64 that torch draws at once, the highest is always 0, so four values take 15 of their 16 bits each."""


class Dropout(nn.Dropout):
    """As `nn.Dropout`, with `p` rounded to the nearest of 2^15 steps on a CPU.

    `torch.manual_seed` repeats it. Compiled graphs and other devices draw as torch does.

    Source: "Dropout" (https://jmlr.org/papers/v15/srivastava14a.html), section 4, scaled in training as in section 10.

    >>> dropout = Dropout(0.5)
    >>> set(dropout(torch.ones(1000)).tolist()) == {0.0, 2.0}, dropout.eval()(torch.ones(2))
    (True, tensor([1., 1.]))
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        """Some values zero, those that stay larger by 1 / (1 - p); in evaluation all as they are."""
        dropped = round(self.p * 2**_BITS)
        if not (self.training and x.is_cpu and 0 < dropped < 2**_BITS) or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)
        draws = draws.bitwise_and_(2**_BITS - 1)[: x.numel()].view(x.shape)
        factors = (draws >= dropped).to(x.dtype).mul_(2**_BITS / (2**_BITS - dropped))
        return torch.mul(x, factors)
