"""Networks that many tests take, and statistics as training leaves them."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from detr_backbone import FrozenBatchNorm2d


class Branched(nn.Module):
    """A stem, two branches that are added, a functional reshape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))
        self.stem = nn.Linear(4, 4)
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.right = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.stem(x) + self.shift
        x = self.left(x) + self.right(x)
        return self.head(x.flatten(1) if scale is None else x * scale)


class LooksAtValues(Branched):
    """Its forward depends on values, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def trained(network: nn.Module) -> nn.Module:
    """The network with statistics as training leaves them, instead of (0, 1)."""
    for norm in network.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return network


def sequential() -> nn.Sequential:
    return nn.Sequential(OrderedDict(stem=nn.Linear(4, 4), left=nn.Linear(4, 4), head=nn.Linear(4, 2)))


STRATEGIES = {"sequential": sequential, "graph": Branched, "hooks": LooksAtValues}
